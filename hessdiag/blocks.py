"""Diagonal blocks of the Jacobian: per pixel over channels, or over any partition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.intervals import standard_error
from hessdiag.jacobian import Jacobian, ScoreFunction, Ways, as_jacobian
from hessdiag.kernels import rademacher
from hessdiag.kernels.philox import Seed, check_counter, seed_tensor
from hessdiag.probes import Rademacher, UnitVectors
from hessdiag.streaming import BlockMoments, Chunks, chunk_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class BlockDiagonalEstimate:
    """The diagonal blocks of J for each sample, and what stands behind them.

    Attributes:
        blocks: Shape (B, number of blocks, k, k) with k the size of the largest block. Entry
            (b, l, i, j) is the derivative of output i of block l with respect to its input j,
            features in order; zero beyond the size of a smaller block.
        stderr: Standard error of each entry: zero if exact, infinite from one sign vector.
        num_probes: Products taken for each sample, int64 of shape (B,).
        mode: "vjp" or "jvp".
        note: What a reader should know of how it was done, or "".

    Example:
        >>> import torch, hessdiag
        >>> mix = torch.nn.Conv2d(3, 3, kernel_size=1)
        >>> result = hessdiag.block_diagonal(mix, torch.zeros(2, 3, 2, 2))    # of each pixel
        >>> result.blocks.shape
        torch.Size([2, 4, 3, 3])
        >>> bool((result.blocks - mix.weight[:, :, 0, 0]).abs().max() < 1e-6)
        True
    """

    blocks: Tensor
    stderr: Tensor
    num_probes: Tensor
    mode: str
    note: str


def block_diagonal(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    *,
    partition: Tensor | Literal["channels"] = "channels",
    probes: Rademacher | UnitVectors = UnitVectors(),  # noqa: B008, frozen
    max_probes: int | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: Seed = 0,
    sample_offset: int = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> BlockDiagonalEstimate:
    """Compute the diagonal blocks of J of each sample, exactly or with probes.

    With a sign z_l for every block l, probe r of k has z_l at the feature of rank r of every
    block and zero elsewhere; z_l times its product has column r of block l as its expectation,
    and the variance of entry (i, r) is the sum of the squares of row i at the features of rank r
    in the other blocks, over the number of sign vectors. With ``UnitVectors()`` one block at a
    time is taken, exactly, by k products for each block.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone; or a :class:`hessdiag.Jacobian`.
        x: Where the Jacobian of a function is taken, shape (B, ...).
        partition: The block of each feature, an integer tensor of the shape of a sample with
            values 0 .. L - 1; or "channels", for samples (C, ...): a block for each position.
        probes: ``UnitVectors()`` for the exact blocks, or ``Rademacher()``.
        max_probes: Most products, for Rademacher probes: ``max_probes // k`` sign vectors.
        chunk_size: Products held in memory at a time.
        seed: Seed of the signs.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first sign vector.
        ways: As in :func:`hessdiag.estimate`.

    Returns:
        A :class:`BlockDiagonalEstimate`, whose ``blocks`` and ``stderr`` have the same shape.

    Raises:
        TypeError: As :func:`hessdiag.estimate`.
        ValueError: As :func:`hessdiag.estimate`; if the partition does not fit x, has an empty
            block, ``max_probes`` is below k, or it is given for the exact blocks.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0], [9.0, 9.0, 5.0]])
        >>> partition = torch.tensor([0, 0, 1])
        >>> f = lambda x: x @ A.T
        >>> hessdiag.block_diagonal(f, torch.zeros(1, 3), partition=partition).blocks
        tensor([[[[1., 2.],
                  [3., 4.]],
        <BLANKLINE>
                 [[5., 0.],
                  [0., 0.]]]])
    """
    if not isinstance(probes, (Rademacher, UnitVectors)):
        raise TypeError(
            f"probes must be hessdiag.UnitVectors() or hessdiag.Rademacher(), got {probes!r}"
        )
    J, notes = as_jacobian(score_fn, x, ways), list[str]()
    x = J.x
    labels, ranks = _labels_and_ranks(partition, x)
    num_blocks, size = int(labels.max()) + 1, int(ranks.max()) + 1
    exact = probes.is_exact
    if exact:
        if max_probes is not None:
            raise ValueError(
                f"max_probes must be left out for the exact blocks, got {max_probes}; pass "
                "probes=hessdiag.Rademacher() to estimate them"
            )
        J.check_samples_alone()
        total, cycle = num_blocks * size, num_blocks
    else:
        check_positive_int("max_probes", max_probes)
        assert max_probes is not None
        if max_probes < size:
            raise ValueError(
                f"max_probes must be at least {size}, the size of the largest block, "
                f"got {max_probes}"
            )
        total, cycle = max_probes // size * size, 1
        sample_offset = check_counter("sample_offset", sample_offset, len(x))
        probe_offset = check_counter("probe_offset", probe_offset, total)
    seed = seed_tensor(seed, x.device)

    def draw(first: int, count: int) -> Tensor:
        """Probe number n: sign vector n // (k * cycle), rank n % k, and if exact one block."""
        numbers = torch.arange(first, first + count, device=x.device)
        rank, vector = numbers % size, numbers // (size * cycle)
        z = rademacher(
            (int(vector[-1] - vector[0]) + 1, len(x), num_blocks),
            seed,
            probe_offset=probe_offset + int(vector[0]),
            sample_offset=sample_offset,
            dtype=x.dtype,
            device=x.device,
        )
        signs = z[vector - vector[0]][:, :, labels]
        mask = ranks == rank[:, None]
        if cycle > 1:
            mask &= labels == (numbers // size % cycle)[:, None]
        return (signs * mask[:, None]).reshape(count, *x.shape)

    def columns(probes: Tensor, taken: Tensor) -> Tensor:
        """Return z_l (J v) for each feature, z_l read off the probe at the block's feature."""
        flat = probes.flatten(2)
        z = flat.new_zeros(*flat.shape[:2], num_blocks).index_add_(2, labels, flat)
        return z[:, :, labels] * taken.flatten(2)

    # One sum for each rank, each over the probes that belong to it.
    moments = [BlockMoments(cycle, 1.0, columns) for _ in range(size)]
    for first, drawn, taken in Chunks(draw, J.products, chunk_of(chunk_size, x), notes).run(total):
        for offset in range(len(drawn)):
            one = slice(offset, offset + 1)
            moments[(first + offset) % size].add(first + offset, drawn[one], taken[one])

    means, errors = [], []
    for moment in moments:
        count, mean, deviations = moment.moments()
        means.append(mean)
        errors.append(torch.zeros_like(mean) if exact else standard_error(count, deviations))
    blocks, stderr = (
        _gathered(torch.stack(values, dim=-1), labels, ranks, num_blocks, J.mode)
        for values in (means, errors)
    )
    num_probes = torch.full((len(x),), total, dtype=torch.int64, device=x.device)
    note = "; ".join(J.notes + notes)
    return BlockDiagonalEstimate(blocks, stderr, num_probes, J.mode, note)


def _labels_and_ranks(partition: Tensor | Literal["channels"], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block of each feature and its rank within that block, flat."""
    shape = tuple(x.shape[1:])
    if isinstance(partition, Tensor):
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        if partition.dtype not in kinds or partition.shape != shape or partition.is_meta:
            raise ValueError(
                f"partition must be an integer tensor of the shape of a sample, {shape}, got "
                f"{partition.dtype} of shape {tuple(partition.shape)} on {partition.device}"
            )
        labels = partition.to(x.device, torch.int64).flatten()
    elif partition == "channels":
        if len(shape) < 2:
            raise ValueError(
                f"partition='channels' needs x of shape (B, C, ...), got {tuple(x.shape)}"
            )
        positions = math.prod(shape[1:])
        labels = torch.arange(positions, device=x.device).repeat(shape[0])
    else:
        raise ValueError(f"partition must be a tensor or 'channels', got {partition!r}")
    counts = torch.bincount(labels.clamp(min=0)) if len(labels) else labels
    if len(labels) == 0 or int(labels.min()) < 0 or bool((counts == 0).any()):
        raise ValueError(
            f"partition must have values 0 .. L - 1, each of them at least once, of {len(labels)} "
            "features"
        )
    order = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels), device=x.device) - starts[labels[order]]
    return labels, ranks


def _gathered(columns: Tensor, labels: Tensor, ranks: Tensor, num_blocks: int, mode: str) -> Tensor:
    """Sort (B, D, k), the products at each feature, into (B, L, k, k)."""
    size = columns.shape[-1]
    blocks = columns.new_zeros(len(columns), num_blocks, size, size)
    blocks[:, labels, ranks] = columns
    inside = torch.zeros(num_blocks, size, dtype=torch.bool, device=columns.device)
    inside[labels, ranks] = True
    blocks = torch.where(inside[:, None, :] & inside[:, :, None], blocks, 0.0)
    return blocks.mT if mode == "vjp" else blocks
