"""Both schedules of the CIFAR-10 experiment: their evaluation, and the processes that they have."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from cifar10.evaluation import evaluate_schedule, feature_extractor
from cifar10.parts import as_json
from cifar10.sizes import DATA, SCHEDULES, SEED, Size
from cifar10.training import train_schedule
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
