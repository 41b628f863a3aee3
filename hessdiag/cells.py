"""Random colors within small cells, which no Jacobian can make worse than Rademacher probes.

The features of a sample are put in an order that runs through compact tiles, the order is cut into
cells of m features, and each cell deals the m colors to its features at random. Two features of
one cell never share a color, two of different cells do with probability 1/m. So the variance of
one entry from a block of m probes is::

    (1/m) sum of J_ij^2 over the j outside of the cell of i,

which is at most that of m Rademacher probes, whatever J is, and less by all that is close by. The
order begins at a random place, so that no pair of neighbours is always cut apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.kernels.philox import STREAM_DESIGNS, philox


def random_words(seed: int, purpose: int, block: int, count: int) -> Tensor:
    """Return 32-bit words of the stream of designs, int64 of shape (count,) on the CPU.

    Args:
        seed: In [0, 2**64), or that number less 2**64.
        purpose: What they are for: the counter word that is a sample's number in other streams.
        block: Number of the design's block.
        count: How many.

    Example:
        >>> random_words(0, 0, 0, 2).tolist() == random_words(0, 0, 0, 5)[:2].tolist()
        True
    """
    key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    groups = torch.arange(-(-count // 4))
    rest = (torch.tensor(number) for number in (purpose, block, STREAM_DESIGNS))
    return torch.stack(philox(key, groups, *rest), dim=-1).flatten()[:count]


def cell_colors(num_colors: int, sample_shape: tuple[int, ...], seed: int, block: int) -> Tensor:
    """Return a color for every feature, int64 of shape ``sample_shape`` with values 0 .. m - 1.

    Args:
        num_colors: The number m of colors, and of features of a cell.
        sample_shape: Shape of a sample; of three axes or more the first is that of channels,
            which lie at one place.
        seed: Seed of the design.
        block: Number of the block.

    Example:
        >>> cell_colors(4, (1, 4, 4), seed=0, block=0)
        tensor([[[1, 0, 3, 1],
                 [0, 1, 2, 0],
                 [3, 2, 1, 1],
                 [2, 0, 3, 2]]])
    """
    cells = cell_numbers(num_colors, sample_shape, seed, block).flatten()
    keys = random_words(seed, 1, block, (int(cells.max()) + 1) * num_colors)
    dealt = keys.reshape(-1, num_colors).argsort(dim=1, stable=True).argsort(dim=1)
    # The place of a feature among those of its cell.
    order = cells.argsort(stable=True)
    starts = cells.bincount().cumsum(0) - cells.bincount()
    place = torch.empty_like(cells)
    place[order] = torch.arange(len(cells)) - starts[cells[order]]
    return dealt[cells, place].reshape(sample_shape)


def cell_numbers(num_colors: int, sample_shape: tuple[int, ...], seed: int, block: int) -> Tensor:
    """Return the cell of every feature; the arguments are those of :func:`cell_colors`.

    Each has ``num_colors`` features but the first and the last, which may have fewer.
    """
    words = random_words(seed, 0, block, 4 + len(sample_shape))
    order = _order(num_colors, tuple(sample_shape), words[4:].tolist())
    cells = torch.empty(len(order), dtype=torch.int64)
    cells[order] = (torch.arange(len(order)) + int(words[0]) % num_colors) // num_colors
    return cells.reshape(sample_shape)


def _order(num_colors: int, shape: tuple[int, ...], words: list[int]) -> Tensor:
    """Return the features, flat, in an order whose runs of ``num_colors`` are compact.

    It runs through strips, a tile wide, along the last axis.
    """
    sides = _sides(num_colors, shape)
    places = torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape))
    key = torch.zeros(len(places), dtype=torch.int64)
    within = []
    for axis, (side, word) in enumerate(zip(sides[:-1], words[:-1], strict=True)):
        shift = word % side if side < shape[axis] else 0
        strip = (places[:, axis] + shift) // side
        key = key * (int(strip.max()) + 1) + strip
        within.append(((places[:, axis] + shift) % side, side))
    for coordinate, size in ((places[:, -1], shape[-1]), *within):
        key = key * size + coordinate
    return key.argsort(stable=True)


def _sides(num_colors: int, shape: tuple[int, ...]) -> list[int]:
    """Return the sides of a tile: channels whole first, then as equal as the axes allow."""
    sides = [1] * len(shape)
    left = float(num_colors)
    axes = list(range(len(shape)))
    if len(shape) >= 3:
        sides[0] = max(1, min(shape[0], num_colors))
        left /= sides[0]
        axes = axes[1:]
    # The shortest axes first: what they cannot take is left to the others.
    for position, axis in enumerate(sorted(axes, key=lambda a: shape[a])):
        side = max(1.0, left) ** (1 / (len(axes) - position))
        sides[axis] = max(1, min(shape[axis], math.floor(side + 0.5)))
        left /= sides[axis]
    return sides
