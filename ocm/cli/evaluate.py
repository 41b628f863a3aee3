"""``ocm evaluate``: bits/dim and sample quality of a checkpoint's covariances."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ocm.cli import configuration, lasting, options
from ocm.files import sha256, write_json, write_text


def evaluate(
    context: typer.Context,
    checkpoint: options.ModelPath,
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json and the report.")] = Path(
        "runs/evaluate"
    ),
    covariance: Annotated[
        list[options.CovarianceName] | None,
        typer.Option(
            help="Covariance to score; may be given several times. Default: all that the "
            "checkpoint can state, without those that take a product for every pixel; samples are "
            f"drawn with those that take none. {options.ALL_NAMES}",
            metavar=options.NAME,
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Number of steps K; may be given several times. Default: 5, 10, 25."
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
            exists=True,
            dir_okay=False,
            help="Inception weights of torch-fidelity, whose features --quality compares. "
            "Default: those of a classifier that is trained on the labelled data.",
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
        typer.Option(
            callback=options.finite,
            help="Error of --likelihood ode for an image, in bits/dim; half takes 4x.",
        ),
    ] = 0.02,
    data: options.Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    num_probes: options.NumProbes = 8,
    lanczos_probes: options.LanczosProbes = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: configuration.Config = None,
    quiet: options.Quiet = False,
) -> None:
    """Score covariances on held-out images: bits/dim, and with --all sample quality.

    If the checkpoint lacks analytic variances or calibrations for these timesteps, they are fitted
    on training images. A pipeline of diffusers needs --data. Writes evaluation.json,
    report.md and evaluation.png.

    Says first what it will do, and about how long that takes. What is found is kept in
    OUT/unfinished until all is: the same command goes on from there.
    """
    from ocm.checkpoints.catalogue import CovarianceSettings, affordable, num_products
    from ocm.checkpoints.held_back import held_back
    from ocm.checkpoints.unfinished import Parts, digest, fingerprint
    from ocm.cli.announcing import announcement, left_out
    from ocm.cli.inputs import images_for, model_at
    from ocm.evaluation.environment import environment
    from ocm.evaluation.evaluation import EvaluationSettings, check
    from ocm.evaluation.evaluation import evaluate as evaluated
    from ocm.evaluation.pictures import evaluation_plot

    place = options.resolve_device(device)
    options.prepare_directory(out)
    loaded = model_at(checkpoint, place)
    if loaded.x0_range is None:  # before its data are asked for a --vae
        raise ValueError(f"{checkpoint} is a model of latents, which have no grey levels to score")
    if tolerance <= 0:
        raise ValueError(f"--tolerance must be positive, in bits/dim, got {tolerance}")
    probes = CovarianceSettings(num_probes, lanczos_probes, seed)
    chosen = list(dict.fromkeys(name.value for name in covariance or []))
    names = chosen or affordable(loaded)
    settings = EvaluationSettings(
        names=names,
        step_counts=sorted(set(steps or (5, 10, 25))),
        calibrated=calibrated or everything,
        quality=quality or everything,
        quality_names=chosen or [n for n in names if num_products(n, loaded, probes) == 0],
        num_images=num_images,
        fit_images=fit_images,
        num_samples=num_samples,
        inception=inception,
        covariances=probes,
        decoder=decoder,
        by_ode=likelihood == "ode",
        tolerance=tolerance,
        seed=seed,
        batch_size=batch_size,
    )
    start = time.perf_counter()
    images = images_for(loaded, data, progress=not quiet)
    loaded = replace(loaded, levels=images.levels)  # those of --data
    check(loaded, images, settings)
    held_out = images.test[:num_images]
    x0, labels = held_back(loaded, images, fit_images)
    for line in announcement(loaded, settings, len(x0), images):
        typer.echo(line)
    left = None if chosen else left_out(loaded, settings)
    if left is not None:
        typer.echo(left)
    deciding = {
        **asdict(settings),
        "inception": None if inception is None else sha256(inception),
        "data": images.name,
        "fingerprint of the checkpoint": fingerprint(checkpoint),
        "digest of the images": digest({"test": held_out, "x0": x0, "labels": labels}),
    }

    def count(parts: Parts) -> str:
        return f"{len(parts.names())} finished parts"

    with lasting.kept_parts(out / "unfinished" / "evaluate", deciding, count) as parts:
        found = len(parts.names())
        record, text = evaluated(loaded, images, settings, out, parts=parts, progress=not quiet)
        record |= {
            "checkpoint": str(checkpoint),
            "left_out": left,
            "environment": environment(place),
            "seconds": round(time.perf_counter() - start, 1),
            "parts_finished_before": found,  # by the same command, which was interrupted
        }
        if left is not None:
            text += f"\n\n{left[0].upper()}{left[1:]}."
        configuration.record(context, out)
        write_json(out / "evaluation.json", record)
        write_text(out / "report.md", f"# {checkpoint}\n\n{text}\n\n![Curves](evaluation.png)\n")
        evaluation_plot(record, out / "evaluation.png", title=f"{checkpoint}, {images.name}")
    parts.remove()
    options.show(text)
    typer.echo(f"\nfigures: {out / 'evaluation.json'}   picture: {out / 'evaluation.png'}")
