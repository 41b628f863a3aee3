"""The trace of the Jacobian of each sample, with a standard error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hessdiag.choosing import ProbeName
from hessdiag.estimate import estimate_from_products, tolerance_of
from hessdiag.fixed import FixedProbes
from hessdiag.intervals import half_width, merge
from hessdiag.jacobian import Jacobian, ScoreFunction, Ways, as_jacobian
from hessdiag.kernels.philox import Seed
from hessdiag.probes import ProbeDesign

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """An estimate of tr(J) for each sample, and what stands behind it.

    Attributes:
        trace: Shape (B,), in float32, or float64 for float64 inputs.
        stderr: Its standard error, shape (B,); infinite where it rests on one block of probes.
        num_probes: Products taken for each sample, shape (B,).
        num_blocks: Independent blocks of probes behind each sample, shape (B,).
        converged: Whether each sample reached the tolerance, bool of shape (B,); None where there
            was none.
        mode: "vjp" or "jvp".
        batching: "loop", "vmap" or "fold".
        note: What a reader should know of how it was done, or "".

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 0.1], [0.1, 2.0]])
        >>> result = hessdiag.trace(lambda x: x @ A, torch.zeros(1, 2), max_probes=64)
        >>> bool((result.trace - 3).abs() < 4 * result.stderr), result.num_probes
        (True, tensor([64]))
    """

    trace: Tensor
    stderr: Tensor
    num_probes: Tensor
    num_blocks: Tensor
    converged: Tensor | None
    mode: str
    batching: str
    note: str

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the interval that covers each trace with probability ``level``.

        Raises:
            ValueError: If ``level`` is not between 0 and 1.

        Example:
            >>> import torch, hessdiag
            >>> A = torch.ones(3, 3)
            >>> result = hessdiag.trace(lambda x: x @ A, torch.zeros(1, 3), max_probes=64)
            >>> low, high = result.interval()
            >>> bool(low < 3.0) and bool(3.0 < high)
            True
        """
        half = half_width(self.stderr, self.num_blocks, level)
        return self.trace - half, self.trace + half

    def merged(self, other: TraceEstimate) -> TraceEstimate:
        """Return this estimate and another one of further probes as one estimate.

        Both are of the same function and samples, and ``probe_offset`` has told the second which
        probes come next. Two of one block each have a standard error together.

        Raises:
            TypeError: If the other one is none of a trace.
            ValueError: If the shapes differ, the probes are the same, or one is exact already.

        Example:
            >>> import torch, hessdiag
            >>> f, x = lambda x: x @ torch.ones(3, 3), torch.zeros(1, 3)
            >>> first = hessdiag.trace(f, x, max_probes=4)
            >>> both = first.merged(hessdiag.trace(f, x, max_probes=4, probe_offset=4))
            >>> both.num_probes, both.num_blocks
            (tensor([8]), tensor([8]))
        """
        if not isinstance(other, TraceEstimate):
            raise TypeError(f"other must be a TraceEstimate, got {type(other).__name__}")
        trace, stderr, num_blocks = merge(
            (self.trace, self.stderr, self.num_blocks),
            (other.trace, other.stderr, other.num_blocks),
        )
        return replace(
            self,
            trace=trace,
            stderr=stderr,
            num_blocks=num_blocks,
            num_probes=self.num_probes + other.num_probes,
            converged=None,
            note="; ".join(dict.fromkeys(note for note in (self.note, other.note) if note)),
        )


def trace(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: Seed = 0,
    sample_offset: int = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> TraceEstimate:
    """Estimate tr(J) of each sample as the mean of v^T J v (Hutchinson, 1990).

    For Rademacher probes the variance is (1/M) sum_{i < j} (J_ij + J_ji)^2. This is the divergence
    of ``score_fn``, as continuous normalising flows and score matching need it.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone; or a :class:`hessdiag.Jacobian`,
            whose ``output`` then comes from the same evaluation.
        x: Where the Jacobian of a function is taken, shape (B, ...).
        max_probes: Most probes for a sample.
        probes: As in :func:`hessdiag.estimate`; for the right-hand side of an ODE, probes that
            :func:`hessdiag.fixed_probes` drew once.
        rtol: Stop once, with 95% confidence, the error is at most atol + rtol * abs(trace).
        atol: The absolute part of that tolerance.
        chunk_size: Probes held in memory at a time.
        seed: Seed of the probes.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
        ways: As in :func:`hessdiag.estimate`.

    Returns:
        A :class:`TraceEstimate`, with a trace and its standard error for each sample, (B,).

    Raises:
        TypeError: As :func:`hessdiag.estimate`.
        ValueError: As :func:`hessdiag.estimate`.

    Example:
        >>> import torch, hessdiag
        >>> hessdiag.trace(torch.sin, torch.zeros(1, 3), max_probes=2).trace    # cos(0) three times
        tensor([3.])
    """
    J = as_jacobian(score_fn, x, ways)
    if (
        isinstance(probes, FixedProbes)
        and probes.is_single
        and (rtol, atol, chunk_size) == (None, None, "auto")
        and _are_ints((max_probes, seed, sample_offset, probe_offset), (1, 0, 0, 0))
    ):
        return _by_single_probe(J, probes)
    streamed, notes = estimate_from_products(
        J.products,
        J.x,
        check_alone=J.check_samples_alone,
        expect=J.expect,
        max_probes=max_probes,
        probes=probes,
        tolerance=tolerance_of(rtol, atol),
        chunk_size=chunk_size,
        seed=seed,
        sample_offset=sample_offset,
        probe_offset=probe_offset,
        contribution=_quadratic_forms,
        total=True,
    )
    return TraceEstimate(
        trace=streamed.mean,
        stderr=streamed.stderr,
        num_probes=streamed.num_probes,
        num_blocks=streamed.num_blocks,
        converged=streamed.converged,
        mode=J.mode,
        batching=J.batching,
        note="; ".join(J.notes + notes),
    )


def _are_ints(values: tuple[object, ...], expected: tuple[int, ...]) -> bool:
    # By type, since what is no integer is an error elsewhere.
    return all(type(value) is int for value in values) and values == expected


def _by_single_probe(J: Jacobian, kept: FixedProbes) -> TraceEstimate:
    """Return what the general way does, to the bit, of one block of one probe, sooner.

    There is nothing to average, and nothing but x that could be wrong.
    """
    x = J.x
    vectors = kept.draw(
        (1, *x.shape), kept.seed, probe_offset=0, sample_offset=0, dtype=x.dtype, device=x.device
    )
    J.expect(1)
    products, dtype = J.products(vectors), torch.promote_types(x.dtype, torch.float32)
    (value,) = _quadratic_forms(vectors.to(dtype), products.to(dtype))
    value = kept.weight(tuple(x.shape[1:])) * value
    number = torch.full(value.shape, 1, device=x.device)
    return TraceEstimate(
        trace=value,
        stderr=torch.full(value.shape, torch.inf, dtype=value.dtype, device=x.device),
        num_probes=number,
        num_blocks=number.clone(),
        converged=None,
        mode=J.mode,
        batching=J.batching,
        note="; ".join(J.notes),
    )


def _quadratic_forms(probes: Tensor, products: Tensor) -> Tensor:
    """Return v^T J v, shape (m, B)."""
    terms = probes * products
    if terms.dim() != 3:
        terms = terms.reshape(*terms.shape[:2], terms.shape[2:].numel())
    return terms.sum(dim=2)
