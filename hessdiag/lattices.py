"""Colorings of images by lattices, which keep features of one color far apart.

The color of a feature of a sample (C, n_1, ..., n_d) is::

    (x_1 + b_2 x_2 + ... + b_d x_d + g * channel) modulo m,

so that the features of one color form a lattice through positions and channels alike, and any
number m of colors is to be had. The coefficients are those, among all or 16,384 drawn ones, that
minimise the sum over pairs of one color of (distance^2 + [channels differ])^-3, which stands for
the energy of a Jacobian that falls off with distance. Channels at one position are neighbours, so
they are kept apart first of all; further off, a color takes turns through the channels, since
what couples at a distance is most of all the same channel.

The variance of as many Rademacher probes over that of M colors, on a U-Net trained on CIFAR-10 at
16x16 (cosine schedule), and over that of the colors (row mod s, column mod s, channel) for strides
s = 2 and 4 (benchmarks/results/cpu/estimators.json):

=====  =====  ======  ======  =======  ===========  ===========
t      M = 4  M = 12  M = 48  M = 192  strides, 12  strides, 48
=====  =====  ======  ======  =======  ===========  ===========
5      4.2    17.9    566.7   2947.1   8.70         247.76
50     5.6    11.9    77.1    461.6    3.67         24.87
200    2.1    4.3     14.8    69.8     1.51         3.15
500    1.3    2.0     5.7     21.7     0.90         1.25
900    1.1    1.4     2.8     5.1      0.88         1.09
=====  =====  ======  ======  =======  ===========  ===========
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hessdiag.kernels.philox import philox

_MOST_CANDIDATES = 2**14
_MOST_IN_BALL, _MOST_OFFSETS = 2**20, 2**12
_NEAREST, _SHORTLIST = 2**8, 2**9


def lattice_colors(
    num_colors: int, sample_shape: tuple[int, ...], device: torch.device | str
) -> Tensor:
    """Return the color of every feature, int64 of shape ``sample_shape`` with values 0 .. m - 1.

    Args:
        num_colors: The number m of colors.
        sample_shape: (C, n_1, ..., n_d) with d of at least 1.
        device: Where to make it.

    Example:
        >>> lattice_colors(4, (1, 4, 4), "cpu")
        tensor([[[0, 2, 0, 2],
                 [1, 3, 1, 3],
                 [2, 0, 2, 0],
                 [3, 1, 3, 1]]])
    """
    coefficients = _best_coefficients(num_colors, tuple(sample_shape))
    color = torch.zeros((), dtype=torch.int64, device=device)
    for size, coefficient in zip(sample_shape, coefficients, strict=True):
        color = color[..., None] + coefficient * torch.arange(size, device=device)
    return color % num_colors


def channels_first(sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a sample with the axis of channels first: of two axes, the shorter.

    Example:
        >>> channels_first((64, 16)), channels_first((3, 32, 8))
        ((16, 64), (3, 32, 8))
    """
    shape = tuple(sample_shape)
    return shape[::-1] if len(shape) == 2 and shape[0] > shape[1] else shape


def turned_lattice(num_colors: int, sample_shape: tuple[int, ...], words: list[int]) -> Tensor:
    """Return the colors of one of the lattices that are as good as :func:`lattice_colors`.

    Mirrored along any axis, with axes of one length exchanged, and begun with any color.

    Args:
        num_colors: The number m of colors.
        sample_shape: Shape of a sample; of three axes or more the first is that of channels, of
            two the shorter.
        words: Random numbers, one for each axis and two more.

    Example:
        >>> turned_lattice(4, (1, 2, 4), [0, 1, 0, 0, 1])
        tensor([[[1, 3, 1, 3],
                 [2, 0, 2, 0]]])
    """
    shape = tuple(sample_shape)
    coefficients = list(_best_coefficients(num_colors, channels_first(shape)))
    if channels_first(shape) != shape:
        coefficients.reverse()
    turn, first, *signs = words
    # Axes of positions that are as long as the last take each other's place.
    alike = [axis for axis in range(1, len(shape)) if shape[axis] == shape[-1]]
    moved = alike[turn % len(alike) :] + alike[: turn % len(alike)]
    taken = dict(zip(alike, moved, strict=True))
    color = torch.tensor(first % num_colors)
    for axis, (size, word) in enumerate(zip(shape, signs, strict=False)):
        coefficient = coefficients[taken.get(axis, axis)] * (-1 if word % 2 else 1)
        color = color[..., None] + coefficient * torch.arange(size)
    return color % num_colors


