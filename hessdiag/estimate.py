"""The diagonal of the Jacobian of a batched function, estimated with standard errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int, check_real
from hessdiag.choosing import ProbeName, Request, Start, checked_design, choose_start
from hessdiag.fixed import FixedProbes
from hessdiag.intervals import half_width, merge
from hessdiag.jacobian import Jacobian, ScoreFunction, Ways, as_jacobian
from hessdiag.kernels.philox import Seed, check_counter, seed_tensor
from hessdiag.probes import ProbeDesign, check_fit
from hessdiag.products import Products
from hessdiag.streaming import Chunks, Contribution, Lane, Streamed, Tolerance, chunk_of, stream

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """An estimate of diag(J) for each sample, and what stands behind it.

    Attributes:
        diagonal: Shape (B, ...), in float32, or float64 for float64 inputs.
        stderr: Standard error of each entry, zero where it is known to be exact, infinite where it
            rests on one block of probes. An entry whose blocks all agree takes a part of the mean
            variance instead of none, see :func:`hessdiag.intervals.standard_error`.
        num_probes: Products taken for each sample, those that measured the decay included; int64
            of shape (B,).
        num_blocks: Independent blocks of probes behind each sample; int64 of shape (B,).
        converged: Whether each sample reached the tolerance, bool of shape (B,); None where there
            was none.
        mode: "vjp" or "jvp".
        batching: "loop", "vmap" or "fold".
        note: Which probes were chosen, why a preferred way was not taken, and the like; or "".

    Example:
        >>> import torch, hessdiag
        >>> J = torch.eye(3) + 0.1
        >>> result = hessdiag.estimate(lambda x: x @ J, torch.zeros(2, 3), max_probes=200, rtol=0.2)
        >>> bool(result.converged.all()), bool((result.num_probes < 200).all()), result.mode
        (True, True, 'vjp')
        >>> result.diagonal.shape, result.stderr.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    diagonal: Tensor
    stderr: Tensor
    num_probes: Tensor
    num_blocks: Tensor
    converged: Tensor | None
    mode: str
    batching: str
    note: str

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the intervals that cover each entry with probability ``level``.

        Student's quantile with num_blocks - 1 degrees of freedom times the standard error, to
        either side. Infinite from one block.

        Raises:
            ValueError: If ``level`` is not between 0 and 1.

        Example:
            >>> import torch, hessdiag
            >>> A = torch.tensor([[1.0, 0.1], [0.1, 2.0]])
            >>> result = hessdiag.estimate(lambda x: x @ A, torch.zeros(1, 2), max_probes=64)
            >>> low, high = result.interval(0.99)
            >>> bool(((low < A.diagonal()) & (A.diagonal() < high)).all())
            True
        """
        half = half_width(self.stderr, self.num_blocks, level)
        return self.diagonal - half, self.diagonal + half

    def merged(self, other: DiagonalEstimate) -> DiagonalEstimate:
        """Return this estimate and another one of further probes as one estimate.

        Both are of the same function and samples, and ``probe_offset`` has told the second which
        probes come next. Two of one block each have a standard error together.

        Raises:
            TypeError: If the other one is none of a diagonal.
            ValueError: If the shapes differ, the probes are the same, or one is exact already.

        Example:
            >>> import torch, hessdiag
            >>> f, x = lambda x: x @ torch.ones(3, 3), torch.zeros(1, 3)
            >>> first = hessdiag.estimate(f, x, max_probes=4)
            >>> both = first.merged(hessdiag.estimate(f, x, max_probes=4, probe_offset=4))
            >>> both.num_probes, both.num_blocks
            (tensor([8]), tensor([8]))
        """
        if not isinstance(other, DiagonalEstimate):
            raise TypeError(f"other must be a DiagonalEstimate, got {type(other).__name__}")
        diagonal, stderr, num_blocks = merge(
            (self.diagonal, self.stderr, self.num_blocks),
            (other.diagonal, other.stderr, other.num_blocks),
        )
        return replace(
            self,
            diagonal=diagonal,
            stderr=stderr,
            num_blocks=num_blocks,
            num_probes=self.num_probes + other.num_probes,
            converged=None,
            note="; ".join(dict.fromkeys(note for note in (self.note, other.note) if note)),
        )


def estimate(
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
) -> DiagonalEstimate:
    """Estimate diag(J) of each sample, unbiased and with standard errors.

    The estimate is the mean of v * (J v) over the probes v of a design, weighted as the design
    says; :mod:`hessdiag.probes` has the designs, their variances and sources. Random numbers
    follow the contract of :mod:`hessdiag.kernels.philox`: the result depends neither on
    ``chunk_size`` nor on how a batch is split over calls or processes, beyond what the products
    with J themselves do. ``score_fn`` must act on each sample alone; where it does not, the entry
    estimated is that of the Jacobian of the whole batch.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone; or a :class:`hessdiag.Jacobian`,
            which holds its x. For a Hessian diagonal, the gradient of a function (or use
            :func:`hessdiag.hessian_diagonal`).
        x: Where the Jacobian of a function is taken: shape (B, ...), real floating point, finite.
        max_probes: Most probes for a sample; whole blocks of the design are used.
        probes: A design of :mod:`hessdiag.probes`, an object of your own with its three methods,
            probes that are kept (:func:`hessdiag.fixed_probes`), or a name:

            - "rademacher", "normal": independent entries.
            - "coloring": for samples (C, ...) with spatial axes. One block of ``max_probes``
              colors; or smaller blocks where a sample's decay, measured with 2 of the probes, says
              that these have less than half of the variance, or reach the tolerance sooner. Not
              measured where 2 are more than 5% of ``max_probes``.
            - "orthogonal": two random balanced colorings of as many colors as fit.
            - "auto": the exact diagonal if ``max_probes`` reaches D; else for samples of two axes
              or more (sequences, tokens, images, video) one block that is a lattice of colors
              where its first products speak for that, else random cells; see
              :mod:`hessdiag.piloting`. For features without geometry "orthogonal" if that gains
              more than an eighth, else "rademacher". Random cells are no worse than "rademacher"
              in expectation, whatever J is, and those first products add a few percent at most,
              unless J couples just what the lattice does. One block leaves no standard error: with
              a tolerance it is "coloring", the exact diagonal or "rademacher", by what 2 products
              show; below 40 probes the exact diagonal if these reach D, else "rademacher".
        rtol: Stop a sample's probes once, with 95% confidence, the root mean square of its errors
            is at most atol + rtol * (root mean square of its diagonal); see
            :class:`hessdiag.streaming.Tolerance`. Looked at every 16 probes, or every block of
            more. Passes go on for the whole batch until its last sample has stopped.
        atol: The absolute part of that tolerance.
        chunk_size: Probes held in memory at a time; halved, with a warning, when a GPU runs out of
            memory.
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        sample_offset: Number of the first sample, for a batch that is part of a larger one.
        probe_offset: Number of the first probe, for an estimate that is continued; a multiple of
            the design's block.
        ways: How ``score_fn`` is evaluated: ``mode``, ``batching``, ``compile``, ``autocast``,
            ``basis`` and ``differentiable``, as :class:`hessdiag.Jacobian` has them.

    Returns:
        A :class:`DiagonalEstimate`, whose ``diagonal`` and ``stderr`` have the shape of x.

    Raises:
        TypeError: If an argument or the output of ``score_fn`` is of the wrong type or dtype.
        ValueError: If a value is out of range, x is not finite, the design does not fit x or
            ``max_probes``, or ``score_fn`` returns another shape.
        NotDifferentiableError: A ValueError: if ``score_fn`` does not depend on x, or has no
            derivative.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 0.1], [0.1, 2.0]])
        >>> result = hessdiag.estimate(lambda x: x @ A, torch.zeros(1, 2), max_probes=64)
        >>> bool(((result.diagonal - A.diagonal()).abs() < 4 * result.stderr).all())
        True
    """
    J = as_jacobian(score_fn, x, ways)
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
        geometry=J.basis is None,
    )
    return DiagonalEstimate(
        diagonal=streamed.mean,
        stderr=streamed.stderr,
        num_probes=streamed.num_probes,
        num_blocks=streamed.num_blocks,
        converged=streamed.converged,
        mode=J.mode,
        batching=J.batching,
        note="; ".join(J.notes + notes),
    )


def hutchinson(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    M: int | None = None,
    *,
    seed: Seed = 0,
    chunk_size: int | Literal["auto"] = "auto",
    sample_offset: int = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> Tensor:
    """Estimate diag(J) of each sample with M Rademacher probes.

    The estimate is Hutchinson's, as written for the diagonal by Bekas, Kokiopoulou and Saad
    (2007)::

        d = (1/M) sum_m v_m * (J v_m),    v_m uniform on {-1, +1}^D,

    or the same with the transpose of J. It is unbiased, with variance::

        Var[d_i] = (1/M) sum_{j != i} J_ij^2    (forward mode; J_ji^2 in reverse mode).

    This is the shortest call of :func:`estimate`, which has the meaning of every argument, other
    probes, standard errors and tolerances.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone: put modules that couple the batch
            (BatchNorm) in eval mode. Or a :class:`hessdiag.Jacobian`, which holds its x.
        x: Where the Jacobian of a function is taken: shape (B, ...), real floating point, finite.
        M: Number of probes, at least 1.
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        chunk_size: Probes held in memory at a time.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
        ways: As in :func:`estimate`.

    Returns:
        Shape and dtype of ``x``, without a gradient unless ``differentiable=True``. The mean is
        kept in float32 or, for float64, in float64.

    Raises:
        TypeError: As :func:`estimate`.
        ValueError: As :func:`estimate`.

    Example:
        >>> import torch, hessdiag
        >>> x = torch.linspace(0, 1, 6).reshape(2, 3)
        >>> hessdiag.hutchinson(torch.sin, x, M=1)    # exact: the Jacobian is diagonal
        tensor([[1.0000, 0.9801, 0.9211],
                [0.8253, 0.6967, 0.5403]])
    """
    M = check_positive_int("M", M)
    J = as_jacobian(score_fn, x, ways)
    result = estimate(
        J,
        max_probes=M,
        seed=seed,
        chunk_size=chunk_size,
        sample_offset=sample_offset,
        probe_offset=probe_offset,
    )
    warn_of_forward_mode(J, result.note)
    return result.diagonal.to(J.x.dtype)


def warn_of_forward_mode(J: Jacobian, note: str) -> None:
    """Warn, where a result has no note, that "auto" had to leave reverse mode, and why."""
    if J.asked_mode == "auto" and J.mode == "jvp":
        warnings.warn(f"mode='auto' takes forward mode: {note}", UserWarning, stacklevel=3)


def tolerance_of(rtol: float | None, atol: float | None) -> Tolerance | None:
    """Return the tolerance, or None if neither part is given.

    Raises:
        TypeError: If a part is no number.
        ValueError: If a part is negative, infinite or NaN, or neither is positive.

    Example:
        >>> tolerance_of(0.1, None)
        Tolerance(rtol=0.1, atol=0.0)
    """
    if rtol is None and atol is None:
        return None
    relative, absolute = (0.0 if part is None else part for part in (rtol, atol))
    for name, value in (("rtol", relative), ("atol", absolute)):
        check_real(name, value)
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {value}")
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    if relative == absolute == 0.0:
        raise ValueError(
            "rtol or atol must be positive, got 0: use hessdiag.exact for the diagonal"
        )
    return Tolerance(float(relative), float(absolute))


def estimate_from_products(
    products: Products,
    x: Tensor,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign,
    tolerance: Tolerance | None,
    chunk_size: int | Literal["auto"],
    seed: Seed,
    sample_offset: int = 0,
    probe_offset: int = 0,
    geometry: bool = True,
    contribution: Contribution | None = None,
    total: bool = False,
    check_alone: Callable[[], None] | None = None,
    expect: Callable[[int], None] | None = None,
) -> tuple[Streamed, list[str]]:
    """Run a design through products with any matrix; the arguments are those of :func:`estimate`.

    Args:
        products: From probes (m, B, ...) to products of the same shape.
        x: A tensor of the shape, type and device of one probe.
        max_probes: Most probes for a sample.
        probes: Design or its name.
        tolerance: When to stop.
        chunk_size: Probes in memory at a time.
        seed: Seed of the probes.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
        geometry: Whether neighbours along the axes of x are close, as "auto" supposes of images.
        contribution: What to average in place of v * (J v).
        total: Whether it is the sum of the diagonal that counts.
        check_alone: Raises if samples are coupled, before unit vectors rely on it that they are
            not.
        expect: Is told, before the first, how many products will be taken at a time.

    Returns:
        The moments, and what a reader of the result should know.
    """
    max_probes = check_positive_int("max_probes", max_probes)
    probe_offset = check_counter("probe_offset", probe_offset, max_probes)
    sample_offset = check_counter("sample_offset", sample_offset, len(x))
    chunk, number = chunk_of(chunk_size, x), _seed_of(seed, probes, x.device)
    if expect is not None:
        expect(min(chunk, max_probes))
    notes: list[str] = []

    def in_chunks(probes: Tensor) -> Tensor:
        chunks = Chunks(lambda first, count: probes[first : first + count], products, chunk, notes)
        return torch.cat([taken for _, _, taken in chunks.run(len(probes))])

    if isinstance(probes, str):
        request = Request(
            x, max_probes, tolerance, geometry, total, number, sample_offset, probe_offset
        )
        start = choose_start(in_chunks, request, probes, notes)
    else:
        start = Start([Lane(checked_design(probes))])
    for lane in start.lanes:
        if lane.design.is_exact and check_alone is not None:
            check_alone()
        needed = check_fit(lane.design, tuple(x.shape[1:]), max_probes, probe_offset)
        if isinstance(lane.design, FixedProbes):
            lane.design.check_kept(probe_offset, needed)
    streamed = stream(
        products,
        x,
        start.lanes,
        max_probes - start.num_spent,
        seed=number,
        chunk=chunk,
        notes=notes,
        tolerance=tolerance,
        contribution=contribution,
        probe_offset=probe_offset,
        sample_offset=sample_offset,
        begun=start.begun,
    )
    if start.num_spent:
        streamed = replace(streamed, num_probes=streamed.num_probes + start.num_spent)
    return streamed, notes


def _seed_of(seed: Seed, probes: ProbeName | ProbeDesign, device: torch.device) -> Tensor:
    """Return the seed as a tensor; that of probes that are kept where it was left out."""
    if isinstance(probes, FixedProbes) and type(seed) is int and seed == 0:
        return probes.seed
    return seed_tensor(seed, device)
