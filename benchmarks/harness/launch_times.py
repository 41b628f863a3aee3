"""Time what the host does for a launch; a process of its own for the suite ``host``.

    python benchmarks/harness/launch_times.py cpu 400

Prints one row for each op, as JSON. On a CPU the driver of the tests' emulator compiles the kernels
and launches nothing.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

from hessdiag import kernels
from hessdiag.kernels import _launch, philox

CALLS = 20
SHAPE = (64, 3, 32, 32)
PROBES = 16
STEP = kernels.StepCoefficients(1.1, -0.5, 0.6, 0.4, 0.01, 0.2)


def main(device: str, rounds: int) -> list[dict[str, object]]:
    """Return the host time of each op, as it is and in the usual way, in microseconds."""
    idle: Any = nullcontext()
    if device == "cpu":
        import emulator

        emulator.install()
        idle = emulator.without_execution()
        _compute_on_cpu_by_kernels()
    rows: list[dict[str, object]] = []
    with idle, torch.no_grad():
        for name, call in _calls(torch.device(device)).items():
            with _usual_way():
                call()
            call()
            ours, usual = [], []
            for _ in range(rounds):
                ours.append(_seconds(call))
                with _usual_way():
                    usual.append(_seconds(call))
                if device == "cuda":
                    torch.cuda.synchronize()
            rows.append(
                {
                    "op": name,
                    "microseconds": 1e6 * min(ours),
                    "usual_microseconds": 1e6 * min(usual),
                    "usual_over_ours": min(usual) / min(ours),
                }
            )
    return rows


def _calls(device: torch.device) -> dict[str, Callable[[], object]]:
    x_t, prediction, variance = (torch.rand(SHAPE, device=device) for _ in range(3))
    products = torch.rand((PROBES, *SHAPE), device=device)
    seed = torch.tensor(1, device=device)
    clamps: dict[str, Any] = {"x0_range": (-1.0, 1.0), "variance_range": (0.0, 1.0)}
    return {
        "gaussian_step": lambda: kernels.gaussian_step(
            x_t, prediction, variance, STEP, seed=seed, step=3, **clamps
        ),
        "normal": lambda: kernels.normal(SHAPE, seed, step=3, device=device),
        "rademacher": lambda: kernels.rademacher((PROBES, *SHAPE), seed, device=device),
        "probe_moments": lambda: kernels.probe_moments(products, seed),
        "ocm_loss": lambda: kernels.ocm_loss(variance, products, seed),
    }


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"hessdiag.kernels.{op}")


def _compute_on_cpu_by_kernels() -> None:
    """Let tensors of the CPU take the way of those of a GPU."""
    _launch.has_kernels = lambda tensor: True
    philox.seed_number = lambda *_: None
    for op in ("gaussian_step", "normal", "rademacher", "probe_moments", "ocm_loss"):
        module = _module(op)
        getattr(module, f"_{op}").register_kernel("cpu")(getattr(module, f"{op}_triton"))


@contextmanager
def _usual_way() -> Iterator[None]:
    """Through the dispatcher, and by Triton's own launch."""

    def call(compiled: Any, kernel: Any, grid: Any, arguments: Any, num_warps: int) -> Any:
        return kernel[grid](*arguments, num_warps=num_warps)

    with (
        mock.patch.object(_launch, "is_eager", return_value=False),
        mock.patch.object(_launch, "_call", call),
    ):
        yield


def _seconds(call: Callable[[], object]) -> float:
    """Return the time of a call, of several in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
