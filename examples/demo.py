"""Train a denoiser and its covariance head on real digits, and compare the covariances.

    python examples/demo.py [--quick] [--out runs/demo]

Takes six minutes on two cores. Writes ``metrics.json``, ``report.md``, ``samples.png``,
``likelihood.png`` and the checkpoint, from which ``ocm sample`` and ``ocm evaluate`` go on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from ocm import data
from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint, save
from ocm.cli.options import Device, Quiet, Seed, prepare_directory, resolve_device
from ocm.covariances import OptimalCovarianceMatching
from ocm.covariances.learned.heads import make_head
from ocm.covariances.names import label
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.schedules import SCHEDULES
from ocm.evaluation.environment import environment
from ocm.evaluation.markdown import likelihood_markdown, table_of_lines
from ocm.evaluation.pictures import evaluation_plot, sample_rows
from ocm.evaluation.scores import likelihood_record, likelihood_table
from ocm.sampling.samplers import X0_RANGE, sample
from ocm.training.loop import mean_of_last
from ocm.training.objectives import train_denoiser, train_head
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet

_SAMPLES_PER_ROW = 12
_COVARIANCES = ("beta", "beta_tilde", "ocm", "hutchinson", "exact")

# Sizes at which every line runs in seconds, and the figures mean nothing.
QUICK: dict[str, Any] = {
    "denoiser_steps": 20,
    "head_steps": 10,
    "num_images": 2,
    "step_counts": (3, 5),
    "sample_steps": 2,
    "error_timesteps": (500,),
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults take six minutes on two cores.

    Attributes:
        denoiser_steps: Optimiser steps of the denoiser.
        head_steps: Optimiser steps of the head.
        num_images: Held-out images that are scored.
        step_counts: Numbers of reverse steps K of the bound.
        sample_steps: Number of reverse steps of the samples that are drawn.
        error_timesteps: Noise levels at which the variances are compared with the exact one.
        num_probes: Probes M of the Hutchinson covariance.
        schedule: Noise schedule.
        seed: Seed of everything.
    """

    denoiser_steps: int = 900
    head_steps: int = 400
    num_images: int = 64
    step_counts: tuple[int, ...] = (5, 10, 25, 50)
    sample_steps: int = 10
    error_timesteps: tuple[int, ...] = (5, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
    num_probes: int = 8
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

    Writes ``metrics.json``, ``report.md``, ``samples.png``, ``likelihood.png`` and the trained
    checkpoint, ``checkpoint/``, to the directory ``out``.
    """
    settings = settings or DemoSettings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages()

    images = data.digits()
    denoiser = Denoiser(
        small_unet(images.shape, seed=settings.seed).to(device),
        SCHEDULES[settings.schedule](1000),
    )
    training = TrainingSettings(settings.denoiser_steps, seed=settings.seed)
    denoiser_losses = train_denoiser(denoiser, images.train, training, progress=progress)
    stages.end("train denoiser")

    covariance = OptimalCovarianceMatching(denoiser, make_head(denoiser))
    # Another seed: the head sees other noisy images than those the denoiser was fitted to.
    training = TrainingSettings(settings.head_steps, learning_rate=1e-2, seed=settings.seed + 1)
    head_losses = train_head(covariance, images.train, training, progress=progress)
    checkpoint = Checkpoint(
        denoiser, images.shape, images.levels, images.name, learned={"ocm": covariance}
    )
    save(checkpoint, out / "checkpoint")
    stages.end("train head")

    held_out = images.test[: settings.num_images]
    probes = CovarianceSettings(settings.num_probes, seed=settings.seed)
    table = likelihood_table(
        checkpoint,
        held_out,
        list(_COVARIANCES),
        settings.step_counts,
        settings=probes,
        seed=settings.seed,
        progress=progress,
    )
    stages.end("bits/dim")
    errors = _variance_errors(checkpoint, held_out, settings, progress)
    stages.end("variance error")

    record = likelihood_record(table) | {"variance_relative_rms_error": errors}
    title = f"scikit-learn's digits, {settings.schedule} schedule, N = 1000"
    evaluation_plot(record, out / "likelihood.png", title=title)
    sample_rows(
        _sample_rows(checkpoint, images, settings, progress),
        out / "samples.png",
        title=f"DDPM samples in {settings.sample_steps} steps, by covariance",
    )
    stages.end("samples")

    metrics = {
        **record,
        "final_loss": {
            "denoiser": mean_of_last(denoiser_losses),
            "head": mean_of_last(head_losses),
        },
        "settings": asdict(settings),
        "data": images.name,
        "seconds": stages.seconds,
        "environment": environment(denoiser.device),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    summary = _summary(
        settings,
        likelihood_markdown(table, settings.step_counts),
        table_of_lines(
            "covariance",
            [f"t = {t}" for t in settings.error_timesteps],
            {label(name): [f"{row[t]:.3f}" for t in row] for name, row in errors.items()},
        ),
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


@torch.no_grad()
def _variance_errors(
    checkpoint: Checkpoint, x0: Tensor, settings: DemoSettings, progress: bool
) -> dict[str, dict[int, float]]:
    """Return each covariance's error against the exact diagonal, at each noise level.

    The error is the root mean square of Var - Var_exact over that of Var_exact, over images and
    pixels, with both variances bounded as samplers do.
    """
    probes = CovarianceSettings(settings.num_probes, seed=settings.seed)
    errors: dict[str, dict[int, float]] = {name: {} for name in ("beta", "ocm", "hutchinson")}
    for t in tqdm(settings.error_timesteps, "variance error", unit="t", disable=not progress):
        prediction = noisy_prediction(checkpoint.denoiser, x0, t, settings.seed)
        variances = {
            name: build_covariance(name, checkpoint, probes)
            .at(prediction)
            .bounded(X0_RANGE)
            .diagonal()
            # First the exact one, which keeps the graph that other products go through.
            for name in ("exact", *errors)
        }
        exact = variances["exact"]
        for name, row in errors.items():
            error = (variances[name] - exact).square().mean() / exact.square().mean()
            row[t] = error.sqrt().item()
    return errors


def _sample_rows(
    checkpoint: Checkpoint, images: data.Images, settings: DemoSettings, progress: bool
) -> dict[str, Tensor]:
    probes = CovarianceSettings(settings.num_probes, seed=settings.seed)
    rows = {"held-out": images.test[:_SAMPLES_PER_ROW]}
    for name in tqdm(_COVARIANCES, "samples", disable=not progress):
        rows[label(name)] = sample(
            checkpoint.denoiser,
            build_covariance(name, checkpoint, probes),
            (_SAMPLES_PER_ROW, *images.shape),
            settings.sample_steps,
            seed=settings.seed,
        )
    return rows


def _summary(settings: DemoSettings, likelihood: str, variance_error: str) -> str:
    return f"""\
Bits/dim on {settings.num_images} held-out images, ± the standard error over images

{likelihood}

Relative RMS error of Var[x0 | x_t] against the exact diagonal, by timestep

{variance_error}
"""


def _report(settings: DemoSettings, summary: str, seconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"""# Optimal covariance on handwritten digits

A U-Net of 0.63 million parameters, trained for {settings.denoiser_steps} steps on 1,500 of
scikit-learn's 8x8 digits, and its OCM head, trained for {settings.head_steps} steps. The bound
takes K evenly spaced steps of N = 1000 ({settings.schedule} schedule), and every cell scores the
same noisy images. Hutchinson draws M = {settings.num_probes} probes at every step, the exact
diagonal costs D = 64 products, the OCM head none.

{summary}
![Bits/dim against the number of steps, and the variance's error](likelihood.png)

![Samples](samples.png)

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
    """Train a denoiser and its OCM head on real digits, and compare the covariances."""
    place = resolve_device(device)
    prepare_directory(out)
    settings = DemoSettings(seed=seed, **(QUICK if quick else {}))
    result = run(out, settings, device=place, progress=not quiet)
    typer.echo(result.summary)
    typer.echo(f"report: {out / 'report.md'}   pictures: {out / 'samples.png'}")


if __name__ == "__main__":
    typer.run(demo)
