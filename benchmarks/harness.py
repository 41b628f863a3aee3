"""What every suite needs: paired timings, the machine on record, rows as JSON and Markdown."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


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


def environment(device: torch.device) -> Row:
    """Return what a reader needs to place a figure: commit, versions and hardware."""
    root = Path(__file__).parent.parent
    record: Row = {
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        record.update(_gpu(device))
    return record


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: The rows.
        columns: Key of each column and the format of its values, "" for text.
    """
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "|".join("---:" if spec else ":---" for spec in columns.values()) + "|",
    ]
    for row in rows:
        cells = [
            format(row[name], spec) if row.get(name) is not None else ""
            for name, spec in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(out: Path, suite: str, record: Row, table: str) -> None:
    """Write ``<suite>.json`` and ``<suite>.md`` to the directory ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{suite}.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / f"{suite}.md").write_text(table + "\n")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def _gpu(device: torch.device) -> Row:
    """Return name, driver, clocks and power of a GPU, by nvidia-ml-py."""
    import pynvml

    properties = torch.cuda.get_device_properties(device)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        return {
            "gpu": properties.name,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
    finally:
        pynvml.nvmlShutdown()