@lru_cache(maxsize=512)
def lattice_cost(num_colors: int, sample_shape: tuple[int, ...]) -> tuple[float, int, float]:
    """Return what the best lattice costs, and what a feature costs in another class.

    Returns:
        The cost above of all pairs of a class; the number k such that a feature of class c is
        furthest from those of class (c + k) mod m; and the cost of its pairs with these.

    Example:
        >>> cost, k, moved = lattice_cost(12, (3, 16, 16))
        >>> cost > lattice_cost(48, (3, 16, 16))[0], k, moved < 1
        (True, 5, True)
    """
    shape = tuple(sample_shape)
    offsets, weights = _weighted_offsets(num_colors, shape)
    place = (offsets @ torch.tensor(_best_coefficients(num_colors, shape))) % num_colors
    ordered = torch.zeros(num_colors, dtype=torch.int64)
    ordered.index_add_(0, place, weights).index_add_(0, -place % num_colors, weights)
    other = ordered.clone()
    other[0] = int(ordered.max()) + 1
    best = int((other == other.min()).nonzero()[0])
    return int(ordered[0]) / 2**31, best, int(ordered[best]) / 2**30 / math.prod(shape)


@lru_cache(maxsize=512)
def _best_coefficients(m: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the coefficients of channel and positions, that of the first position being 1.

    Integers throughout, so that every machine finds the same.
    """
    offsets, weights = _weighted_offsets(m, shape)
    candidates = _candidates(m, shape)
    if len(candidates) > _SHORTLIST:
        nearest = _costs(candidates, offsets[:_NEAREST], weights[:_NEAREST], m)
        candidates = candidates[nearest.argsort(stable=True)[:_SHORTLIST]]
    costs = _costs(candidates, offsets, weights, m)
    best = candidates[int((costs == costs.min()).nonzero()[0])]
    return tuple(best.tolist())


def _costs(candidates: Tensor, offsets: Tensor, weights: Tensor, m: int) -> Tensor:
    """Return for each candidate the weights of the offsets between features of one color."""
    # All numbers stay below 2**53, so that float64 is exact, and matrix products are fast.
    place = (candidates.double() @ offsets.double().T).long()
    return (place % m == 0).double() @ weights.double()


def _weighted_offsets(m: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return differences between features, one of each pair of opposites, and what they cost."""
    # A ball of this radius holds several features of every color.
    reach = math.ceil((8 * m) ** (1 / (len(shape) - 1)))
    most = int((_MOST_IN_BALL / (2 * shape[0] - 1)) ** (1 / (len(shape) - 1)) / 2)
    reach = max(1, min(reach, most))
    ranges = [torch.arange(1 - shape[0], shape[0])]
    ranges += [torch.arange(-min(reach, size - 1), min(reach, size - 1) + 1) for size in shape[1:]]
    offsets = torch.cartesian_prod(*ranges)
    offsets = offsets[len(offsets) // 2 + 1 :]
    if len(offsets) == 0:  # a single feature
        return torch.zeros(1, len(shape), dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    distance = offsets[:, 1:].square().sum(dim=1) + (offsets[:, 0] != 0)
    pairs = (torch.tensor(shape) - offsets.abs()).prod(dim=1)
    weights = pairs * (2**30 // distance**3)
    order = weights.argsort(descending=True, stable=True)[:_MOST_OFFSETS]
    return offsets[order], weights[order]


def _candidates(m: int, shape: tuple[int, ...]) -> Tensor:
    """Return coefficients to try, int64 of shape (number, axes)."""
    channels, *positions = shape
    sizes = [m if channels > 1 else 1, 1, *(m for _ in positions[1:])]
    if math.prod(sizes) <= _MOST_CANDIDATES:
        free = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    else:
        numbers, zero = torch.arange(_MOST_CANDIDATES), torch.tensor(0)
        words = [philox(zero, numbers, zero + axis, zero, zero)[0] for axis in range(len(sizes))]
        free = torch.stack([word % size for word, size in zip(words, sizes, strict=True)], dim=1)
    free = free.reshape(-1, len(sizes))
    free[:, 1] = 1
    return free
