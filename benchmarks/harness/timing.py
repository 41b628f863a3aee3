"""What every suite needs: paired timings, and rows as JSON and Markdown."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from ocm.evaluation.environment import Row


@dataclass(frozen=True)
class Setting:
    """What every suite is told.

    Attributes:
        device: Where to measure.
        quick: Fewer rounds and sizes.
        data: Directory of CIFAR-10, for the suites that train on images.
        fashion_mnist: Directory of Fashion-MNIST, for the suite that trains on it.
    """

    device: torch.device
    quick: bool
    data: Path
    fashion_mnist: Path = Path("../shared/data/fashion_mnist")


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over the rounds of a run."""

    median: float
    minimum: float
    maximum: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_together(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    baseline: str,
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time candidates in turn, round after round, so that a drifting clock touches all alike.

    Returns:
        The timing of each, and the median over rounds of its time over that of ``baseline``.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    timings = {
        name: Timing(statistics.median(values), min(values), max(values))
        for name, values in seconds.items()
    }
    ratios = {
        name: statistics.median(
            value / base for value, base in zip(values, seconds[baseline], strict=True)
        )
        for name, values in seconds.items()
    }
    return timings, ratios


def write(out: Path, suite: str, record: Row, tables: str, *, command: str, seconds: float) -> Row:
    """Write ``<suite>.json`` and ``<suite>.md`` to the directory ``out``, which is made if need be.

    Args:
        out: The directory.
        suite: Name of the suite.
        record: What it measured.
        tables: The same in Markdown.
        command: The command that makes these rows.
        seconds: How long it took.

    Returns:
        The record with ``suite``, ``command``, ``date`` (UTC) and ``seconds`` in front.
    """
    origin: Row = {
        "suite": suite,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }
    stamped = origin | {key: value for key, value in record.items() if key not in origin}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{suite}.json").write_text(json.dumps(stamped, indent=2) + "\n")
    (out / f"{suite}.md").write_text(tables + "\n")
    return stamped
