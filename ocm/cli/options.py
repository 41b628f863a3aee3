"""Options that several commands share, and what every command does first and last."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from ocm.covariances.names import LEARNED, NAMES

if TYPE_CHECKING:
    import torch


def finite(value: float | None) -> float | None:
    """Return the value of an option, if it is finite: ranges let NaN pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


CheckpointPath = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint, as `ocm train` writes it.")
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        help="Directory of a checkpoint, as `ocm train` writes it, or of a pipeline, as "
        "save_pretrained of diffusers does (with model_index.json)."
    ),
]
Data = Annotated[str | None, typer.Option(help="Data set. Default: the checkpoint's own.")]
Vae = Annotated[
    Path | None, typer.Option(help="Folder of the AutoencoderKL, for a model of its latents.")
]
RUN = "Run"  # the part of their help that all commands have
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 2, help="Seed of all randomness.", rich_help_panel=RUN),
]
Device = Annotated[
    str,
    typer.Option(
        help="'cpu', 'cuda', 'cuda:1', ..., or 'auto': CUDA where there is one.",
        rich_help_panel=RUN,
    ),
]
NumProbes = Annotated[
    int, typer.Option(min=1, help="Probes M of 'hutchinson', 'coloring' and 'cosine'.")
]
LanczosProbes = Annotated[
    int, typer.Option(min=1, help="Products k that 'lanczos' takes for each vector.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.", rich_help_panel=RUN)]

# With a head, and all. Typer has no lists of Literals, and mypy wants the names written out here.
HeadName = Enum("HeadName", {name: name for name in LEARNED}, type=str)  # type: ignore[misc]
CovarianceName = Enum("CovarianceName", {name: name for name in NAMES}, type=str)  # type: ignore[misc]
# In help, where a choice of all names is too wide.
NAME, ALL_NAMES = "NAME", f"One of {', '.join(NAMES)}."


def resolve_device(name: str) -> torch.device:
    """Return the torch device called ``name``, with 'auto' for CUDA where there is one."""
    import os

    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # started by torchrun or accelerate
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error}") from error
    return device


def prepare_directory(path: Path, option: str = "--out") -> None:
    """Make the directory of an option, or say that it cannot be, before any work is done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"{option} {path} must be a directory to write to: {error}") from error


def show(markdown: str) -> None:
    """Print Markdown, with its tables drawn where it is a terminal that reads it."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    if console.is_terminal:
        console.print(Markdown(markdown))
    else:
        typer.echo(markdown)
