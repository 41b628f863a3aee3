"""``ocm toy``: every covariance on mixtures of Gaussians, where the true one is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ocm.commands.options import (
    Device,
    Quiet,
    Seed,
    prepare_directory,
    resolve_device,
    write_json,
)


def toy(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("runs/toy"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and points: shows that it runs.")
    ] = False,
    num_seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds, each a run. Default: 5; with --quick 1.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Compare every covariance on mixtures of Gaussians, where the true one is known.

    Errors by noise level with the true and with a learned score, samples in few steps, and what a
    score that errs, the diagonal alone and another backbone cost. Takes ten minutes on two cores,
    with --quick one. Writes toy.json, report.md and three pictures.
    """
    from dataclasses import replace

    from ocm.toy.experiment import run
    from ocm.toy.plots import draw
    from ocm.toy.report import tables
    from ocm.toy.settings import QUICK, ToySettings

    place = resolve_device(device)
    prepare_directory(out)
    settings = QUICK if quick else ToySettings()
    count = num_seeds or len(settings.seeds)
    settings = replace(settings, seeds=tuple(range(seed, seed + count)))
    record = run(settings, place, progress=not quiet)
    write_json(out / "toy.json", record)
    pictures = draw(record, out)
    text = tables(record)
    shown = "\n\n".join(f"![{file.stem}]({file.name})" for file in pictures)
    (out / "report.md").write_text(f"# Covariances on mixtures of Gaussians\n\n{text}\n\n{shown}\n")
    typer.echo(text)
    typer.echo(f"\nfigures: {out / 'toy.json'}   pictures: {', '.join(map(str, pictures))}")
