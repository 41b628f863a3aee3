"""``attention_jvp`` against forward mode through the mathematical backend of PyTorch.

Both return attention and its derivative in M directions. The mathematical backend is the one with
a forward-mode rule; it is differentiated as ``torch.func`` does it, all directions in one vmap.
Every case is checked against float64 before anything is timed. Bytes are the most that are
allocated at one time, outputs included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.memory import allocated_bytes
from harness.timing import Setting, time_together
from torch import Tensor

from hessdiag import attention, kernels
from ocm.evaluation.environment import Row, environment, gpu_state
from ocm.evaluation.markdown import markdown_table

COLUMNS = {
    "case": "",
    "M": "d",
    "milliseconds": ".2f",
    "over_mathematical": ".2f",
    "over_attention_alone": ".1f",
    "mebibytes": ".1f",
    "mathematical_mebibytes": ".1f",
    "memory_over_mathematical": ".3f",
    "taken": "",
}
_OURS, _THEIRS, _ALONE = "attention_jvp", "mathematical backend", "attention alone"
# Relative to float64: what rounding in the type of the inputs leaves.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Attention of one size.

    Attributes:
        batch: B.
        heads: H.
        tokens: L, and S.
        head_size: E.
        num_probes: M.
        dtype: Type of the inputs.
        is_causal: Whether a token looks at those before it alone.
    """

    batch: int
    heads: int
    tokens: int
    head_size: int
    num_probes: int
    dtype: torch.dtype = torch.float32
    is_causal: bool = False

    def __str__(self) -> str:
        """Return how tables call it."""
        size = f"{self.batch} x {self.heads} x {self.tokens} x {self.head_size}"
        causal = ", causal" if self.is_causal else ""
        return f"{size}, {str(self.dtype).removeprefix('torch.')}{causal}"


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    device = setting.device
    rounds = 3 if setting.quick else 7
    rows = [_row(case, device, rounds) for case in _cases(device, setting.quick)]
    record = {
        "suite": "attention",
        "rounds": rounds,
        "seeds": {"inputs": 0},
        "environment": environment(device),
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    return (
        f"{markdown_table(record['rows'], COLUMNS)}\n\n`taken`: whether forward mode of hessdiag "
        "takes the op at this size, or the mathematical backend."
    )


def _cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cuda":
        tokens = (256, 1024) if quick else (256, 1024, 4096)
        return [
            Case(2, 8, size, 64, num_probes, dtype, is_causal)
            for size in tokens
            for dtype in (torch.bfloat16, torch.float32)
            for num_probes in (1, 8)
            for is_causal in (False, True)
            if not (is_causal and dtype == torch.float32)
        ]
    cases = [Case(1, 4, 64, 32, 4), Case(1, 4, 256, 32, 4), Case(1, 4, 1024, 32, 1)]
    if not quick:
        cases += [
            Case(4, 4, 64, 32, 16),
            Case(1, 4, 256, 64, 16),
            Case(1, 4, 1024, 64, 4),
            Case(1, 4, 1024, 64, 4, is_causal=True),
            Case(1, 2, 4096, 64, 1),
        ]
    return cases


def _row(case: Case, device: torch.device, rounds: int) -> Row:
    points, tangents = _inputs(case, device)
    error = relative_error(case, points, tangents)
    if not error <= _TOLERANCES[case.dtype]:
        raise RuntimeError(
            f"attention_jvp at {case} differs from float64 by {error:.1e}, at most "
            f"{_TOLERANCES[case.dtype]:.0e} is right; nothing is timed"
        )

    def ours() -> object:
        return kernels.attention_jvp(*points, *tangents, is_causal=case.is_causal)

    def theirs() -> object:
        return mathematical(points, tangents, case.is_causal)

    def alone() -> object:
        return torch.nn.functional.scaled_dot_product_attention(*points, is_causal=case.is_causal)

    candidates: dict[str, Callable[[], object]] = {_OURS: ours, _THEIRS: theirs, _ALONE: alone}
    with torch.no_grad():
        timings, ratios = time_together(candidates, device=device, rounds=rounds, baseline=_THEIRS)
        memory = {name: allocated_bytes(candidates[name], device) for name in (_OURS, _THEIRS)}
    timing = timings[_OURS]
    return {
        "case": str(case),
        "M": case.num_probes,
        "milliseconds": 1e3 * timing.median,
        "milliseconds_min": 1e3 * timing.minimum,
        "milliseconds_max": 1e3 * timing.maximum,
        "over_mathematical": ratios[_OURS],
        "over_attention_alone": ratios[_OURS] / ratios[_ALONE],
        "mebibytes": memory[_OURS] / 2**20,
        "mathematical_mebibytes": memory[_THEIRS] / 2**20,
        "memory_over_mathematical": memory[_OURS] / memory[_THEIRS],
        "error_against_float64": error,
        "taken": attention.takes_op(points[0], points[1], tangents[0]),
        **gpu_state(device),
    }


def _inputs(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.tokens, case.head_size)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    points = [drawn(*shape) for _ in range(3)]
    return points, [drawn(case.num_probes, *shape) for _ in range(3)]


def mathematical(
    points: list[Tensor], tangents: list[Tensor], is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Return what ``attention_jvp`` does, by the rules of PyTorch."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, None, 0.0, is_causal
        )[0]
        return result

    def product(*directions: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.func.jvp(attend, tuple(points), directions)
        return result

    out, tangent = torch.func.vmap(product, out_dims=(None, 0))(*tangents)
    return out, tangent


def relative_error(case: Case, points: list[Tensor], tangents: list[Tensor]) -> float:
    """Return the larger error of o and do, in the last head of the last sample, to float64."""
    last = (slice(-1, None), slice(-1, None))
    results = kernels.attention_jvp(*points, *tangents, is_causal=case.is_causal)
    expected = mathematical(
        [point[last].double() for point in points],
        [tangent[-1:, -1:, -1:].double() for tangent in tangents],
        case.is_causal,
    )
    found = (results[0][last], results[1][-1:, -1:, -1:])
    return max(
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip(found, expected, strict=True)
    )
