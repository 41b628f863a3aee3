"""Probe designs: which vectors v are multiplied with the Jacobian.

Every estimate of diag(J) here is a mean over *blocks* of probes::

    d = weight * sum over the block of v * (J v),

unbiased when weight * E[sum over the block of v v^T] has a diagonal of ones and no other
expectation. Blocks are independent of each other, probes within a block need not be: a block
counts as one sample for a standard error. The variance of one entry from N blocks of m probes:

===================  =============================================================================
``Rademacher``       (1/N) sum_{j != i} J_ij^2                                               m = 1
``Normal``           (1/N) (2 J_ii^2 + sum_{j != i} J_ij^2)                                  m = 1
``Coloring``         (1/N) sum_{j != i of the color of i} J_ij^2               m = colors, or more
``BalancedColoring`` (1/N) (D/m - 1)/(D - 1) sum_{j != i} J_ij^2        m = colors, a divisor of D
``UnitVectors``      0                                                                       m = D
===================  =============================================================================

with J_ji in place of J_ij in reverse mode. The general designs are those of Hutchinson (1990),
Bekas, Kokiopoulou and Saad (2007), and of probing by colorings (Tang and Saad, 2012; with random
signs, Frommer, Rinelli and Schweitzer, 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.hadamard import hadamard, next_order
from hessdiag.kernels import normal_probes, rademacher
from hessdiag.kernels.philox import permutation_ranks, seed_tensor
from hessdiag.lattices import lattice_colors


@runtime_checkable
class ProbeDesign(Protocol):
    """What ``probes=`` accepts beside its names: a class of your own derives from it.

    The three methods are yours to give; the rest holds for a design that does nothing special.

    Attributes:
        is_exact: Whether one block is the whole answer, without chance.
        is_signs: Whether probe k is sign vector k of the random-number contract, which the kernels
            make again from the seed rather than read it.

    Example:
        Signs of our own, every probe a block of its own:

        >>> import hessdiag
        >>> class Spheres(hessdiag.ProbeDesign):
        ...     def block_size(self, sample_shape):
        ...         return 1
        ...     def weight(self, sample_shape):
        ...         return 1.0
        ...     def draw(self, shape, seed, *, probe_offset, sample_offset, dtype, device):
        ...         v = hessdiag.Normal().draw(shape, seed, probe_offset=probe_offset,
        ...                           sample_offset=sample_offset, dtype=dtype, device=device)
        ...         features = v[0, 0].numel()
        ...         norms = v.flatten(2).norm(dim=2).reshape(*shape[:2], *[1] * (v.dim() - 2))
        ...         return v * features**0.5 / norms
        >>> isinstance(Spheres(), hessdiag.ProbeDesign)
        True
    """

    @property
    def is_exact(self) -> bool:
        """False; True where one block is the whole answer."""
        return False

    @property
    def is_signs(self) -> bool:
        """False; True where the kernels can make the probes again."""
        return False

    def disturbing(self, sample_shape: tuple[int, ...], feature: int) -> Tensor | None:
        """Return which features disturb the estimate of one, bool of ``sample_shape``.

        The variance from one block is the energy of J there. None, the default, stands for all.
        """
        return None

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return the number m of probes in a block, for samples of shape (...)."""
        ...

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return the factor of the sum of v * (J v) over a block."""
        ...

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return probes number probe_offset .. probe_offset + M - 1, of shape (M, B, ...).

        Each must be a pure function of (seed, sample_offset + b, probe number).
        """
        ...


@dataclass(frozen=True)
class Rademacher(ProbeDesign):
    """Independent signs: the smallest variance among independent entries (Hutchinson, 1990).

    The variance of an entry from N probes is (1/N) sum_{j != i} J_ij^2, J_ji in reverse mode. A
    diagonal matrix takes one probe.

    Example:
        >>> import torch, hessdiag
        >>> x, probes = torch.zeros(1, 3), hessdiag.Rademacher()
        >>> hessdiag.estimate(torch.sin, x, max_probes=1, probes=probes).diagonal
        tensor([[1., 1., 1.]])
    """

    @property
    def is_signs(self) -> bool:
        """True."""
        return True

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return 1."""
        return 1

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return the signs of :func:`hessdiag.kernels.rademacher`."""
        return rademacher(
            shape,
            seed,
            probe_offset=probe_offset,
            sample_offset=sample_offset,
            dtype=dtype,
            device=device,
        )


