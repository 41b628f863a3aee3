"""The command line. Each command is a module of :mod:`ocm.commands`."""

# What does the work is imported inside the commands, so that --help is quick.
from __future__ import annotations

import sys

import typer

from ocm.commands.calibrate import calibrate
from ocm.commands.demo import demo
from ocm.commands.evaluate import evaluate
from ocm.commands.sample import sample
from ocm.commands.toy import toy
from ocm.commands.train import train

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
for command in (train, calibrate, sample, evaluate, demo, toy):
    app.command()(command)


def run() -> None:
    """Run the command line; an error of input or arithmetic ends in one line and status 2."""
    try:
        app(prog_name="ocm")
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
