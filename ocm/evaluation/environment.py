"""What a reader needs to place a figure: commit, versions and hardware."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def environment(device: torch.device) -> Row:
    """Return commit (None outside of a checkout), versions and hardware as JSON values."""
    commit, changed = _commit()
    record: Row = {
        "commit": commit,
        "uncommitted_changes": changed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else None,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record | gpu_state(device)


def _commit() -> tuple[str | None, bool]:
    """Return the commit of the checkout that holds this file, and whether it differs from that."""
    root = Path(__file__).parents[2]
    # Installed below another repository, as in its .venv, git would answer with that one's commit.
    if _git(root, "ls-files", "--error-unmatch", "--", __file__) is None:
        return None, False
    # Results of earlier runs are no change to what is measured.
    changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!*.md")
    return _git(root, "rev-parse", "HEAD"), bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def gpu_state(device: torch.device) -> Row:
    """Return clocks and power of a GPU as they are now, by nvidia-ml-py; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    try:
        import pynvml
    except ModuleNotFoundError:
        return {"driver": "unknown: nvidia-ml-py is not installed"}
    pynvml.nvmlInit()
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
    finally:
        pynvml.nvmlShutdown()
