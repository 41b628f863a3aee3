"""Train a denoiser and covariance heads on real digits, and see what they give.

    python examples/demo.py [--quick] [--out runs/demo]

Takes seven minutes on two cores. Writes ``metrics.json``, ``report.md``, ``likelihood.png``,
``maps.png``, ``samples.png`` and the checkpoint, from which ``ocm sample`` and ``ocm evaluate`` go
on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import ocm
from ocm import data
from ocm.checkpoints import Checkpoint, save
from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.cli.options import Device, Quiet, Seed, prepare_directory, resolve_device
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.names import label
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import SCHEDULES
from ocm.evaluation.environment import environment
from ocm.evaluation.maps import draw_maps
from ocm.evaluation.markdown import likelihood_markdown
from ocm.evaluation.pictures import evaluation_plot, sample_rows
from ocm.evaluation.scores import likelihood_record, likelihood_table
from ocm.progress import tracked
from ocm.training.loop import mean_of_last
from ocm.training.small_unet import small_unet

_SAMPLES_PER_ROW = 12
_IMAGES_OF_MAPS = 4
# Covariances of the table, and those that it shows calibrated too.
_ROWS = ("beta", "coloring", "ocm", "ml")
_CALIBRATED = ("coloring", "ocm")
# Where calibrations are fitted; between them they are interpolated.
_LEVELS = (1, 21, 42, 80, 125, 200, 250, 334, 445, 500, 600, 700, 750, 850, 950, 1000)

# Sizes at which every line runs in seconds, and the figures mean nothing.
QUICK: dict[str, Any] = {
    "denoiser_steps": 20,
    "head_steps": 10,
    "num_images": 2,
    "num_calibration": 8,
    "step_counts": (3, 5),
    "sample_steps": 2,
    "map_timesteps": (500,),
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults take seven minutes on two cores.

    Attributes:
        denoiser_steps: Optimiser steps of the denoiser.
        head_steps: Optimiser steps of each head.
        num_images: Held-out images that are scored.
        num_calibration: Training images that only calibrations see.
        step_counts: Numbers of reverse steps K of the bound.
        sample_steps: Number of reverse steps of the samples that are drawn.
        map_timesteps: Noise levels of the uncertainty maps.
        num_probes: Products M of the coloring.
        schedule: Noise schedule.
        seed: Seed of everything.
    """

    denoiser_steps: int = 900
    head_steps: int = 800
    num_images: int = 64
    num_calibration: int = 150
    step_counts: tuple[int, ...] = (5, 10, 25, 50)
    sample_steps: int = 5
    map_timesteps: tuple[int, ...] = (250, 500)
    num_probes: int = 12
    schedule: str = "cosine"
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        metrics: Every figure, as in ``metrics.json``.
        summary: The tables, in Markdown.
    """

    metrics: dict[str, Any]
    summary: str


def run(
    out: str | Path,
    settings: DemoSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> DemoResult:
    """Train, score and draw.

    Writes ``metrics.json``, ``report.md``, three pictures and the trained checkpoint,
    ``checkpoint/``, to the directory ``out``.
    """
    settings = settings or DemoSettings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages()

    images = data.digits()
    shown, kept_back = (
        images.train[: -settings.num_calibration],
        images.train[-settings.num_calibration :],
    )
    denoiser = Denoiser(
        small_unet(images.shape, seed=settings.seed).to(device),
        SCHEDULES[settings.schedule](1000),
    )
    training = ocm.TrainingSettings(settings.denoiser_steps, seed=settings.seed)
    losses = {"denoiser": ocm.train_denoiser(denoiser, shown, training, progress=progress)}
    stages.end("train denoiser")

    # Another seed: the heads see other noisy images than those the denoiser was fitted to.
    training = ocm.TrainingSettings(settings.head_steps, learning_rate=3e-3, seed=settings.seed + 1)
    learned: dict[str, LearnedCovariance] = {
        "ocm": ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser, "residual")),
        "ml": ocm.MaximumLikelihood(
            denoiser, ocm.make_head(denoiser, "residual"), levels=images.levels
        ),
    }
    for name, covariance in learned.items():
        losses[name] = ocm.train_head(
            covariance, shown, training, name=label(name), progress=progress
        )
    stages.end("train heads")

    checkpoint = Checkpoint(
        denoiser,
        images.shape,
        images.levels,
        images.name,
        learned=learned,
        num_calibration=settings.num_calibration,
    )
    probes = CovarianceSettings(settings.num_probes, seed=settings.seed)
    calibrations = {
        name: ocm.calibrate(
            denoiser,
            build_covariance(name, checkpoint, probes),
            kept_back,
            _LEVELS,
            seed=settings.seed,
            label=f"calibration of {label(name)}",
            progress=progress,
        ).weights
        for name in _CALIBRATED
    }
    checkpoint = replace(checkpoint, calibrations=calibrations)
    save(checkpoint, out / "checkpoint")
    stages.end("calibrate")

    table = likelihood_table(
        checkpoint,
        images.test[: settings.num_images],
        list(_ROWS),
        settings.step_counts,
        calibrated=_CALIBRATED,
        settings=probes,
        seed=settings.seed,
        progress=progress,
    )
    stages.end("bits/dim")

    record = likelihood_record(table)
    title = f"scikit-learn's digits, {settings.schedule} schedule, N = 1000"
    evaluation_plot(record, out / "likelihood.png", title=title)
    maps = [
        ocm.uncertainty(
            denoiser,
            t,
            covariance=learned["ml"],
            image=images.test[:_IMAGES_OF_MAPS],
            seed=settings.seed,
        )
        for t in settings.map_timesteps
    ]
    draw_maps(
        maps, out / "maps.png", title="What the likelihood head knows of its denoiser's errors"
    )
    sample_rows(
        _sample_rows(checkpoint, images, settings, progress),
        out / "samples.png",
        title=f"DDPM samples in {settings.sample_steps} steps, by covariance, from the same noise",
    )
    stages.end("pictures")

    metrics = {
        **record,
        "final_loss": {name: mean_of_last(values) for name, values in losses.items()},
        "settings": asdict(settings),
        "data": images.name,
        "seconds": stages.seconds,
        "environment": environment(denoiser.device),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    summary = (
        f"Bits/dim of {settings.num_images} held-out digits in K reverse steps, lower is better\n\n"
        f"{likelihood_markdown(table, settings.step_counts)}\n"
    )
    (out / "report.md").write_text(_report(settings, summary, stages.seconds))
    return DemoResult(metrics, summary)


class _Stages:
    """Seconds of each stage, from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def _sample_rows(
    checkpoint: Checkpoint, images: data.Images, settings: DemoSettings, progress: bool
) -> dict[str, Tensor]:
    rows = {"held-out": images.test[:_SAMPLES_PER_ROW]}
    for name in tracked(("beta", "beta_tilde", "ml"), "samples", "rows", shown=progress):
        rows[label(name)] = ocm.sample(
            checkpoint.denoiser,
            build_covariance(name, checkpoint),
            (_SAMPLES_PER_ROW, *images.shape),
            settings.sample_steps,
            seed=settings.seed,
        )
    return rows


