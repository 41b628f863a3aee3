"""Every option of a command reaches what it is for; the command ends there."""

import sys
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

import ocm
from ocm import checkpoints, data
from ocm.checkpoints import fitting
from ocm.checkpoints.catalogue import CovarianceSettings
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.cli import app as cli
from ocm.diffusion.tables import Table
from ocm.evaluation import evaluation, samples
from ocm.evaluation.evaluation import EvaluationSettings
from ocm.training import workflow
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet
from ocm.training.workflow import NewDenoiser, NewHeads


def call(module, function, *arguments):
    """Invoke a command until it calls a function of a module, and return what with."""
    arguments = [*map(str, arguments), "--device", "cpu", "--quiet"]
    with mock.patch.object(module, function, side_effect=RuntimeError("reached")) as reached:
        answer = CliRunner().invoke(cli.app, arguments)
    assert reached.call_count == 1, answer.output
    return reached.call_args


def first(called, kind):
    """The first argument of a type."""
    return next(x for x in (*called.args, *called.kwargs.values()) if isinstance(x, kind))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of ten classes that has learned nothing, and 150 digits that were held back."""
    denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8, num_classes=10), ocm.cosine()).freeze()
    npr = ocm.NPR(denoiser, ocm.make_head(denoiser, "simple"))
    table = Table({1: [1.0, 0.0], 500: [1.0, 0.0], 1000: [1.0, 0.0]})
    out = tmp_path_factory.mktemp("untrained")
    made = Checkpoint(
        denoiser, (1, 8, 8), 17, "digits", {"npr": npr}, calibrations={"npr": table},
        num_calibration=150,
    )  # fmt: skip
    checkpoints.save(made, out)
    return out


def test_train(tmp_path, monkeypatch):
    installed = ModuleType("tensorboard")
    installed.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", installed)
    found = call(
        workflow, "train_checkpoint",
        "train", "--out", tmp_path, "--limit", 300, "--denoiser-steps", 7, "--head-steps", 9,
        "--batch-size", 12, "--learning-rate", 0.02, "--head-learning-rate", 0.03,
        "--accumulation", 2, "--mixed-precision", "bf16", "--flip", "--checkpoint-every", 11,
        "--workers", 1, "--seed", 5, "--width", 16, "--schedule", "flow", "--prediction-type",
        "sample", "--hold-out", 30, "--class-conditional", "--head", "sn", "--head", "npr",
        "--head-kind", "simple", "--parameterisation", "paper", "--target-probes", 3,
        "--forward-mode", "--tensorboard",
    )  # fmt: skip
    settings = TrainingSettings(
        7, 12, 0.02, seed=5, gradient_accumulation_steps=2, mixed_precision="bf16",
        horizontal_flip=True, checkpoint_every=11, num_workers=1,
    )  # fmt: skip
    assert first(found, NewDenoiser) == NewDenoiser(
        settings, width=16, schedule="flow", prediction_type="sample", hold_out=30,
        class_conditional=True,
    )  # fmt: skip
    heads = first(found, NewHeads)
    # On other noise than the denoiser, which knows its own.
    assert heads.training.seed != settings.seed
    assert heads == NewHeads(
        replace(settings, num_steps=9, learning_rate=0.03, seed=heads.training.seed),
        ("sn", "npr"), "simple", "paper", 3, forward_mode=True, seed=5,
    )  # fmt: skip
    assert len(first(found, data.Images).train) == 300
    assert found.kwargs["tensorboard"] is True


def test_calibrate(checkpoint, tmp_path):
    found = call(
        fitting, "fitted",
        "calibrate", checkpoint, "--out", tmp_path, "--covariance", "npr", "--covariance",
        "hutchinson", "--steps", 2, "--steps", 3, "--num-images", 7, "--num-probes", 6,
        "--seed", 4,
    )  # fmt: skip
    digits, own = data.digits(), slice(1350, 1357)
    _, x0, names, steps = found.args
    assert torch.equal(x0, digits.train[own])
    assert torch.equal(found.kwargs["labels"], digits.train_labels[own])
    assert list(names) == list(found.kwargs["calibrated"]) == ["npr", "hutchinson"]
    assert steps == [(0, 1), (1, 500), (1, 1000), (500, 1000)]
    assert found.kwargs["settings"] == CovarianceSettings(6, seed=4)
    assert found.kwargs["seed"] == 4


def test_evaluate(checkpoint, tmp_path):
    (tmp_path / "weights").touch()
    found = call(
        evaluation, "evaluate",
        "evaluate", checkpoint, "--out", tmp_path, "--covariance", "npr", "--covariance",
        "lanczos", "--steps", 4, "--steps", 2, "--calibrated", "--quality", "--num-images", 3,
        "--fit-images", 4, "--num-samples", 9, "--decoder", "beta_tilde", "--likelihood", "ode",
        "--tolerance", 0.5, "--batch-size", 6, "--num-probes", 5, "--lanczos-probes", 2,
        "--inception", tmp_path / "weights", "--seed", 8,
    )  # fmt: skip
    assert first(found, EvaluationSettings) == EvaluationSettings(
        ["npr", "lanczos"], [2, 4], calibrated=True, quality=True, num_images=3, fit_images=4,
        num_samples=9, inception=tmp_path / "weights", covariances=CovarianceSettings(5, 2, 8),
        decoder="beta_tilde", by_ode=True, tolerance=0.5, seed=8, batch_size=6,
        quality_names=["npr", "lanczos"],
    )  # fmt: skip


def test_evaluate_all_on_other_data(checkpoint, tmp_path, monkeypatch):
    """The grey levels are those of the data."""
    coarse = replace(data.digits(), levels=9)
    monkeypatch.setattr(data, "load", lambda *arguments, **options: coarse)
    found = call(
        evaluation, "evaluate", "evaluate", checkpoint, "--out", tmp_path, "--all", "--data", "x"
    )
    settings = first(found, EvaluationSettings)
    assert (settings.calibrated, settings.quality, settings.by_ode) == (True, True, False)
    assert first(found, Checkpoint).levels == 9


@pytest.mark.parametrize(
    ("options", "sampler"),
    [
        ((), ocm.ddpm),
        (("--sampler", "ddim"), partial(ocm.ddim, eta=0.0)),
        (("--sampler", "ddim", "--eta", 0.5), partial(ocm.ddim, eta=0.5)),
        (("--sampler", "second-order", "--eta", 0.25), ocm.SecondOrder(0.25)),
    ],
)
def test_sample(checkpoint, tmp_path, options, sampler):
    found = call(
        samples, "draw",
        "sample", checkpoint, "--out", tmp_path, "--covariance", "hutchinson", "--steps", 4,
        "--label", 3, "--label", 5, "--num-images", 6, "--last-noise", 2, "--batch-size", 5,
        "--num-probes", 7, "--lanczos-probes", 2, "--seed", 9, *options,
    )  # fmt: skip
    _, name, count, timesteps = found.args
    assert (name, count, timesteps) == ("hutchinson", 6, [250, 500, 750, 1000])
    given = found.kwargs
    if isinstance(sampler, partial):
        assert (given["sampler"].func, given["sampler"].keywords) == (ocm.ddim, sampler.keywords)
    else:
        assert given["sampler"] == sampler
    assert given["settings"] == CovarianceSettings(7, 2, 9)
    assert (given["seed"], given["first"], given["batch_size"]) == (9, 0, 5)
    assert list(given["labels"]) == [3, 5]
    # Two of 256 grey levels on average.
    assert given["max_last_noise"] == pytest.approx(4 / 255 * (torch.pi / 2) ** 0.5)


def test_sample_with_guidance_and_calibrated(checkpoint, tmp_path):
    found = call(
        samples, "draw",
        "sample", checkpoint, "--out", tmp_path, "--calibrated", "--steps", 3, "--guidance", 1.5,
        "--label", 1,
    )  # fmt: skip
    _, name, _, timesteps = found.args
    # Those that `ocm calibrate` fits.
    assert (name, timesteps) == ("npr_calibrated", [1, 500, 1000])
    assert found.kwargs["guidance_scale"] == 1.5
    assert found.kwargs["max_last_noise"] is None
