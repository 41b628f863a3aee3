"""What the ops of ``hessdiag.kernels`` take of the host: to launch on a GPU, to compute on a CPU.

*Launches*, without a GPU: a driver compiles the kernels for sm_90 and launches nothing, so that
what is left is the time of checks, layout and launch. Beside the ops as they are stands the way
that is usual for a Triton kernel behind a custom op: through PyTorch's dispatcher, and by
``kernel[grid](...)``. On a GPU the real launches are timed, without a wait between them.

*References*, on a CPU: in NumPy, as they are, against the same formulas in PyTorch's operators,
which give the same bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from harness.timing import Setting, time_together
from torch import Tensor

from hessdiag import kernels
from hessdiag.kernels import philox, probe_moments
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

LAUNCHES = {
    "op": "",
    "microseconds": ".1f",
    "usual_microseconds": ".1f",
    "usual_over_ours": ".1f",
}
REFERENCES = {
    "op": "",
    "size": "",
    "milliseconds": ".2f",
    "operators_milliseconds": ".2f",
    "operators_over_ours": ".1f",
}
_SHAPE = (64, 64, 256)  # probes, samples, features


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    rows: list[Row] = [{"table": "launches", **row} for row in _launches(setting)]
    if setting.device.type == "cpu":
        rows += [{"table": "references", **row} for row in _references(20 if setting.quick else 60)]
    record: Row = {
        "suite": "host",
        "environment": environment(setting.device),
        "seeds": {"inputs": 0, "probes": 1},
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    tables = [
        ("launches", "**Host time of a call**, least of many, and the usual way", LAUNCHES),
        ("references", "**On a CPU**, against PyTorch's operators", REFERENCES),
    ]
    parts = []
    for name, title, columns in tables:
        rows = [row for row in record["rows"] if row["table"] == name]
        if rows:
            parts.append(f"{title}\n\n{markdown_table(rows, columns)}")
    return "\n\n".join(parts)


def _launches(setting: Setting) -> list[Row]:
    """Time launches in a process of their own, for Triton keeps its first driver."""
    script = Path(__file__).parents[1] / "harness" / "launch_times.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    rounds = "100" if setting.quick else "400"
    process = subprocess.run(
        [sys.executable, str(script), setting.device.type, rounds],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[Row] = json.loads(process.stdout)
    return rows


@contextmanager
def operators_alone() -> Iterator[None]:
    """Let the references compute by PyTorch's operators, as they do for what is traced."""
    modules = (philox, sys.modules[probe_moments.__module__])
    before = [module.is_eager_cpu for module in modules]
    for module in modules:
        module.is_eager_cpu = lambda *_: False
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.is_eager_cpu = function


def _references(rounds: int) -> list[Row]:
    num_probes, batch, features = _SHAPE
    seed = torch.tensor(1)
    products = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    ops: dict[str, Callable[[], Tensor | kernels.Moments]] = {
        "rademacher": lambda: kernels.rademacher(_SHAPE, seed),
        "probe_moments": lambda: kernels.probe_moments(products, seed),
        "normal": lambda: kernels.normal((num_probes * batch, features), seed),
    }
    return [_reference(name, op, rounds) for name, op in ops.items()]


def _reference(name: str, op: Callable[[], Tensor | kernels.Moments], rounds: int) -> Row:
    def by_operators() -> Tensor | kernels.Moments:
        with operators_alone():
            return op()

    for one, other in zip(_tensors(op()), _tensors(by_operators()), strict=True):
        if not torch.equal(one, other):
            raise RuntimeError(f"{name}: NumPy and PyTorch's operators differ; nothing is timed")
    timings, ratios = time_together(
        {"ours": op, "operators": by_operators},
        device=torch.device("cpu"),
        rounds=rounds,
        baseline="ours",
    )
    return {
        "op": name,
        "size": " x ".join(map(str, _SHAPE)),
        "milliseconds": 1e3 * timings["ours"].minimum,
        "operators_milliseconds": 1e3 * timings["operators"].minimum,
        "operators_over_ours": ratios["operators"],
    }


def _tensors(result: Tensor | kernels.Moments) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else (result.mean, result.squared_deviations)
