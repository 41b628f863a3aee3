"""CIFAR-10: a denoiser for each of two schedules, every head, and what their covariances are worth.

Three commands, each of which goes on where it was when it is given again:

    python benchmarks/cifar10 train --schedule linear --work runs/cifar10
    python benchmarks/cifar10 train --schedule cosine --work runs/cifar10
    python benchmarks/cifar10 evaluate --work runs/cifar10 --out runs/cifar10-results

``train`` trains the denoiser and the heads of I-DDPM, NPR, SN and OCM of one schedule; ``evaluate``
trains a classifier, whose features samples are compared in, and scores both schedules. The size is
the full one on a GPU and a reduced one, of 16x16 pixels, on a CPU.

Nothing is tuned on the test split: the last of the training images, which neither denoiser nor
heads have seen, serve the analytic variances, the calibrations and every choice.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness.timing import write

from cifar10 import figures, report
from cifar10.experiment import evaluate
from cifar10.sizes import SCHEDULES, SIZES, Size
from cifar10.training import check_data, train_schedule


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, and train or evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("train", "train the denoiser and the heads of one schedule"),
        ("evaluate", "score both schedules"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--work", type=Path, required=True, help="directory of states")
        command.add_argument(
            "--data",
            type=Path,
            default=Path("../shared/data/cifar10"),
            help="directory with train.parquet and test.parquet (default: %(default)s)",
        )
        command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        command.add_argument(
            "--size", choices=SIZES, help="default: full on cuda, reduced on a cpu"
        )
        if name == "train":
            command.add_argument("--schedule", choices=SCHEDULES, required=True)
        else:
            command.add_argument("--out", type=Path, required=True, help="directory of results")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: --device {arguments.device} needs a CUDA device, and there is none")
    size = SIZES[arguments.size or ("reduced" if device.type == "cpu" else "full")]
    try:
        check_data(arguments.data)
        if arguments.command == "train":
            _train(arguments, size, device)
        else:
            _evaluate(arguments, size, device, words or sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")


def _train(arguments: argparse.Namespace, size: Size, device: torch.device) -> None:
    record = train_schedule(arguments.schedule, arguments.work, arguments.data, size, device)
    for name, loss in record["losses"].items():
        spent = record["seconds"][name]
        print(f"{name:10} loss {loss:.4f}   {'' if spent is None else f'{spent:.0f} s'}")


def _evaluate(
    arguments: argparse.Namespace, size: Size, device: torch.device, words: Sequence[str]
) -> None:
    start = time.perf_counter()
    record = evaluate(arguments.work, arguments.data, size, device)
    tables = report.tables(record)
    command_line = shlex.join(["python", "benchmarks/cifar10", *words])
    seconds = time.perf_counter() - start
    record = write(arguments.out, "cifar10", record, tables, command=command_line, seconds=seconds)
    figures.plot_curves(record, arguments.out / "cifar10.png")
    figures.plot_samples(record, arguments.work, arguments.out / "cifar10.png")
    print(tables)