def _report(settings: DemoSettings, summary: str, seconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"""# Optimal covariance on handwritten digits

{summary}
A diffusion model samples and scores images in K steps, and each step needs the variance of the
image behind the noisy one. DDPM's β is the same for every pixel; a head states a variance for each
pixel, at the cost of a small convolution a step. The likelihood head is trained on the bound of
the K steps themselves, so that it counts what its denoiser has not learned. The coloring needs no
training and {settings.num_probes} Jacobian products a step; like OCM's head it assumes a denoiser
without errors, and a calibration, two numbers a timestep, makes up for a part of them. In the maps
the head is unsure where the digit's strokes could be, which is where the denoised mean errs.

![Bits/dim against the number of steps](likelihood.png)

![Noisy digits, denoised means, uncertainty maps and errors](maps.png)

![Samples of {settings.sample_steps} steps](samples.png)

The denoiser is a U-Net of 0.63 million parameters, trained for {settings.denoiser_steps} steps on
scikit-learn's 8x8 digits, and each head for {settings.head_steps}. The bound takes evenly spaced
steps of N = 1000 ({settings.schedule} schedule), and every cell scores the same noisy images.
Time: {times}. Seed {settings.seed}.
"""


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and images: shows that it runs.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a denoiser and covariance heads on real digits, and see what they give."""
    place = resolve_device(device)
    prepare_directory(out)
    settings = DemoSettings(seed=seed, **(QUICK if quick else {}))
    result = run(out, settings, device=place, progress=not quiet)
    typer.echo(result.summary)
    typer.echo(f"report with pictures: {out / 'report.md'}   checkpoint: {out / 'checkpoint'}")


if __name__ == "__main__":
    typer.run(demo)
