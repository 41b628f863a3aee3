"""The CIFAR-10 experiment: its parts against other computations, and all of it in small."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cifar10 import commands, experiment, figures, report
from cifar10 import evaluation as cifar10_evaluation
from cifar10 import training as cifar10_training
from cifar10.backbone import attention_unet
from cifar10.parts import Parts
from cifar10.sizes import FULL, QUICK, REDUCED
from cifar10.training import ByteImages
from cifar10_worker import describe
from harness.budget import forward_passes
from harness.timing import Setting
from PIL import Image
from suites import cifar10 as suite

import ocm
from ocm import checkpoints
from ocm.checkpoints.fitting import fitted
from ocm.covariances.names import LEARNED
from ocm.training.small_unet import small_unet

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"


# The backbone


def test_the_backbone_of_the_full_size_has_10_million_parameters_and_heads():
    unet = attention_unet((3, 32, 32))
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1e7, rel=0.01)
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    prediction = denoiser.predict(torch.randn(1, 3, 32, 32), 7)
    head = ocm.make_head(denoiser, "residual")
    assert head(prediction.features).shape == (1, 3, 32, 32)
    assert attention_unet((3, 32, 32)).conv_in.weight.equal(unet.conv_in.weight)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 30, 32), {}, "multiples of 4 for 3 widths, got"),
        ((3, 32, 32), {"widths": (32, 40)}, r"multiples of 32, .* got \(32, 40\)"),
        ((3, 32, 32), {"attention_sizes": (10,)}, r"heights \[32, 16, 8\] .* got \(10,\)"),
    ],
)
def test_backbones_that_cannot_be(shape, options, message):
    with pytest.raises(ValueError, match=message):
        attention_unet(shape, **options)


def test_files_of_the_full_checkpoint_are_at_most_15_megabytes(tmp_path):
    denoiser = ocm.Denoiser(attention_unet((3, 32, 32)), ocm.cosine()).freeze()
    learned = {"ocm": cifar10_training.untrained("ocm", denoiser, FULL)}
    checkpoint = checkpoints.Checkpoint(denoiser, (3, 32, 32), 256, "cifar10", learned)
    checkpoints.save(checkpoint, tmp_path, dtype=torch.float16)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    assert max(sizes) <= 15e6
    assert 19e6 < sum(sizes) < 25e6


# Images in memory


@pytest.mark.parametrize("index", [slice(1, 4), torch.tensor([5, 0, 0]), 3, slice(None)])
def test_bytes_index_as_the_float_tensor_does(index):
    pixels = torch.randint(256, (6, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    images = ByteImages(pixels.to(torch.uint8))
    torch.testing.assert_close(
        images[index], (-1 + 2 * pixels.double() / 255)[index].float(), rtol=0, atol=1e-7
    )
    assert (len(images), images.shape) == (6, (6, 3, 4, 5))


# Parts


def test_a_part_is_made_once_and_again_for_other_settings(tmp_path, capsys):
    made = []

    def make():
        made.append(1)
        return {"rows": (1, 2)}

    parts = Parts(tmp_path, "linear-", {"checkpoint": "abc"})
    for _ in range(2):
        assert parts.get("x", make, steps=(5, 10)) == {"rows": [1, 2]}
    assert len(made) == 1
    parts.get("x", make, steps=(5,))
    Parts(tmp_path, "linear-", {"checkpoint": "other"}).get("x", make, steps=(5,))
    assert len(made) == 3
    said = capsys.readouterr().out
    assert said.count("linear-x: made before") == 1
    assert said.count("linear-x: of other settings, made again") == 2
    assert list(parts.seconds()) == ["linear-x"]


def test_a_part_that_fails_leaves_nothing(tmp_path):
    parts = Parts(tmp_path, "", {})
    with pytest.raises(ZeroDivisionError):
        parts.get("x", lambda: 1 / 0)
    with pytest.raises(ValueError, match="JSON"):  # a NaN is no result
        parts.get("x", lambda: float("nan"))
    assert parts.get("x", lambda: 3) == 3


# Fits and likelihood


@pytest.fixture(scope="module")
def checkpoint():
    denoiser = ocm.Denoiser(small_unet((3, 8, 8), width=8), ocm.cosine()).freeze()
    learned = {}
    for seed, name in enumerate(LEARNED):
        learned[name] = cifar10_training.untrained(name, denoiser, QUICK)
        generator = torch.Generator().manual_seed(seed)
        for parameter in learned[name].head.requires_grad_(False).parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return checkpoints.Checkpoint(denoiser, (3, 8, 8), 256, "noise", learned)


@pytest.fixture(scope="module")
def images():
    pixels = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return ByteImages(pixels.to(torch.uint8))[:]


def test_fits_of_one_pass_are_those_of_the_library(checkpoint, images):
    steps = [(0, 1), (1, 500), (200, 500), (500, 1000)]
    expected = fitted(checkpoint, images, ["analytic"], steps, calibrated=list(checkpoint.learned))
    with forward_passes(checkpoint.denoiser.backbone) as counted:
        found = cifar10_evaluation.fits(checkpoint, images, 500, [200, 1], True)
    assert counted == [1]
    assert (
        found["analytic"] == expected.analytic["analytic"].scaled_variances.at(None, 500).tolist()
    )
    for name in ("npr", "sn", "ocm"):
        assert found[name] == expected.calibrations[name].at(None, 500).tolist()
    assert found["iddpm"] == {
        s: expected.calibrations["iddpm"].at(s, 500).tolist() for s in (1, 200)
    }
    rest = cifar10_evaluation.fits(checkpoint, images, 500, [], False)
    assert rest == {"analytic": found["analytic"]}


def test_a_remembering_denoiser_forgets_when_x_t_or_t_changes(checkpoint):
    plain = checkpoint.denoiser
    denoiser = cifar10_evaluation.RememberingDenoiser(plain.backbone, plain.schedule)
    x, y = torch.randn(2, 2, 3, 8, 8)
    for x_t, t, offset in ((x, 5, 0), (x, 5, 0), (y, 5, 0), (y, 6, 0), (y, 6, 2), (x, 5, 0)):
        found = denoiser.predict(x_t, t, sample_offset=offset)
        assert found.output.equal(plain.predict(x_t, t).output)
        assert found.sample_offset == offset
    with forward_passes(plain.backbone) as counted:
        assert denoiser.predict(x.clone(), 5).output.equal(found.output)
        assert denoiser.predict(y, 5).output.shape == y.shape
    assert counted == [1]


def test_differences_to_ocm_are_paired():
    groups = [
        {
            "npr": {"5": 1.0 + i},
            "ocm": {"5": 1.5 + i},
            "npr_calibrated": {"5": 0.9 + 2 * i},
            "ocm_calibrated": {"5": 0.5 + i},
        }
        for i in range(4)
    ]
    rows = cifar10_evaluation.likelihood_rows(groups, [5], 8)
    found = {(row["covariance"], row["calibrated"]): row for row in rows}
    spread = torch.arange(4.0).double().std().item() / 2
    plain, calibrated = found["npr", False], found["npr", True]
    assert plain["bits_per_dim"] == 2.5
    assert plain["standard_error"] == pytest.approx(spread)
    assert (plain["minus_ocm"], plain["num_images"]) == (-0.5, 32)
    assert plain["minus_ocm_standard_error"] == pytest.approx(0, abs=1e-12)
    assert calibrated["minus_ocm"] == pytest.approx(0.4 + 1.5)
    assert calibrated["minus_ocm_standard_error"] == pytest.approx(spread)


def claimed(*differences):
    rows = [
        {
            "schedule": "linear",
            "covariance": name,
            "calibrated": calibrated,
            "K": K,
            "minus_ocm": difference,
            "minus_ocm_standard_error": 0.01,
        }
        for name, calibrated, K, difference in differences
    ]
    return report.claims({"rows": rows})


def test_cells_where_ocm_is_above_are_named():
    others = [("beta", False, 10, -9.0), ("npr", False, 50, -9.0), ("sn", False, 25, 3.0)]
    assert "at or below the other in 1 of 1 cells; there is none" in claimed(*others)
    said = claimed(*others, ("npr", False, 10, -0.015), ("iddpm", True, 25, -0.03))
    assert "in 1 of 3 cells. Above in:" in said
    assert "- linear, K = 10, NPR head: OCM is above by 0.0150 ± 0.0100, a tie within two" in said
    assert "K = 25, I-DDPM head, calibrated: OCM is above by 0.0300 ± 0.0100, more than" in said
    assert claimed(("npr", False, 50, -9.0)) == "No K of 10 or 25 was scored."


def test_what_was_tried_is_read_from_its_record(monkeypatch, tmp_path):
    recorded = json.loads((RESULTS / "cifar10.json").read_text())
    tried = json.loads((RESULTS / "cifar10_tried.json").read_text())
    tried["rows"][0]["K = 10"] = 1.23456
    monkeypatch.setattr(report, "_TRIED", tmp_path / "tried.json")
    (tmp_path / "tried.json").write_text(json.dumps(tried))
    assert "| analytic | none |  | 0.0 | 0 | 1.2346 | 5.5100 |" in report.tables(recorded)


# All of it


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of noise in the layout of CIFAR-10's parquet files."""
    from datasets import Dataset

    directory = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 100), ("test", 90)):
        pixels = torch.randint(256, (count, 32, 32, 3), generator=generator).to(torch.uint8)
        rows = {"image": [encoded(p) for p in pixels], "label": [i % 10 for i in range(count)]}
        Dataset.from_dict(rows).to_parquet(directory / f"{split}.parquet")
    return directory


