"""CIFAR-10: a denoiser for each of two schedules, every head, and what their covariances are worth.

Three commands, each of which goes on where it was when it is given again:

    python benchmarks/cifar10 train --schedule linear --work runs/cifar10
    python benchmarks/cifar10 train --schedule cosine --work runs/cifar10
    python benchmarks/cifar10 evaluate --work runs/cifar10 --out runs/cifar10-results

``train`` trains the denoiser and the heads of I-DDPM, NPR, SN and OCM of one schedule; ``evaluate``
trains a classifier, whose features samples are compared in, and scores both schedules. The size is
the full one on a GPU and a reduced one, of 16x16 pixels, on a CPU.

Nothing is tuned on the test split: the last of the training images, which neither denoiser nor
heads have seen, serve the analytic variances, the calibrations and every choice (:data:`TRIED`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from harness.timing import write

from cifar10.evaluation import evaluate_schedule, feature_extractor
from cifar10.parts import as_json
from cifar10.sizes import DATA, SCHEDULES, SEED, SIZES, TRIED, Size
from cifar10.training import check_data, train_schedule
from ocm.evaluation.environment import Row, environment


def evaluate(work: Path, data: Path, size: Size, device: torch.device) -> Row:
    """Score both schedules, and return the record of all of it.

    Args:
        work: Directory of :func:`train_schedule`, where finished parts are kept too.
        data: Directory of CIFAR-10.
        size: As in training.
        device: Where to compute.

    Raises:
        ValueError: If a schedule was not trained, or with other settings.
    """
    trainings = []
    for schedule in SCHEDULES:
        file = work / schedule / "train.json"
        if not file.exists():
            raise ValueError(
                f"work must hold {schedule}/train.json, got {str(work)!r}; run "
                f"`python benchmarks/cifar10 train --schedule {schedule} --work {work}` first"
            )
        # Reads it, and refuses another size.
        trainings.append(train_schedule(schedule, work, data, size, device))
    features = feature_extractor(work, data, size, device)
    results = over_schedules(evaluate_schedule, work, data, size, device)
    return {
        "suite": "cifar10",
        "settings": as_json(asdict(size)),
        "data": DATA,
        "seeds": {"denoiser": size.denoiser.seed, "heads": size.heads.seed, "evaluation": SEED},
        "environment": environment(device)
        | ({"threads": 1} if _side_by_side(size, device) else {}),
        "training": trainings,
        "features": features,
        "validation": {
            "images": f"the last {size.num_validation} of the training images, unseen in training",
            "tried": list(TRIED),
            "rows": [row for result in results for row in result["validation"]],
        },
        **{
            name: [row for result in results for row in result[name]]
            for name in ("rows", "quality", "costs", "equal_evaluations")
        },
        "seconds_by_part": {k: v for result in results for k, v in result["seconds"].items()},
    }


def over_schedules(
    function: Callable[..., Row], work: Path, data: Path, size: Size, device: torch.device
) -> list[Row]:
    """Return ``function(schedule, work, data, size, device)`` of both schedules.

    On a CPU each has a process of one thread: networks this small gain nothing from more.
    """
    if not _side_by_side(size, device):
        return [function(schedule, work, data, size, device) for schedule in SCHEDULES]
    with ProcessPoolExecutor(
        len(SCHEDULES), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        waiting = [pool.submit(function, name, work, data, size, device) for name in SCHEDULES]
        return [future.result() for future in waiting]


def _side_by_side(size: Size, device: torch.device) -> bool:
    return size.side_by_side and device.type == "cpu"


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
    # Its plots are of the record, and it makes records with the functions above.
    from suites import cifar10 as suite

    start = time.perf_counter()
    record = evaluate(arguments.work, arguments.data, size, device)
    tables = suite.report(record)
    command_line = shlex.join(["python", "benchmarks/cifar10", *words])
    seconds = time.perf_counter() - start
    record = write(arguments.out, "cifar10", record, tables, command=command_line, seconds=seconds)
    suite.plot_curves(record, arguments.out / "cifar10.png")
    suite.plot_samples(record, arguments.work, arguments.out / "cifar10.png")
    print(tables)
