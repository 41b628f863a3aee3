"""The command line. Each command is a module of :mod:`ocm.cli`."""

# What does the work is imported inside the commands, so that --help is quick.
from __future__ import annotations

import sys

import typer

from ocm.cli.calibrate import calibrate
from ocm.cli.evaluate import evaluate
from ocm.cli.sample import sample
from ocm.cli.train import train

app = typer.Typer(
    help=(
        "Diffusion models with the optimal covariance: train a covariance head, sample in few "
        "steps, and score likelihoods."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (train, calibrate, sample, evaluate):
    app.command()(command)


def run() -> None:
    """Run the command line; an error of input or arithmetic ends in one line and status 2."""
    try:
        app(prog_name="ocm")
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
