"""The command line, run as a user would."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch
import typer
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from two_processes import environment_of, free_port
from typer.testing import CliRunner

import hessdiag
import ocm
from ocm import checkpoints, data
from ocm.cli import app as cli
from ocm.covariances.names import LEARNED
from ocm.evaluation import classifier
from ocm.training import workflow
from ocm.training.small_unet import small_unet


@pytest.fixture(scope="module")
def invoke():
    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments])

    return call


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "second-order"])
def test_sample_writes_images(trained, invoke, tmp_path, sampler):
    arguments = (
        "sample", trained, "--steps", 3, "--sampler", sampler,
        "--device", "cpu", "--quiet", "--last-noise", 1, "--batch-size", 8,
    )  # fmt: skip
    first = invoke(*arguments, "--out", tmp_path / "a", "--num-images", 20)
    assert first.exit_code == 0, first.output
    images = load_file(tmp_path / "a" / "samples.safetensors")["images"]
    assert images.shape == (20, 1, 8, 8)
    assert images.abs().max() <= 1
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (record["sampler"], record["steps"], record["seed"]) == (sampler, 3, 0)
    assert (tmp_path / "a" / "samples.png").read_bytes().startswith(b"\x89PNG")
    invoke(*arguments, "--out", tmp_path / "b", "--num-images", 5)
    fewer = load_file(tmp_path / "b" / "samples.safetensors")["images"]
    torch.testing.assert_close(fewer, images[:5], rtol=1e-4, atol=1e-4)


def test_train_from_scratch_and_on_a_denoiser_that_exists(invoke, tmp_path):
    sizes = ("--head-steps", 2, "--batch-size", 4, "--device", "cpu", "--quiet")
    answer = invoke("train", "--out", tmp_path / "a", "--denoiser-steps", 2, *sizes)
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "a" / "train.json").read_text())
    assert record["denoiser_loss"] > 0
    assert record["head"]["batch_size"] == 4
    units = checkpoints.load(tmp_path / "a").learned["ml"].parameterisation
    digits = load_digits().images / 8 - 1
    assert units.data_std == pytest.approx(digits.std(), rel=0.05)
    assert units.positive
    again = invoke("train", "--out", tmp_path / "a", *sizes)
    assert "holds a finished checkpoint" in str(again.exception)
    assert f"`ocm train --denoiser {tmp_path / 'a'} --out OTHER" in str(again.exception)
    unused = invoke(
        "train", "--out", tmp_path / "c", "--denoiser", tmp_path / "a", "--denoiser-steps", 3
    )
    assert "--denoiser-steps 3 is for a new denoiser" in str(unused.exception)
    answer = invoke("train", "--out", tmp_path / "b", "--denoiser", tmp_path / "a", *sizes)
    assert answer.exit_code == 0, answer.output
    weights = "denoiser/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


@pytest.mark.parametrize(
    ("path", "kind"), [("flow", "flow_prediction"), ("edm", "edm"), ("trigflow", "trigflow")]
)
def test_a_model_of_another_path_from_training_to_scores(invoke, tmp_path, path, kind):
    out, quiet = tmp_path / path, ("--device", "cpu", "--quiet")
    steps = ("--denoiser-steps", 3, "--head-steps", 2, "--batch-size", 4)
    answer = invoke("train", "--out", out, "--schedule", path, *steps, *quiet)
    assert answer.exit_code == 0, answer.output
    loaded = checkpoints.load(out)
    schedule = loaded.denoiser.schedule
    assert (schedule.name, loaded.denoiser.prediction_type) == (path, kind)
    knows = loaded.denoiser.data_covariance is not None
    assert knows == (path != "edm")  # whose x_N tells a little of x0
    answer = invoke("calibrate", out, "--num-images", 8, "--steps", 3, *quiet)
    assert answer.exit_code == 0, answer.output
    for name in ("ml", "hutchinson", "analytic"):
        answer = invoke(
            "sample", out, "--out", tmp_path / name, "--covariance", name, "--num-images", 2,
            "--steps", 3, "--spacing", "trailing", *quiet,
        )  # fmt: skip
        assert answer.exit_code == 0, answer.output
        timesteps = json.loads((tmp_path / name / "samples.json").read_text())["timesteps"]
        assert timesteps == pytest.approx([1000 / 3, 2000 / 3, 1000])
    answer = invoke(
        "evaluate", out, "--out", tmp_path / "scores", "--covariance", "ml", "--covariance",
        "exact", "--steps", 3, "--num-images", 2, *quiet,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert record["nll_bits_per_dim"]["exact"]["3"] > 0


@pytest.fixture(scope="module")
def trained(invoke, tmp_path_factory):
    """A checkpoint with every head, none of which has learned much, and its calibration."""
    out = tmp_path_factory.mktemp("trained")
    heads = [argument for name in LEARNED for argument in ("--head", name)]
    answer = invoke(
        "train", "--out", out, "--denoiser-steps", 3, "--head-steps", 2, "--batch-size", 4,
        "--parameterisation", "preconditioned", "--prediction-type", "v_prediction", *heads,
        "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    answer = invoke("calibrate", out, "--num-images", 4, "--steps", 3, "--device", "cpu", "--quiet")
    assert answer.exit_code == 0, answer.output
    assert "analytic_data" in answer.output
    return out


def test_calibrate_writes_into_the_checkpoint(trained):
    loaded = checkpoints.load(trained)
    assert set(loaded.learned) == set(LEARNED)
    assert loaded.denoiser.prediction_type == "v_prediction"
    assert set(loaded.calibrations) == {*LEARNED, "analytic", "analytic_data"}
    assert loaded.calibrations["ocm"].rows.keys() == {1, 500, 1000}
    record = json.loads((trained / "calibration.json").read_text())
    assert record["calibrations"]["npr"] == loaded.calibrations["npr"].to_json()


def test_evaluate_by_ode(trained, invoke, tmp_path):
    """Bits/dim by the ODE are those of the library, whatever the batch."""
    common = ("evaluate", trained, "--likelihood", "ode", "--covariance", "ml", "--steps", 2)
    common = (*common, "--num-images", 2, "--device", "cpu", "--quiet")
    answer = invoke(*common, "--tolerance", 3, "--batch-size", 1, "--out", tmp_path)
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "evaluation.json").read_text())["ode"]
    assert record["error_of_an_image"]["solver"] <= 1.5
    assert "By the probability-flow ODE" in (tmp_path / "report.md").read_text()
    settings = ocm.LikelihoodSettings(
        num_steps=record["num_steps"],
        max_probes=record["max_probes"],
        num_draws=record["num_draws"],
    )
    loaded = checkpoints.load(trained)
    found = ocm.log_likelihood(
        loaded.denoiser, data.digits().test[:2], settings, levels=loaded.levels
    )
    assert record["bits_per_dim"] == pytest.approx(found.bits_per_dim.mean().item(), abs=1e-3)
    answer = invoke(*common, "--tolerance", 0, "--out", tmp_path / "none")
    assert "tolerance must be positive, in bits/dim, got 0.0" in str(answer.exception)


def test_evaluate_all(trained, invoke, tmp_path, monkeypatch):
    quick = partial(classifier.train_classifier, num_steps=20)
    monkeypatch.setattr(classifier, "train_classifier", quick)
    densities = {"beta", "analytic", "hutchinson", "cosine", *LEARNED}
    named = [argument for name in (*densities, "lanczos") for argument in ("--covariance", name)]
    answer = invoke(
        "evaluate", trained, "--all", "--out", tmp_path, "--steps", 2,
        "--num-images", 2, "--num-samples", 8, "--num-probes", 2, "--fit-images", 2,
        *named, "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "evaluation.json").read_text())
    rows = densities | {f"{name}_calibrated" for name in densities}
    assert set(record["nll_bits_per_dim"]) == rows
    for sampler in ("ddpm", "ddim"):
        assert set(record["quality"][sampler]) == rows | {"lanczos"}
        assert set(record["quality"][sampler]["ocm"]) == {"2"}
    assert "classifier" in record["features"]
    report = (tmp_path / "report.md").read_text()
    assert report.count("| OCM head, calibrated |") == 3
    assert "right on" in report
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--covariance", "ocm", "--calibrated"),
        ("--covariance", "lanczos", "--lanczos-probes", 2),
        ("--covariance", "full"),
        ("--covariance", "cosine", "--spacing", "quadratic"),
        ("--covariance", "analytic", "--spacing", "optimal"),
    ],
)
def test_sample_with_other_covariances_and_timesteps(trained, invoke, tmp_path, arguments):
    answer = invoke(
        "sample", trained, "--steps", 3, "--num-images", 2, "--out", tmp_path, *arguments,
        "--device", "cpu", "--quiet",
    )  # fmt: skip
    if "analytic" in arguments or "--calibrated" in arguments:
        # Fitted at the timesteps of 3 even steps; others lie between them.
        assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "samples.json").read_text())
    assert len(record["timesteps"]) == 3
    if "quadratic" in arguments:
        assert record["timesteps"] == [1, 251, 1000]
    elif "--calibrated" in arguments:  # as they were calibrated
        assert record["timesteps"] == [1, 500, 1000]
    elif "optimal" not in arguments:
        assert record["timesteps"] == [333, 667, 1000]


def test_two_processes_share_the_samples_out(trained, invoke, tmp_path):
    def command(out):
        return [
            sys.executable, "-m", "ocm", "sample", str(trained), "--steps", "2", "--quiet",
            "--num-images", "5", "--device", "cpu", "--out", str(out),
        ]  # fmt: skip

    port = free_port()
    processes = [
        subprocess.Popen(command(tmp_path / "two"), env=os.environ | environment_of(rank, port))
        for rank in range(2)
    ]
    answer = invoke(*command(tmp_path / "one")[3:])
    assert answer.exit_code == 0, answer.output
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (load_file(tmp_path / n / "samples.safetensors")["images"] for n in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_images_of_a_folder_are_read_alike_by_all_commands(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index in range(12):
            image = Image.new("L", (8, 8), 20 * index)
            image.save(tmp_path / "images" / split / f"{index}.png")
    out = tmp_path / "out"
    common = ("--device", "cpu", "--quiet")
    answer = invoke(
        "train", "--data", tmp_path / "images", "--limit", 9, "--hold-out", 2, "--out", out,
        "--denoiser-steps", 2, "--head-steps", 2, "--batch-size", 4, "--workers", 1, *common,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    record = json.loads((out / "train.json").read_text())
    assert (record["trained_on"], record["data_options"]) == (7, {"limit": 9})
    answer = invoke("calibrate", out, "--steps", 2, "--covariance", "ml", *common)
    assert answer.exit_code == 0, answer.output
    assert json.loads((out / "calibration.json").read_text())["num_images"] == 2
    for count, works in ((9, True), (10, False)):
        answer = invoke(
            "evaluate", out, "--num-images", count, "--steps", 2, "--covariance", "beta",
            "--covariance", "beta_tilde", "--out", tmp_path / "scores", *common,
        )  # fmt: skip
        assert (answer.exit_code == 0) == works
    assert "num_images must be at most 9" in str(answer.exception)
    answer = invoke(
        "train", "--data", tmp_path / "images", "--label-column", "label", "--out", out / "b"
    )
    assert "label_column must be a column of integers" in str(answer.exception)


def test_a_file_of_wide_pixels_is_named(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for index in range(4):
        wide = Image.new("I;16" if index == 2 else "L", (8, 8))
        wide.save(tmp_path / "images" / f"photograph-{index}.png")
    answer = invoke("train", "--data", tmp_path / "images", "--out", tmp_path / "out", "--quiet")
    assert "photograph-2.png) must have 8 bits a channel" in str(answer.exception)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A pipeline of diffusers, and the same with a head of random weights attached."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    plain, attached = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("attached")
    unet = small_unet((1, 8, 8), width=8)
    DDPMPipeline(unet, scheduler).save_pretrained(plain)
    model = ocm.attach(unet, parameterisation=ocm.Parameterisation(0.5, positive=True))
    torch.nn.init.normal_(model.head.head.conv.weight, std=0.3)
    DDPMPipeline(model, model.scheduler(scheduler)).save_pretrained(attached)
    return plain, attached, model


def test_a_pipeline_is_sampled_and_scored_as_it_is(pipelines, invoke, tmp_path):
    plain, _, model = pipelines
    small = ("--device", "cpu", "--quiet", "--out", tmp_path)
    drawn = ("--steps", 3, "--num-images", 2, *small)
    answer = invoke("sample", plain, "--covariance", "coloring", "--num-probes", 4, *drawn)
    assert answer.exit_code == 0, answer.output
    answer = invoke("sample", plain, *drawn)
    assert "must be named for a checkpoint without a trained head" in str(answer.exception)
    assert "`ocm train --denoiser PATH --head ml` trains one" in str(answer.exception)
    assert "hutchinson and coloring need none" in str(answer.exception)

    scored = ("--covariance", "beta", "--steps", 3, "--num-images", 2, *small)
    answer = invoke("evaluate", plain, *scored)
    assert "--data must be given: a pipeline" in str(answer.exception)
    answer = invoke("evaluate", plain, "--data", "digits", *scored)
    assert answer.exit_code == 0, answer.output
    covariance = model.covariance(ocm.cosine(), "v_prediction")
    x0 = ocm.data.digits().test[:2]
    bound = ocm.bits_per_dim(
        covariance.denoiser, ocm.Beta(covariance.denoiser), x0, 3, levels=17
    ).total.mean()
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["nll_bits_per_dim"]["beta"]["3"] == pytest.approx(bound.item(), rel=1e-4)

    answer = invoke("calibrate", plain, *small)
    assert f"`ocm train --denoiser {plain} --out OTHER`" in str(answer.exception)
    assert not (plain / "tables.json").exists()


def test_the_head_of_an_attached_pipeline_is_that_of_ocm(pipelines, invoke, tmp_path):
    _, attached, model = pipelines
    sizes = ("--device", "cpu", "--quiet", "--out", tmp_path)
    answer = invoke("sample", attached, "--steps", 3, "--num-images", 2, *sizes)
    assert answer.exit_code == 0, answer.output
    covariance = model.covariance(ocm.cosine(), "v_prediction")
    timesteps = ocm.trailing_timesteps(covariance.denoiser.schedule, 3)
    expected = ocm.sample(covariance.denoiser, covariance, (2, 1, 8, 8), timesteps)
    drawn = load_file(tmp_path / "samples.safetensors")["images"]
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)

    answer = invoke(
        "train", "--denoiser", attached, "--head", "npr", "--head-steps", 2, "--batch-size", 4,
        *sizes,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    learned = checkpoints.load(tmp_path).learned
    assert set(learned) == {"ocm", "npr"}
    torch.testing.assert_close(learned["ocm"].head.head.conv.weight, model.head.head.conv.weight)


def test_a_pipeline_without_a_size_is_refused(pipelines, invoke, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pipelines[0], copy)
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    answer = invoke("sample", copy, "--covariance", "beta", "--out", tmp_path / "out")
    assert "config.json must state sample_size, and does not" in str(answer.exception)


def test_a_class_conditional_denoiser(invoke, tmp_path, monkeypatch):
    sizes = ("--head-steps", 2, "--batch-size", 4, "--device", "cpu", "--quiet")
    out = tmp_path / "out"
    answer = invoke("train", "--class-conditional", "--out", out, "--denoiser-steps", 3, *sizes)
    assert answer.exit_code == 0, answer.output
    assert checkpoints.load(out).denoiser.num_classes == 10
    drawn = []
    for label in (3, 4):
        arguments = ("--label", label, "--steps", 2, "--num-images", 2, "--out", tmp_path / "drawn")
        answer = invoke("sample", out, *arguments, "--device", "cpu", "--quiet")
        assert answer.exit_code == 0, answer.output
        drawn.append(load_file(tmp_path / "drawn" / "samples.safetensors")["images"])
    assert not torch.equal(*drawn)
    answer = invoke("train", "--denoiser", out, "--class-conditional", "--out", tmp_path / "b")
    assert "--class-conditional" in str(answer.exception)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.new("L", (8, 8), index).save(tmp_path / "images" / f"{index}.png")
    without = ("--data", tmp_path / "images", "--out", tmp_path / "c", "--quiet")
    answer = invoke("train", "--class-conditional", *without)
    assert "which have no classes; name their column by label_column" in str(answer.exception)


def test_a_retrained_head_loses_its_calibration(trained, invoke, tmp_path):
    sizes = ("--head-steps", 2, "--batch-size", 4, "--device", "cpu", "--quiet")
    answer = invoke("train", "--denoiser", trained, "--out", tmp_path, "--head", "sn", *sizes)
    assert answer.exit_code == 0, answer.output
    loaded = checkpoints.load(tmp_path)
    assert set(loaded.learned) == set(LEARNED)
    assert set(loaded.calibrations) == set(checkpoints.load(trained).calibrations) - {"sn"}
    assert loaded.num_calibration == 150


def test_the_likelihood_head_starts_from_another(trained, invoke, tmp_path):
    """A step of no length leaves the weights and the units of NPR's head."""
    rest = ("--batch-size", 4, "--device", "cpu", "--quiet", "--out", tmp_path / "out")
    sizes = ("--head-steps", 1, "--head-learning-rate", 1e-9)
    start = ("--denoiser", trained, "--head", "ml", "--start-from", "npr")
    answer = invoke("train", *start, *sizes, *rest)
    assert answer.exit_code == 0, answer.output
    learned = checkpoints.load(tmp_path / "out").learned
    assert learned["ml"].parameterisation == learned["npr"].parameterisation
    for found, wanted in zip(
        learned["ml"].head.parameters(), learned["npr"].head.parameters(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    answer = invoke("train", "--start-from", "npr", "--out", tmp_path / "none")
    assert "--start-from npr is for --head ml and a --denoiser" in str(answer.exception)


def test_a_head_of_another_denoiser_is_not_taken_for_finished(trained, invoke, tmp_path):
    sizes = ("--head-steps", 2, "--batch-size", 4, "--device", "cpu", "--quiet")
    other = tmp_path / "other"
    assert invoke("train", "--out", other, "--denoiser-steps", 2, *sizes).exit_code == 0
    out = tmp_path / "out"
    with mock.patch.object(checkpoints, "save", side_effect=KeyboardInterrupt):
        assert invoke("train", "--out", out, "--denoiser", trained, *sizes).exit_code == 130
    answer = invoke("train", "--out", out, "--denoiser", other, *sizes)
    assert "--overwrite" in str(answer.exception)
    assert "denoiser" in str(answer.exception)
    answer = invoke("train", "--out", out, "--denoiser", other, *sizes, "--overwrite")
    assert answer.exit_code == 0, answer.output


def test_training_goes_on_after_an_interruption(invoke, tmp_path):
    arguments = (
        "train", "--denoiser-steps", 6, "--head-steps", 4, "--batch-size", 4, "--device", "cpu",
        "--quiet", "--checkpoint-every", 2,
    )  # fmt: skip
    assert invoke(*arguments, "--out", tmp_path / "whole").exit_code == 0

    with mock.patch.object(workflow, "train_head", side_effect=KeyboardInterrupt):
        answer = invoke(*arguments, "--out", tmp_path / "part")
        assert answer.exit_code == 130
        kept = (
            f"interrupted: kept in {tmp_path / 'part' / 'training'}: denoiser at step 6. The same"
        )
        assert kept in answer.stderr
    assert not (tmp_path / "part" / "ocm.json").exists()
    assert invoke(*arguments, "--out", tmp_path / "part").exit_code == 0
    for file in ("heads/ml.safetensors", "denoiser/diffusion_pytorch_model.safetensors"):
        whole, part = (load_file(tmp_path / name / file) for name in ("whole", "part"))
        assert all(torch.equal(whole[key], part[key]) for key in whole)
    other = invoke(*arguments[:-1], 3, "--out", tmp_path / "part", "--overwrite", "--seed", 1)
    assert other.exit_code == 0, other.output


def test_control_c_ends_in_one_line(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ocm", "train", "--denoiser-steps", "100000", "--batch-size", "2",
            "--checkpoint-every", "1", "--device", "cpu", "--quiet", "--out", str(out),
        ],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not list((out / "training" / "denoiser").glob("training-state-0*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.strip().startswith(f"interrupted: kept in {out / 'training'}: denoiser at step ")
    assert len(said.strip().splitlines()) == 1


def test_the_version_is_that_of_the_package(invoke):
    assert invoke("--version").output == f"ocm {hessdiag.__version__}\n"


@pytest.mark.parametrize("command", [(), ("train",), ("calibrate",), ("sample",), ("evaluate",)])
def test_help_explains(invoke, command):
    answer = invoke(*command, "--help")
    assert answer.exit_code == 0
    for option in ("--seed", "--device", "--out", "--config") if command else ("--version",):
        assert option in answer.output


def test_the_examples_of_help_are_commands_that_exist(invoke):
    """Each is parsed whole, and stands under the command it is of."""
    commands = typer.main.get_command(cli.app).commands
    assert set(commands) == {one.__name__ for one in cli.EXAMPLES}
    for command, examples in cli.EXAMPLES.items():
        shown = invoke(command.__name__, "--help").output
        for example in examples:
            assert example.split(" --")[0] in shown
            name, *arguments = shlex.split(example[example.index("ocm ") :])[1:]
            assert name == command.__name__
            arguments = arguments[2:] if arguments[0] == "--config" else arguments
            assert commands[name].make_context(name, arguments).params


def test_shells_complete_commands_and_options():
    def completed(*words):
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        answer = subprocess.run(
            [sys.executable, "-m", "ocm"], capture_output=True, text=True, check=False,
            env=os.environ | asked | {"_OCM_COMPLETE": "complete_bash"},
        )  # fmt: skip
        return answer.stdout.split()

    assert completed("ocm", "sa") == ["sample"]
    assert completed("ocm", "sample", "--lanc") == ["--lanczos-probes"]


def test_wrong_input_ends_a_process_in_one_line_and_status_2(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-m", "ocm", "sample", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"PATH": ""},
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no checkpoint at nowhere")
    assert "Traceback" not in answer.stderr
