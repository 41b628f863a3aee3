"""Running a design's probes through the products, a chunk at a time, and keeping the moments.

Nothing here depends on chunk sizes: probes are numbered, sums are taken one probe after the other,
and a tolerance is looked at after fixed numbers of probes.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.intervals import error_quantile, standard_error
from hessdiag.kernels import Moments, probe_moments
from hessdiag.kernels.probe_moments import probe_moments_from_probes
from hessdiag.probes import ProbeDesign
from hessdiag.products import Products

# A tile of the random-number contract: a smaller chunk makes the same signs more than once.
_PROBES_PER_TILE = 16
_MOST_PROBES = 1024
# Where vmap was the fastest on a CPU; a GPU takes more to be busy.
_ELEMENTS_PER_CHUNK = {"cpu": 2**17, "cuda": 2**20}

Contribution = Callable[[Tensor, Tensor], Tensor]


def chunk_of(chunk_size: int | str | None, x: Tensor) -> int:
    """Return how many probes to hold in memory at a time, to begin with.

    Args:
        chunk_size: A number; or "auto" (or None), 16 or a multiple of it with about 130 thousand
            elements, on a GPU a million, fewer where its free memory holds less than 64 times the
            chunk.
        x: Where the Jacobian is taken.

    Raises:
        TypeError: If ``chunk_size`` is neither.
        ValueError: If it is below 1.

    Example:
        >>> chunk_of("auto", torch.zeros(1, 3, 32, 32)), chunk_of(5, torch.zeros(2, 2))
        (32, 5)
    """
    if chunk_size is not None and chunk_size != "auto":
        if isinstance(chunk_size, str):
            raise TypeError(f"chunk_size must be an int or 'auto', got {chunk_size!r}")
        check_positive_int("chunk_size", chunk_size)
        return chunk_size
    elements = max(1, x.numel())
    most = _ELEMENTS_PER_CHUNK.get(x.device.type, _ELEMENTS_PER_CHUNK["cpu"])
    chunk = most // elements // _PROBES_PER_TILE * _PROBES_PER_TILE
    chunk = min(max(chunk, _PROBES_PER_TILE), _MOST_PROBES)
    if x.is_cuda:
        chunk = min(chunk, _free_memory(x.device) // (64 * elements * x.element_size()))
    return max(1, chunk)


def _free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that PyTorch can hand out: the driver's, and those it keeps."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass
class Chunks:
    """Draws probes and takes products in chunks, halved whenever memory runs out.

    Attributes:
        draw: From (first probe, number of probes) to probes of shape (m, B, ...).
        products: From probes to products.
        size: Probes of a chunk.
        notes: What a reader of the result should know.
    """

    draw: Callable[[int, int], Tensor]
    products: Products
    size: int
    notes: list[str]

    def run(
        self, total: int, stops: Sequence[int] = (), first: int = 0
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of the first probe, the probes and the products of each chunk.

        Args:
            total: Number of probes.
            stops: No chunk goes beyond a multiple of any of these.
            first: Probes before this one are left out.

        Warns:
            UserWarning: If fewer fit than were to be held, once it is known how many.

        Raises:
            torch.OutOfMemoryError: If not even one probe fits.
        """
        tried = 0
        while first < total:
            count = min(self.size, total - first, *(stop - first % stop for stop in stops))
            taken = self._chunk(first, count)
            if taken is None:
                tried = tried or count
                self.size = max(1, count // 2)
                self.notes.append(f"out of memory with {count} probes at a time, now {self.size}")
                gc.collect()  # errors hold the frames that they passed, and tensors there
                torch.cuda.empty_cache()
                continue
            if tried:
                warnings.warn(
                    f"memory does not hold {tried} probes at a time: it is {self.size} now, which "
                    f"changes no result; chunk_size={self.size} saves the attempts",
                    UserWarning,
                    stacklevel=2,
                )
                tried = 0
            yield first, *taken
            del taken  # which nobody needs while the next are made
            first += count

    def _chunk(self, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Return probes and products, or None where memory runs out with more than one."""
        try:
            probes = self.draw(first, count)
            return probes, self.products(probes)
        except torch.OutOfMemoryError as error:
            if count > 1:
                return None
            raise torch.OutOfMemoryError(
                "memory does not hold the products with one probe, which is the least chunk_size; "
                f"give a smaller batch, or mode='jvp', which keeps no graph: {error}"
            ) from error


class SignMoments:
    """Moments of v * (J v) for Rademacher probes.

    The kernel makes the signs again from the seed, rather than read them. A CPU reads them, and so
    do products that carry a gradient, for which the kernel has no rule.
    """

    def __init__(self, seed: Tensor, probe_offset: int, sample_offset: int) -> None:
        self._seed, self._probe_offset, self._sample_offset = seed, probe_offset, sample_offset
        self._state: Moments | None = None

    def add(self, first: int, probes: Tensor, products: Tensor) -> None:
        """Take in the products of the probes from number ``first`` on."""
        if not products.is_cuda or products.requires_grad:
            self._state = probe_moments_from_probes(products, probes, state=self._state)
            return
        self._state = probe_moments(
            products,
            self._seed,
            state=self._state,
            probe_offset=self._probe_offset + first,
            sample_offset=self._sample_offset,
        )

    def moments(self) -> Moments:
        """Return the moments so far."""
        assert self._state is not None
        return self._state


class BlockMoments:
    """Moments over blocks of a design, by Welford's recurrence.

    Args:
        block_size: Probes of a block.
        weight: Factor of a block's sum.
        contribution: What is summed, from probes and products of shape (m, B, ...); by default
            their product.
    """

    def __init__(
        self, block_size: int, weight: float, contribution: Contribution = torch.mul
    ) -> None:
        self._block_size, self._weight, self._contribution = block_size, weight, contribution
        self._in_block = 0
        self._sum: Tensor | None = None
        self._moments: Moments | None = None

    def add(self, first: int, probes: Tensor, products: Tensor) -> None:
        """Take in the products of the probes from number ``first`` on."""
        dtype = torch.promote_types(products.dtype, torch.float32)
        if products.dtype != dtype or probes.dtype != dtype:
            probes, products = probes.to(dtype), products.to(dtype)
        values = self._contribution(probes, products)
        # One probe after the other, so that chunks do not change the order of the sums.
        for y in values if len(values) > 1 else (values[0],):
            self._sum = y if self._sum is None else self._sum + y
            self._in_block += 1
            if self._in_block == self._block_size:
                self._add_block(self._sum if self._weight == 1.0 else self._weight * self._sum)
                self._in_block, self._sum = 0, None

    def _add_block(self, y: Tensor) -> None:
        if self._moments is None:
            self._moments = Moments(1, y, torch.zeros_like(y))
            return
        count, mean, deviations = self._moments
        delta = y - mean
        mean = mean + delta / (count + 1)
        self._moments = Moments(count + 1, mean, deviations + delta * (y - mean))

    def moments(self) -> Moments:
        """Return the moments over the complete blocks so far."""
        assert self._moments is not None
        return self._moments


@dataclass(frozen=True)
class Tolerance:
    """When a sample's estimate is good enough, with 95% confidence.

    With h = q * (root mean square of the standard errors), where q is the 95% quantile of the
    root mean square error over its standard error::

        h <= atol + rtol * (root mean square of the estimate - h).

    What is subtracted keeps an estimate that is large by chance from stopping. For a single number
    q is Student's quantile. For many entries it is close to one, on the assumption that the errors
    of one in eight are independent.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """

    rtol: float
    atol: float

    def reached(self, mean: Tensor, standard_error: Tensor, num_blocks: int) -> Tensor:
        """Return for each sample whether the tolerance is reached, shape (B,)."""
        size, error = _root_mean_square(mean), _root_mean_square(standard_error)
        return self.holds(size, error, mean.shape[1:].numel(), num_blocks)

    def holds(self, size: Tensor, error: Tensor, num_entries: int, num_blocks: int) -> Tensor:
        """Return the same from the root mean squares of ``num_entries`` entries and their errors.

        Example:
            >>> Tolerance(0.1, 0.0).holds(torch.tensor(1.0), torch.tensor([0.01, 0.09]), 8, 16)
            tensor([ True, False])
        """
        reach = error_quantile(max(1, num_entries // 8), num_blocks - 1) * error
        bound = self.atol + self.rtol * (size - reach).clamp(min=0.0)
        # An infinite reach: unknown, whatever the bound. No reach at all: exact.
        return (reach <= bound) & torch.isfinite(reach)


@dataclass(frozen=True)
class Lane:
    """The samples of a batch that share a design.

    Attributes:
        design: Their design.
        samples: Which they are, a boolean tensor of shape (B,); None for all.
    """

    design: ProbeDesign
    samples: Tensor | None = None


@dataclass(frozen=True)
class Streamed:
    """Moments of every sample, and what they cost.

    Attributes:
        mean: The estimate, shape (B, ...).
        stderr: Its standard error, infinite where there is only one block.
        num_blocks: Independent blocks, int64 of shape (B,).
        num_probes: Probes, int64 of shape (B,).
        converged: Whether the tolerance was reached, bool of shape (B,); None without one.
    """

    mean: Tensor
    stderr: Tensor
    num_blocks: Tensor
    num_probes: Tensor
    converged: Tensor | None


def stream(
    products: Products,
    x: Tensor,
    lanes: list[Lane],
    max_probes: int,
    *,
    seed: Tensor,
    chunk: int,
    notes: list[str],
    tolerance: Tolerance | None = None,
    contribution: Contribution | None = None,
    probe_offset: int = 0,
    sample_offset: int = 0,
    begun: tuple[Tensor, Tensor] | None = None,
) -> Streamed:
    """Return the moments over as many whole blocks of each lane's design as ``max_probes`` holds.

    Args:
        products: From probes (m, B, ...) to products of the same shape.
        x: A tensor of the shape, type and device of one probe.
        lanes: Designs and their samples, each sample in one lane.
        max_probes: Most probes a sample may have; at least one block.
        seed: Seed, on the device of x.
        chunk: Probes in memory at a time, to begin with.
        notes: Takes what a reader of the result should know.
        tolerance: If given, a sample's result is that of the first look at which it reached it.
        contribution: What to average, from probes and products; None for v * (J v).
        probe_offset: Number of the first probe, a multiple of every block.
        sample_offset: Number of the first sample.
        begun: The first probes of every lane and their products, where these were taken before.
    """
    shape = tuple(x.shape[1:])
    sizes = [lane.design.block_size(shape) for lane in lanes]
    # A second block of an exact design would show the same again.
    totals = [
        size if lane.design.is_exact else max_probes // size * size
        for lane, size in zip(lanes, sizes, strict=True)
    ]
    moments = [
        SignMoments(seed, probe_offset, sample_offset)
        if lane.design.is_signs and contribution is None
        else BlockMoments(size, lane.design.weight(shape), contribution or torch.mul)
        for lane, size in zip(lanes, sizes, strict=True)
    ]

    def draw(first: int, count: int) -> Tensor:
        probes: Tensor | None = None
        for lane in lanes:
            drawn = lane.design.draw(
                (count, *x.shape),
                seed,
                probe_offset=probe_offset + first,
                sample_offset=sample_offset,
                dtype=x.dtype,
                device=x.device,
            )
            probes = drawn if probes is None else torch.where(_over(lane, x), drawn, probes)
        assert probes is not None
        return probes

    chunks = Chunks(draw, products, chunk, notes)
    if tolerance is None and begun is None and len(lanes) == 1:
        # Nothing to look at before the end.
        for first, probes, taken in chunks.run(totals[0]):
            moments[0].add(first, probes, taken)
            del probes, taken
        return _standardised(moments[0].moments(), totals[0], lanes[0].design.is_exact, None)

    # Looks at whole tiles for designs of single probes, at every block for larger ones.
    looks = [size * -(-_PROBES_PER_TILE // size) for size in sizes]
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    result: Streamed | None = None
    before = [] if begun is None else [(0, *begun)]
    first = 0 if begun is None else len(begun[0])
    following = chunks.run(max(totals), looks if tolerance else (), first)
    for first, probes, taken in chain(before, following):
        end = first + len(probes)
        for lane, total, look, moment in zip(lanes, totals, looks, moments, strict=True):
            if first >= total:
                continue
            moment.add(first, probes[: total - first], taken[: total - first])
            ended = end >= total
            if not ended and (tolerance is None or end % look):
                continue
            now = _standardised(moment.moments(), min(end, total), lane.design.is_exact, tolerance)
            finished = ~done if lane.samples is None else ~done & lane.samples
            if not ended and now.converged is not None:
                finished &= now.converged
            result = now if result is None else _where(finished, now, result)
            done |= finished
        del probes, taken
        if tolerance and bool(done.all()):
            break
    assert result is not None
    return result


def _standardised(
    moments: Moments, num_probes: int, exact: bool, tolerance: Tolerance | None
) -> Streamed:
    count, mean, deviations = moments
    # The square root of zero has no derivative, and none is wanted.
    stderr = torch.zeros_like(mean) if exact else standard_error(count, deviations.detach())
    batch, device = mean.shape[:1], mean.device
    converged: Tensor | None = None
    if tolerance is not None and exact:
        converged = torch.full(batch, True, device=device)
    elif tolerance is not None:
        converged = tolerance.reached(mean, stderr, count)
    num_blocks, number = (torch.full(batch, n, device=device) for n in (count, num_probes))
    return Streamed(mean, stderr, num_blocks, number, converged)


def _where(samples: Tensor, new: Streamed, old: Streamed) -> Streamed:
    chosen = samples.reshape(-1, *[1] * (new.mean.dim() - 1))
    return Streamed(
        torch.where(chosen, new.mean, old.mean),
        torch.where(chosen, new.stderr, old.stderr),
        torch.where(samples, new.num_blocks, old.num_blocks),
        torch.where(samples, new.num_probes, old.num_probes),
        None
        if new.converged is None or old.converged is None
        else torch.where(samples, new.converged, old.converged),
    )


def _over(lane: Lane, x: Tensor) -> Tensor:
    assert lane.samples is not None
    return lane.samples.reshape(-1, *[1] * (x.dim() - 1))


def _root_mean_square(values: Tensor) -> Tensor:
    return values.reshape(len(values), values.shape[1:].numel()).square().mean(dim=1).sqrt()