@dataclass(frozen=True)
class Normal(ProbeDesign):
    """Independent standard normals: for comparison, their variance is the larger.

    That of an entry from N probes is (1/N) (2 J_ii^2 + sum_{j != i} J_ij^2), J_ji in reverse mode.

    Example:
        >>> import torch, hessdiag
        >>> x, probes = torch.zeros(1, 3), hessdiag.Normal()
        >>> result = hessdiag.estimate(torch.sin, x, max_probes=16, probes=probes)
        >>> bool((result.stderr > 0).all())    # of a diagonal matrix too
        True
    """

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return 1."""
        return 1

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return the normals of stream 1, the probe number in place of the step."""
        return normal_probes(
            shape, seed, probe_offset=probe_offset, sample_offset=sample_offset, device=device
        ).to(dtype)


@dataclass(frozen=True)
class Coloring(ProbeDesign):
    """For images: one sign vector z, taken apart into colors whose features are far apart.

    The colors are those of :mod:`hessdiag.lattices`, any number of them: what couples most,
    neighbours and the channels of a pixel, never shares a color. With z drawn once a block, probe
    k of the block is::

        one-color form   z on the features of color k, zero elsewhere;    weight 1
        dense form       z * (row k of a Hadamard matrix, at the colors); weight 1/m

    and the two have the same expectation and the same variance. In the one-color form nothing
    needs to cancel, which suits low precision, and m is the number of colors; in the dense form
    each probe is a Rademacher probe of its own, and m is the next order of a Hadamard matrix.

    Attributes:
        num_colors: At most D.
        dense: Whether to take the dense form.

    Raises:
        TypeError: If ``num_colors`` is not an int.
        ValueError: If it is below 1; in an estimator, if it is above D, or samples have no spatial
            axis.

    Example:
        >>> import torch, hessdiag
        >>> designs = hessdiag.Coloring(48), hessdiag.Coloring(27, dense=True)
        >>> tuple(design.block_size((3, 16, 16)) for design in designs)
        (48, 32)
        >>> import hessdiag
        >>> blur, x = torch.nn.AvgPool2d(3, stride=1, padding=1), torch.zeros(1, 1, 8, 8)
        >>> result = hessdiag.estimate(blur, x, max_probes=16, probes=hessdiag.Coloring(16))
        >>> bool((result.diagonal - 1 / 9).abs().max() < 1e-6)    # neighbours share no color
        True
    """

    num_colors: int
    dense: bool = False

    def __post_init__(self) -> None:
        check_positive_int("num_colors", self.num_colors)

    def colors(self, sample_shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Return the color of every feature, an int64 tensor of shape (C, ...).

        Raises:
            ValueError: If a sample has no spatial axis.
        """
        if len(sample_shape) < 2:
            raise ValueError(
                "coloring needs samples of shape (channels, ...) with a spatial axis, got "
                f"{tuple(sample_shape)}; for features without geometry use 'orthogonal'"
            )
        return lattice_colors(self.num_colors, tuple(sample_shape), device)

    def disturbing(self, sample_shape: tuple[int, ...], feature: int) -> Tensor:
        """Return the features of the same color."""
        colors = self.colors(sample_shape, "cpu")
        return colors == colors.flatten()[feature]

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return the number of colors, in the dense form rounded up to a Hadamard order.

        Raises:
            ValueError: If there are more colors than features.
        """
        _check_colors(self.num_colors, sample_shape)
        return next_order(self.num_colors) if self.dense else self.num_colors

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1, in the dense form 1/m."""
        return 1.0 / self.block_size(sample_shape) if self.dense else 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return z times what the form makes of the colors; block b takes sign vector number b."""
        block, place, z = _block_signs(
            self, shape, seed, probe_offset, sample_offset, dtype, device
        )
        colors = self.colors(shape[2:], device)
        if self.dense:
            H = hadamard(self.block_size(shape[2:])).to(device=device, dtype=dtype)
            patterns = H[place][:, colors]
        else:
            patterns = (colors == place.reshape(-1, *[1] * colors.dim())).to(dtype)
        return z[block] * patterns[:, None]


@dataclass(frozen=True)
class BalancedColoring(ProbeDesign):
    """For features without geometry: each block gives them random colors of equal numbers.

    Against as many Rademacher probes the variance is (D - m)/(D - 1), averaged over colorings:
    little for a few probes, and nothing is left of it at m = D.

    Attributes:
        num_colors: The number m of colors and probes of a block, at most D.

    Raises:
        TypeError: If ``num_colors`` is not an int.
        ValueError: If it is below 1; in an estimator, if it is above D.

    Example:
        >>> import torch, hessdiag
        >>> f, x = lambda x: x @ torch.ones(6, 6), torch.zeros(1, 6)
        >>> hessdiag.estimate(f, x, max_probes=6, probes=hessdiag.BalancedColoring(6)).diagonal
        tensor([[1., 1., 1., 1., 1., 1.]])
    """

    num_colors: int

    def __post_init__(self) -> None:
        check_positive_int("num_colors", self.num_colors)

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return the number of colors.

        Raises:
            ValueError: If there are more colors than features.
        """
        _check_colors(self.num_colors, sample_shape)
        return self.num_colors

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return z on the features of one color, zero elsewhere, with z and colors of the block."""
        block, place, z = _block_signs(
            self, shape, seed, probe_offset, sample_offset, dtype, device
        )
        first, features = probe_offset // self.num_colors, math.prod(shape[2:])
        ranks = permutation_ranks(
            seed_tensor(seed, device), first, len(z), sample_offset, shape[1], features
        )
        colors = (ranks % self.num_colors).reshape(z.shape)
        mask = colors[block] == place.reshape(-1, *[1] * (len(shape) - 1))
        return z[block] * mask.to(dtype)


@dataclass(frozen=True, eq=False)
class Partition(ProbeDesign):
    """Signs on any sets that the features are taken apart into, a probe for each.

    Attributes:
        num_sets: The number of sets, and probes of a block.
        sets: The set of every feature, int64 of the shape of a sample.
    """

    num_sets: int
    sets: Tensor

    def disturbing(self, sample_shape: tuple[int, ...], feature: int) -> Tensor:
        """Return the features of the same set."""
        return self.sets == self.sets.flatten()[feature]

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return the number of sets."""
        return self.num_sets

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return z on the features of one set, zero elsewhere, with z drawn once a block."""
        block, place, z = _block_signs(
            self, shape, seed, probe_offset, sample_offset, dtype, device
        )
        mask = self.sets.to(device) == place.reshape(-1, *[1] * self.sets.dim())
        return z[block] * mask.to(dtype)[:, None]


@dataclass(frozen=True)
class UnitVectors(ProbeDesign):
    """The D unit vectors: one block of D products is the exact diagonal.

    Example:
        >>> import torch, hessdiag
        >>> f, x = lambda x: x @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 2)
        >>> result = hessdiag.estimate(f, x, max_probes=2, probes=hessdiag.UnitVectors())
        >>> result.diagonal, result.stderr
        (tensor([[1., 4.]]), tensor([[0., 0.]]))
    """

    @property
    def is_exact(self) -> bool:
        """True."""
        return True

    def disturbing(self, sample_shape: tuple[int, ...], feature: int) -> Tensor:
        """Return none."""
        return torch.zeros(sample_shape, dtype=torch.bool)

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return D."""
        return math.prod(sample_shape)

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return unit vectors number probe_offset .., the same ones for every sample."""
        num_probes, batch, *sample_shape = shape
        features = math.prod(sample_shape)
        numbers = torch.arange(probe_offset, probe_offset + num_probes, device=device) % features
        units = torch.zeros(num_probes, features, dtype=dtype, device=device)
        units[torch.arange(num_probes, device=device), numbers] = 1.0
        return units.reshape(num_probes, 1, *sample_shape).repeat(
            1, batch, *[1] * len(sample_shape)
        )


def check_fit(
    design: ProbeDesign, sample_shape: tuple[int, ...], max_probes: int, probe_offset: int
) -> int:
    """Return the number of probes in as many whole blocks as ``max_probes`` holds.

    One block of an exact design: a second one would show the same again.

    Raises:
        ValueError: If no block fits, or ``probe_offset`` is in the middle of one.

    Example:
        >>> check_fit(Coloring(5), (3, 4), max_probes=12, probe_offset=5)
        10
    """
    size = design.block_size(sample_shape)
    if size > max_probes:
        raise ValueError(
            f"max_probes must be at least {size}, a block of {design}, got {max_probes}"
        )
    if design.is_exact:  # which takes all of them from any number on
        return size
    if probe_offset % size:
        raise ValueError(
            f"probe_offset must be a multiple of {size}, a block of {design}, got {probe_offset}"
        )
    return max_probes // size * size


def _check_colors(num_colors: int, sample_shape: tuple[int, ...]) -> None:
    features = math.prod(sample_shape)
    if num_colors > max(1, features):
        raise ValueError(
            f"num_colors must be at most the number of features, {features}, got {num_colors}"
        )


def _block_signs(
    design: ProbeDesign,
    shape: tuple[int, ...],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return block and place within it of every probe, and the sign vectors of those blocks."""
    size = design.block_size(shape[2:])
    numbers = torch.arange(probe_offset, probe_offset + shape[0], device=device)
    first, last = probe_offset // size, (probe_offset + shape[0] - 1) // size
    z = rademacher(
        (last - first + 1, *shape[1:]),
        seed,
        probe_offset=first,
        sample_offset=sample_offset,
        dtype=dtype,
        device=device,
    )
    return numbers // size - first, numbers % size, z