@pytest.fixture(scope="module")
def work(data, tmp_path_factory):
    """Both schedules trained in the quick size, the linear one after it was interrupted."""
    directory = tmp_path_factory.mktemp("work")

    class Stopped(Exception):  # noqa: N818, of no error
        pass

    plain = cifar10_training.untrained

    def interrupted(name, denoiser, size):
        if name == "sn":
            raise Stopped
        return plain(name, denoiser, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10_training, "untrained", interrupted)
        with pytest.raises(Stopped):
            cifar10_training.train_schedule("linear", directory, data, QUICK, CPU)
    assert not (directory / "linear" / "train.json").exists()
    for schedule in ("linear", "cosine"):
        cifar10_training.train_schedule(schedule, directory, data, QUICK, CPU)
    return directory


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    data, work, tmp_path, monkeypatch
):
    trained_on = []
    plain = cifar10_training.untrained

    def watched(name, denoiser, size):
        trained_on.append({k: v.clone() for k, v in denoiser.backbone.state_dict().items()})
        return plain(name, denoiser, size)

    monkeypatch.setattr(cifar10_training, "untrained", watched)
    cifar10_training.train_schedule("linear", tmp_path, data, QUICK, CPU)
    one, other = (checkpoints.load(path / "linear" / "checkpoint") for path in (work, tmp_path))
    assert list(one.learned) == ["iddpm", "npr", "sn", "ocm"]
    assert one.num_calibration == QUICK.num_validation
    pairs = [(one.denoiser.backbone, other.denoiser.backbone)]
    pairs += [(one.learned[name].head, other.learned[name].head) for name in one.learned]
    for a, b in pairs:
        for name, weight in a.state_dict().items():
            assert weight.equal(b.state_dict()[name]), name
    # What every head was trained on is what is stored.
    for name, weight in one.denoiser.backbone.state_dict().items():
        assert all(weight.equal(weights[name]) for weights in trained_on), name
    assert len(trained_on) == 4
    assert not list((work / "linear" / "training").rglob("*.safetensors"))


