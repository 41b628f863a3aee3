"""``ocm demo``: train on real digits and compare, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ocm.cli.options import Device, Quiet, Seed, prepare_directory, resolve_device


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and images: shows that it runs.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a denoiser and its OCM head on real digits, and compare the covariances.

    Takes six minutes on two cores. Writes metrics.json, report.md, samples.png,
    likelihood.png and the checkpoint.
    """
    from ocm.cli.demonstration import QUICK, DemoSettings, run

    place = resolve_device(device)
    prepare_directory(out)
    settings = DemoSettings(seed=seed, **(QUICK if quick else {}))
    result = run(out, settings, device=place, progress=not quiet)
    typer.echo(result.summary)
    typer.echo(f"report: {out / 'report.md'}   pictures: {out / 'samples.png'}")
