"""The command line. Each command is a module of :mod:`ocm.cli`."""

# What does the work is imported inside the commands, so that --help is quick.
from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from types import FrameType
from typing import Annotated, Any

import typer

from ocm.cli.calibrate import calibrate
from ocm.cli.evaluate import evaluate
from ocm.cli.info import info
from ocm.cli.sample import sample
from ocm.cli.train import train
from ocm.progress import end_line

app = typer.Typer(
    help=(
        "Diffusion models with the optimal covariance: train a covariance head, sample in few "
        "steps, and score likelihoods."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)

# Below the options of each command; a blank line between two keeps each on its own.
EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    train: (
        "ocm train --out runs/digits --head ml --head ocm",
        "ocm train --data FOLDER --image-size 32 --schedule flow --out runs/flow",
        "ocm train --denoiser PIPELINE --head ml --data FOLDER --out runs/heads",
        "ocm train --config runs/digits/train.toml --seed 1 --out runs/again",
        "torchrun --nproc-per-node 4 -m ocm train --data FOLDER --out runs/four",
    ),
    calibrate: (
        "ocm calibrate runs/digits",
        "ocm calibrate runs/digits --covariance coloring --num-probes 12 --steps 10",
    ),
    sample: (
        "ocm sample runs/digits --steps 10 --sampler second-order",
        "ocm sample PIPELINE --covariance coloring --num-probes 12 --steps 10",
    ),
    evaluate: (
        "ocm evaluate runs/digits --all",
        "ocm evaluate runs/digits --covariance ml --covariance beta --steps 10",
        "ocm evaluate runs/digits --likelihood ode --tolerance 0.02",
    ),
    info: ("ocm info runs/digits", "ocm info runs/digits --json"),
}


# Of Typer, or of click in versions that do not hold it themselves.
_USAGE_ERROR = typer.BadParameter.__mro__[2]


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, ending in one line at Ctrl-C (status 130) and at SIGTERM (143)."""

    @functools.wraps(command)
    def wrapped(*arguments: object, **options: object) -> None:
        caught = [signal.SIGINT]

        def terminate(number: int, frame: FrameType | None) -> None:
            caught[0] = signal.Signals(number)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, terminate)  # sent by clusters before SIGKILL
        try:
            command(*arguments, **options)
        except KeyboardInterrupt as stop:
            if os.environ.get("RANK", "0") == "0":  # the first of several processes
                end_line()
                said = str(stop) or "the same command starts again"
                typer.echo(f"\ninterrupted: {said}", err=True)
            raise typer.Exit(128 + caught[0]) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapped


for command, examples in EXAMPLES.items():
    app.command(epilog="\n\n".join(("Examples:", *examples)))(_interruptible(command))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ocm {metadata.version('hessdiag')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


def run() -> None:
    """Run the command line; what goes wrong ends in one line.

    Status 2 says that the command cannot be run as it was given: an option, a file or a checkpoint
    is not what it must be. Status 1 says that it failed on the way: a full disk, memory, a loss
    that is not finite. Ctrl-C ends in 130, SIGTERM in 143.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the terminal's encoding lacks a character, \xb1 stands for it.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(prog_name="ocm", standalone_mode=False)  # else Typer would frame its errors
    except Exception as error:
        if isinstance(error, typer.Abort):  # Ctrl-C before the command had begun
            sys.exit(128 + signal.SIGINT)
        if isinstance(error, _USAGE_ERROR):
            wrong: Any = error
            wrong.show()
            sys.exit(wrong.exit_code)
        status = _status(error)
        if status is None:
            raise
        end_line()
        typer.echo(f"error: {error}", err=True)
    sys.exit(status)


def _status(error: Exception) -> int | None:
    """Return the exit status of an error that its message explains; others show where they are."""
    wrong_use = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, wrong_use):
        return 2
    # PyTorch's errors of memory are RuntimeErrors, of a name on GPUs alone.
    lacks = ("out of memory", "tried to allocate")
    of_memory = isinstance(error, RuntimeError) and any(x in str(error).lower() for x in lacks)
    if isinstance(error, (ArithmeticError, OSError, MemoryError)) or of_memory:
        return 1
    return None
