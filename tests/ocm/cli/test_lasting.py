"""Long commands keep what is done, and go on when they are given again."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from bad_input import command
from folders import assert_same, assert_whole, contents, left_beside
from full_disk import files_of_at_most
from typer.testing import CliRunner

from ocm import checkpoints, data
from ocm.checkpoints.catalogue import CovarianceSettings
from ocm.cli import app as cli
from ocm.cli import options
from ocm.cli.announcing import work_of
from ocm.covariances import calibrated
from ocm.evaluation import classifier, samples, scores
from ocm.evaluation.evaluation import EvaluationSettings, evaluate

_SMALL = ("--device", "cpu", "--quiet")
_DRAWN = ("--num-images", 6, "--batch-size", 2, "--steps", 2, *_SMALL)
_SCORED = (
    *("--all", "--num-images", 2, "--fit-images", 2, "--num-samples", 8, "--steps", 2),
    *("--covariance", "ml", "--covariance", "analytic", *_SMALL),
)
_FITTED = ("--num-images", 4, "--steps", 2, *_SMALL)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with two heads, none of which has learned much."""
    out = tmp_path_factory.mktemp("trained")
    answer = invoke(
        "train", "--out", out, "--denoiser-steps", 2, "--head-steps", 2, "--batch-size", 4,
        "--head", "ml", "--head", "ocm", *_SMALL,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    return out


def fewer(images):
    """Of the images the last, which distances between samples take no time for."""
    train, test = slice(-200, None), slice(-100, None)
    return replace(
        images,
        train=images.train[train],
        train_labels=images.train_labels[train],
        test=images.test[test],
        test_labels=images.test_labels[test],
    )


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """The classifier of an evaluation learns next to nothing, and there are few images."""
    quick, load = partial(classifier.train_classifier, num_steps=3), data.load
    monkeypatch.setattr(classifier, "train_classifier", quick)
    monkeypatch.setattr(data, "load", lambda *names, **options: fewer(load(*names, **options)))


def interrupted(module, name, at, *arguments):
    """Return the answer of a command that Ctrl-C meets at a call of a function."""
    effects = [mock.DEFAULT] * (at - 1) + [KeyboardInterrupt]
    with mock.patch.object(module, name, wraps=getattr(module, name), side_effect=effects):
        answer = invoke(*arguments)
    assert answer.exit_code == 130
    return answer


def calls_in(module, name, *arguments):
    """Return the answer of a command, and how often it called a function."""
    with mock.patch.object(module, name, wraps=getattr(module, name)) as calls:
        answer = invoke(*arguments)
    assert answer.exit_code == 0, answer.output
    return answer, calls.call_count


def test_an_interrupted_sampling_goes_on_with_the_batch_it_was_at(trained, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert invoke("sample", trained, "--out", whole, *_DRAWN).exit_code == 0

    arguments = ("sample", trained, "--out", part, *_DRAWN)
    answer = interrupted(samples, "sample", 3, *arguments)
    said = f"interrupted: kept in {part / 'unfinished' / 'sample'}: 4 of 6 images. The same command"
    assert said in answer.stderr
    assert not (part / "samples.safetensors").exists()

    answer, drawn = calls_in(samples, "sample", *arguments)
    assert "going on from 4 of 6 images" in answer.output
    assert drawn == 1
    assert_same(part, whole)
    assert json.loads((part / "samples.json").read_text())["batches_drawn_before"] == 2
    assert contents(part).keys() == {"samples.json", "samples.png", "samples.safetensors"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seed", 1), "seed was 0, now 1"),
        (("--sampler", "ddim"), "sampler was 'ddpm', now 'ddim'"),
        (("--batch-size", 3), "batch_size was 2, now 3"),
        (("--num-images", 8), "num_images was 6, now 8"),
    ],
)
def test_batches_of_other_settings_are_not_taken(trained, tmp_path, more, said):
    arguments = ("sample", trained, "--out", tmp_path / "out", *_DRAWN)
    interrupted(samples, "sample", 3, *arguments)
    answer = interrupted(samples, "sample", 1, *arguments, *more)
    assert f"removed what is in {tmp_path / 'out' / 'unfinished' / 'sample'}" in answer.output
    assert said in answer.output
    assert "going on" not in answer.output
    assert not (tmp_path / "out" / "unfinished").exists()


def test_batches_of_another_checkpoint_are_not_taken(trained, tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(trained, copy)
    interrupted(samples, "sample", 3, "sample", copy, "--out", out, *_DRAWN)
    loaded = checkpoints.load(copy)
    with torch.no_grad():
        next(loaded.learned["ml"].head.parameters()).add_(1e-3)
    checkpoints.save(loaded, copy)
    answer = invoke("sample", copy, "--out", out, *_DRAWN)
    assert "fingerprint of the checkpoint was" in answer.output


def test_a_checkpoint_that_cannot_be_written_to_is_not_called_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"CHECKPOINT .*file must be a directory to write to"):
        options.prepare_directory(tmp_path / "file", "CHECKPOINT")


def test_neither_the_device_nor_quiet_decides(trained, tmp_path):
    arguments = ("sample", trained, "--out", tmp_path, *_DRAWN)
    interrupted(samples, "sample", 2, *arguments)
    answer = invoke(*arguments[:-1], "--device", "auto" if not torch.cuda.is_available() else "cpu")
    assert "going on from 2 of 6 images" in answer.output


def test_an_interrupted_calibration_keeps_its_tables(trained, tmp_path):
    whole, part = (shutil.copytree(trained, tmp_path / name) for name in ("whole", "part"))
    assert invoke("calibrate", whole, *_FITTED).exit_code == 0
    fit = (calibrated, "fit_variance_components")
    _, all_fits = calls_in(*fit, "calibrate", whole, *_FITTED)

    answer = interrupted(*fit, all_fits, "calibrate", part, *_FITTED)
    assert f"kept in {part / 'unfinished' / 'calibrate'}: 5 of 6 tables." in answer.stderr
    assert checkpoints.load(part).calibrations == {}
    answer, fits = calls_in(*fit, "calibrate", part, *_FITTED)
    assert "going on from 5 of 6 tables" in answer.output
    assert fits == all_fits // 4  # of four covariances
    assert_same(part, whole)
    assert not (part / "unfinished").exists()


def test_an_interrupted_evaluation_keeps_its_cells(trained, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    score, draw = (scores, "noisy_prediction"), (samples, "sample")
    arguments = ("evaluate", trained, "--out", whole, *_SCORED)
    _, all_scores = calls_in(*score, *arguments)
    _, all_draws = calls_in(*draw, *arguments)
    assert (all_scores, all_draws) == (2, 8)  # two timesteps; two covariances, two samplers

    arguments = ("evaluate", trained, "--out", part, *_SCORED)
    interrupted(*score, 2, *arguments)
    interrupted(*draw, 6, *arguments)
    answer, drawn = calls_in(*draw, *arguments)
    assert "finished parts, kept in" in answer.output
    assert drawn == all_draws - 5
    assert_same(part, whole)
    assert not (part / "unfinished").exists()


def test_a_part_that_was_damaged_is_named(trained, tmp_path):
    arguments = ("sample", trained, "--out", tmp_path, *_DRAWN)
    interrupted(samples, "sample", 3, *arguments)
    file = next((tmp_path / "unfinished" / "sample").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    answer = invoke(*arguments)
    assert f"{file} is damaged" in str(answer.exception)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_greek_letters_gets_every_figure(
    trained, tmp_path, monkeypatch, encoding
):
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    arguments = ("evaluate", trained, "--out", tmp_path, "--covariance", "beta", "--num-images", 2)
    monkeypatch.setattr(sys, "argv", ["ocm", *map(str, arguments), "--steps", "2", *_SMALL])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert not end.value.code, error.buffer.getvalue()
    out.flush()
    said = out.buffer.getvalue()
    assert b"\\u03b2" in said or "β".encode() in said
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "±" in report
    assert "β" in report


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_in_one_line(trained, tmp_path, monkeypatch, number, status):
    def signalled(*arguments, **options):
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = signal.getsignal(number)
    monkeypatch.setattr(samples, "sample", signalled)
    answer = invoke("sample", trained, "--out", tmp_path, *_DRAWN)
    assert answer.exit_code == status
    assert answer.stderr.strip() == "interrupted: the same command starts again"
    assert signal.getsignal(number) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (MemoryError("Unable to allocate 9 GiB for an array"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("elements of the tensor refer to a single memory location"), False),
    ],
)
def test_too_little_memory_is_said_in_one_line(trained, tmp_path, capfd, error, is_explained):
    arguments = ("sample", trained, "--out", tmp_path, *_DRAWN)
    with mock.patch.object(samples, "sample", side_effect=error):
        if is_explained:
            assert command(capfd, *arguments) == (1, "", f"error: {error}\n")
        else:
            with pytest.raises(RuntimeError, match="a single memory location"):
                command(capfd, *arguments)


@pytest.mark.parametrize(
    ("name", "options", "size", "unwritten"),
    [
        ("sample", _DRAWN, 4096, "samples.png"),
        ("evaluate", _SCORED, 65536, "out/classifier cannot be written"),
        ("calibrate", _FITTED, 500, "tables.json"),
    ],
)
def test_a_disk_that_is_full_is_said_in_one_line(
    trained, tmp_path, capfd, name, options, size, unwritten
):
    model = shutil.copytree(trained, tmp_path / "model")
    arguments, before = (name, model, "--out", tmp_path / "out", *options), contents(model)
    with files_of_at_most(size):
        status, _, error = command(capfd, *arguments)
    assert status == 1
    said = [line for line in error.splitlines() if "Warning" not in line and line[:1] != " "]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert unwritten in said[0]
    assert_whole(tmp_path)
    assert not left_beside(tmp_path)
    assert contents(model) == before
    status, _, error = command(capfd, *arguments)
    assert status == 0, error


@pytest.fixture
def small_disk(tmp_path):
    """A folder of a file system with 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"this user may mount no file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no command mount")
def test_a_full_file_system_is_said_in_one_line(trained, small_disk, capfd):
    many = ("--num-images", 2000, "--batch-size", 400, "--steps", 1, *_SMALL)
    status, _, error = command(capfd, "sample", trained, "--out", small_disk, *many)
    assert (status, len(error.splitlines())) == (1, 1)
    assert "o space left on device" in error
    assert "from 0000" in error  # the batch
    assert_whole(small_disk)
    assert not left_beside(small_disk)


@pytest.mark.parametrize("step_counts", [[1], [2, 3]])
def test_what_an_evaluation_takes_is_counted(trained, tmp_path, step_counts):
    """The denoiser evaluates as many images as are announced."""
    loaded = checkpoints.load(trained)
    settings = EvaluationSettings(
        names=["beta", "analytic", "ml"], step_counts=step_counts, calibrated=True, quality=True,
        num_images=3, fit_images=4, num_samples=8, batch_size=2,
    )  # fmt: skip
    counts = []
    backbone = loaded.denoiser.backbone
    handle = backbone.register_forward_pre_hook(lambda module, given: counts.append(len(given[0])))
    evaluate(loaded, fewer(data.digits()), settings, tmp_path, progress=False)
    handle.remove()
    work = work_of(loaded, settings, 4)
    assert work == (sum(counts), 0)


def test_products_are_counted_for_each_image_and_timestep(trained):
    loaded = checkpoints.load(trained)
    settings = EvaluationSettings(
        names=["beta", "hutchinson", "exact", "lanczos"], step_counts=[3], quality=True,
        quality_names=["lanczos"], num_images=5, num_samples=8,
        covariances=CovarianceSettings(num_probes=7, lanczos_probes=2),
    )  # fmt: skip
    scored, drawn = 5 * 3, 2 * 8 * 3
    assert work_of(loaded, settings, 4) == (scored + drawn, scored * (7 + 64) + drawn * 2)


def test_an_evaluation_says_first_what_it_will_do(trained, tmp_path):
    arguments = ("evaluate", trained, "--out", tmp_path, "--all", *_SMALL)
    answer = interrupted(classifier, "train_classifier", 1, *arguments)
    said = " ".join(answer.output.split())
    assert (
        "bits/dim of 64 images in K = 5, 10, 25 steps (--steps) by the covariances beta, " in said
    )
    assert "256 samples for each of 12 covariances, each K and each of ddpm, ddim" in said
    assert re.search(r"[\d,]+ evaluations of the denoiser .* an estimated \d+\.\d minutes", said)
    assert "left out, unless --covariance names them: exact, full, which take 64 products" in said
    assert "from the samples hutchinson, coloring, cosine, lanczos" in said


def test_too_few_samples_for_a_distance_are_said(trained, tmp_path):
    answer = invoke("evaluate", trained, "--out", tmp_path, *_SCORED)
    assert answer.exit_code == 0, answer.output
    caution = json.loads((tmp_path / "evaluation.json").read_text())["frechet_caution"]
    assert caution.startswith("Fréchet distances in 64 features want 128 samples and images")
    assert "and there are 8 samples and 100 images" in caution
    assert answer.output.index(f"caution: {caution}") < 1000
    assert f"Caution: {caution}" in (tmp_path / "report.md").read_text(encoding="utf-8")
