"""``ocm evaluate``: bits/dim and sample quality of a checkpoint's covariances."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ocm.cli import options
from ocm.files import write_json, write_text


def evaluate(
    checkpoint: options.ModelPath,
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json and the report.")] = Path(
        "runs/evaluate"
    ),
    covariance: Annotated[
        list[options.CovarianceName] | None,
        typer.Option(
            help="Covariance to score; may be given several times. Default: all that the "
            "checkpoint can state. Those that take D products are left out for D above 1024."
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of steps K; may be given several times. Default: 5, 10, 25, 50."
        ),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Score every covariance calibrated too.")
    ] = False,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Draw samples by DDPM and DDIM, and score their Fréchet distance, precision, "
            "recall and MMD.",
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Both --calibrated and --quality.")
    ] = False,
    num_images: Annotated[int, typer.Option(min=1, help="Held-out images to score.")] = 64,
    fit_images: Annotated[
        int, typer.Option(min=2, help="Training images that calibrations are fitted to.")
    ] = 256,
    num_samples: Annotated[
        int, typer.Option(min=8, help="Samples for each figure of quality.")
    ] = 256,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Inception weights of torch-fidelity, whose features --quality compares. "
            "Default: those of a classifier that is trained on the labelled data."
        ),
    ] = None,
    decoder: Annotated[
        Literal["stated", "beta_tilde"],
        typer.Option(
            help="Variance of the last step, to x0: the covariance's own, or beta_tilde(1, 2) for "
            "all of them, as in the papers' tables."
        ),
    ] = "stated",
    likelihood: Annotated[
        Literal["bound", "ode"],
        typer.Option(
            help="bound: the variational bound of each covariance in K steps. ode: also the "
            "model's own likelihood, by the divergence of its probability-flow ODE."
        ),
    ] = "bound",
    tolerance: Annotated[
        float,
        typer.Option(help="Error of --likelihood ode for an image, in bits/dim; half takes 4x."),
    ] = 0.02,
    data: options.Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    num_probes: options.NumProbes = 8,
    lanczos_probes: options.LanczosProbes = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Score covariances on held-out images: bits/dim, and with --all sample quality.

    If the checkpoint lacks analytic variances or calibrations for these timesteps, they are fitted
    on training images. A pipeline of diffusers needs --data. Writes evaluation.json,
    report.md and evaluation.png.
    """
    from ocm.checkpoints.catalogue import CovarianceSettings, affordable
    from ocm.cli.inputs import images_for, model_at
    from ocm.evaluation.environment import environment
    from ocm.evaluation.evaluation import EvaluationSettings
    from ocm.evaluation.evaluation import evaluate as evaluated
    from ocm.evaluation.pictures import evaluation_plot

    place = options.resolve_device(device)
    options.prepare_directory(out)
    loaded = model_at(checkpoint, place)
    if loaded.x0_range is None:  # before its data are asked for a --vae
        raise ValueError(f"{checkpoint} is a model of latents, which have no grey levels to score")
    settings = EvaluationSettings(
        names=[name.value for name in covariance or []] or affordable(loaded),
        step_counts=sorted(set(steps or (5, 10, 25, 50))),
        calibrated=calibrated or everything,
        quality=quality or everything,
        num_images=num_images,
        fit_images=fit_images,
        num_samples=num_samples,
        inception=inception,
        covariances=CovarianceSettings(num_probes, lanczos_probes, seed),
        decoder=decoder,
        by_ode=likelihood == "ode",
        tolerance=tolerance,
        seed=seed,
        batch_size=batch_size,
    )
    start = time.perf_counter()
    images = images_for(loaded, data, progress=not quiet)
    loaded = replace(loaded, levels=images.levels)  # those of --data
    record, text = evaluated(loaded, images, settings, out, progress=not quiet)
    record |= {
        "checkpoint": str(checkpoint),
        "environment": environment(place),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(out / "evaluation.json", record)
    write_text(out / "report.md", f"# {checkpoint}\n\n{text}\n\n![Curves](evaluation.png)\n")
    evaluation_plot(record, out / "evaluation.png", title=f"{checkpoint}, {images.name}")
    typer.echo(text)
    typer.echo(f"\nfigures: {out / 'evaluation.json'}   picture: {out / 'evaluation.png'}")