def test_a_training_of_other_settings_is_refused(data, work):
    other = replace(QUICK, heads=replace(QUICK.heads, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"linear/train.json is of other settings .* --work"):
        cifar10_training.train_schedule("linear", work, data, other, CPU)


@pytest.mark.soak
def test_the_whole_evaluation_and_its_pictures(data, work, tmp_path, capsys):
    options = ["--data", str(data), "--work", str(work), "--size", "quick"]
    commands.main(["evaluate", *options, "--out", str(tmp_path)])
    first = json.loads((tmp_path / "cifar10.json").read_text())
    rows = {(r["schedule"], r["covariance"], r["calibrated"], r["K"]) for r in first["rows"]}
    assert len(rows) == len(first["rows"]) == 2 * 2 * (7 + 4)
    assert {row["num_images"] for row in first["rows"]} == {QUICK.num_scored}
    assert len(first["quality"]) == 2 * (4 + 2)
    assert {row["schedule"] for row in first["equal_evaluations"]} == {"linear", "cosine"}
    assert {row["covariance"] for row in first["costs"]} >= {"beta_tilde", "iddpm", "sn", "ocm"}
    text = (tmp_path / "cifar10.md").read_text()
    assert "JPEG of quality 75" in text.splitlines()[0]
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert {"cifar10.png", "cifar10_linear.png", "cifar10_cosine_ddim_3.png"} <= pictures

    # Killed after most of it: what is finished is not made again, and comes out the same.
    (work / "parts" / "cosine-samples-ddim-3.json").unlink()
    capsys.readouterr()
    again = experiment.evaluate(work, data, QUICK, CPU)
    said = capsys.readouterr().out
    assert said.count("made before") == len(list((work / "parts").glob("*.json"))) - 1
    for name in ("rows", "costs", "equal_evaluations", "features", "training"):
        assert again[name] == first[name], name
    frechet = [[row["frechet"] for row in record["quality"]] for record in (first, again)]
    assert frechet[0] == frechet[1]

    # Another training's parts are made again.
    other = Parts(work / "parts", "linear-", {"checkpoint": "", "device": "cpu"})
    assert other.get("likelihood-0", lambda: 1) == 1


def test_samples_of_another_record_are_not_drawn(work, tmp_path, capsys):
    row = {"schedule": "linear", "sampler": "ddpm", "K": 3, "covariance": "ocm", "frechet": 1.0}
    figures.plot_samples({"quality": [row]}, work, tmp_path / "x.png")
    assert "is not of this record" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_cifar10_there_is_an_error_that_says_where_it_goes(tmp_path):
    message = r"data must be a directory with train.parquet and .* has no train.parquet; put them"
    with pytest.raises(ValueError, match=message):
        suite.run(Setting(CPU, True, tmp_path))
    with pytest.raises(SystemExit, match=message):
        commands.main(
            ["train", "--schedule", "linear", "--work", str(tmp_path), "--data", str(tmp_path)]
        )


def test_an_evaluation_before_training_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"work must hold linear/train.json, .* run `python bench"):
        experiment.evaluate(tmp_path, data, QUICK, CPU)


@pytest.mark.parametrize("size", [FULL, REDUCED, QUICK])
def test_sizes_fit_themselves(size):
    """No image is fitted to twice, and groups are whole."""
    assert size.num_scored % size.group == 0
    assert size.num_fit + size.num_chosen_on <= size.num_validation
    assert size.fit_spacing > 1
    assert size.heads.seed != size.denoiser.seed
    if size is not QUICK:
        assert {10, 25} <= set(size.step_counts)
        assert size.step_counts == (5, 10, 25, 50, 100, 200)


def test_both_schedules_are_run_side_by_side_on_a_cpu(tmp_path):
    found = experiment.over_schedules(describe, tmp_path, tmp_path, REDUCED, CPU)
    assert [row["schedule"] for row in found] == ["linear", "cosine"]
    assert {row["threads"] for row in found} == {1}
    assert os.getpid() not in {row["process"] for row in found}
    alone = experiment.over_schedules(describe, tmp_path, tmp_path, QUICK, CPU)
    assert {row["process"] for row in alone} == {os.getpid()}
