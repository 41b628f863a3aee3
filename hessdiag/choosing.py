"""Which design a name stands for, and which stride a coloring has.

The stride follows the measured decay of the Jacobian. A coloring of stride s leaves the energy
E_s = sum of J_ij^2 over the other features j of the color of i. A few rows of J (columns in forward
mode), at features spread over the sample, show E_s for every s at once, and with it the variance
that N blocks of any stride would have: E_s / N. The choice is made for each sample alone, so that
it does not depend on the batch it comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.probes import (
    BalancedColoring,
    Coloring,
    Normal,
    ProbeDesign,
    Rademacher,
    UnitVectors,
)
from hessdiag.products import Products
from hessdiag.streaming import Lane, Tolerance

ProbeName = Literal["rademacher", "normal", "orthogonal", "coloring", "auto"]

# Rows that measure the decay, and the part of all probes that they may be.
NUM_PILOTS = 2
_MOST_FOR_PILOTS = 0.05
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def choose_lanes(
    products: Products,
    x: Tensor,
    probes: ProbeName | ProbeDesign,
    max_probes: int,
    tolerance: Tolerance | None,
    geometry: bool,
    notes: list[str],
) -> tuple[list[Lane], int]:
    """Return the designs of the samples, and how many products were spent on choosing them.

    Args:
        products: Products with J or its transpose.
        x: Where the Jacobian is taken.
        probes: A design, which stands for itself, or a name of :func:`hessdiag.estimate`.
        max_probes: Most products for a sample, those spent here included.
        tolerance: When the estimate will stop.
        geometry: Whether neighbours along the axes of x are close.
        notes: Takes what was chosen and why.

    Raises:
        TypeError: If ``probes`` is neither.
        ValueError: If the name is unknown, or no block of the design fits.
    """
    if not isinstance(probes, str):
        if not isinstance(probes, ProbeDesign):
            raise TypeError(
                "probes must be a name or an object with block_size, weight and draw "
                f"(hessdiag.probes.ProbeDesign), got {type(probes).__name__}"
            )
        return [Lane(probes)], 0
    if probes not in get_args(ProbeName):
        raise ValueError(f"probes must be one of {', '.join(get_args(ProbeName))}, got {probes!r}")
    if probes == "rademacher":
        return [Lane(Rademacher())], 0
    if probes == "normal":
        return [Lane(Normal())], 0
    if probes == "orthogonal":
        return _balanced_lane(x, max_probes, notes), 0
    if probes == "coloring" and x.dim() < 3:
        raise ValueError(
            "probes='coloring' needs x of shape (B, channels, ...) with a spatial axis, got "
            f"{tuple(x.shape)}; use 'orthogonal' for features without geometry"
        )
    features = max(1, x[:1].numel())
    if probes == "auto" and tolerance is None:
        if max_probes >= features:
            notes.append(f"exact, by the {features} unit vectors")
            return [Lane(UnitVectors())], 0
        if not _is_image(x, geometry):
            gain = 8 * (max_probes // 2) > features
            return (_balanced_lane(x, max_probes, notes) if gain else [Lane(Rademacher())]), 0
    return _measured_lanes(products, x, probes, max_probes, tolerance, geometry, notes)


def _balanced_lane(x: Tensor, max_probes: int, notes: list[str]) -> list[Lane]:
    """Return two blocks of as many colors as fit: one more than none for a standard error."""
    design = BalancedColoring(max(1, min(x[:1].numel(), max_probes // 2)))
    notes.append(str(design))
    return [Lane(design)]


def _measured_lanes(
    products: Products,
    x: Tensor,
    probes: ProbeName,
    max_probes: int,
    tolerance: Tolerance | None,
    geometry: bool,
    notes: list[str],
) -> tuple[list[Lane], int]:
    """Choose for each sample among the colorings that fit, and for "auto" what else there is."""
    shape, features = tuple(x.shape[1:]), max(1, x[:1].numel())
    blocks, rest = 2 if tolerance else 1, max_probes - NUM_PILOTS
    others: list[ProbeDesign] = []
    fitting: list[Coloring] = []
    measurable: list[Coloring] = []
    if probes == "auto":
        others = [Rademacher(), *([UnitVectors()] if features <= rest else [])]
    if probes == "coloring" or _is_image(x, geometry):
        # Channels apart and nothing else does not always pay: "auto" takes it only when measured.
        least = 1 if probes == "coloring" else 2
        fitting = colorings_within(shape, max_probes // blocks, least)
        measurable = colorings_within(shape, rest // blocks)
    designs: list[ProbeDesign] = [*others, *measurable]
    affordable = NUM_PILOTS <= _MOST_FOR_PILOTS * max_probes
    if fitting and (not affordable or fitting[-1] not in measurable):
        notes.append(f"{fitting[-1]}, the largest that fits, its decay not measured")
        return [Lane(fitting[-1])], 0
    if not fitting and probes == "coloring":
        raise ValueError(
            f"max_probes must be at least {blocks * shape[0]} for probes='coloring', "
            f"{'two colors' if tolerance else 'a color'} for each channel, got {max_probes}"
        )
    if not affordable or len(designs) == 1 or len(x) == 0:
        return [Lane(designs[0])], 0
    decay = measure_decay(products, x, designs)
    chosen = choose(decay, designs, shape, max_probes - NUM_PILOTS, tolerance)
    lanes = [Lane(designs[k], chosen == k) for k in sorted(set(chosen.tolist()))]
    counts = [f"{design} for {int((chosen == k).sum())}" for k, design in enumerate(designs)]
    notes.append(f"samples by the decay that {NUM_PILOTS} products show: {', '.join(counts)}")
    return lanes, NUM_PILOTS


def _is_image(x: Tensor, geometry: bool) -> bool:
    return geometry and x.dim() >= 4


@dataclass(frozen=True)
class Decay:
    """What a few rows of the Jacobian say.

    Attributes:
        energy: For each design the mean over the rows of E_s, shape (B, number of designs).
        diagonal: The mean square of the diagonal entries of the rows, shape (B,).
    """

    energy: Tensor
    diagonal: Tensor


def colorings_within(
    sample_shape: tuple[int, ...], max_probes: int, least: int = 1
) -> list[Coloring]:
    """Return the colorings of strides 1, 2, 4, ... from ``least`` on whose block fits.

    Example:
        >>> [coloring.stride for coloring in colorings_within((3, 16, 16), 50)]
        [1, 2, 4]
    """
    strides = [least]
    while strides[-1] < max(sample_shape[1:]):
        strides.append(2 * strides[-1])
    colorings = [Coloring(stride) for stride in strides]
    return [c for c in colorings if c.num_colors(sample_shape) <= max_probes]


def measure_decay(products: Products, x: Tensor, designs: list[ProbeDesign]) -> Decay:
    """Measure the decay with :data:`NUM_PILOTS` unit vectors.

    Args:
        products: Products with J or its transpose.
        x: Where the Jacobian is taken, shape (B, C, ...).
        designs: Colorings, or designs that leave the energy of the whole row.
    """
    num_features = x[0].numel()
    # Spread by the golden ratio, over positions and channels alike.
    picked = [int(num_features * ((k + 0.5) * _GOLDEN % 1.0)) for k in range(NUM_PILOTS)]
    units = torch.zeros(NUM_PILOTS, num_features, dtype=x.dtype, device=x.device)
    units[torch.arange(NUM_PILOTS), picked] = 1.0
    units = units[:, None].repeat(1, len(x), 1).reshape(NUM_PILOTS, *x.shape)
    rows = products(units).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    own = torch.stack([row[:, i] for row, i in zip(rows, picked, strict=True)])
    energies = []
    for design in designs:
        energy = torch.zeros(len(x), dtype=rows.dtype, device=x.device)
        for row, i in zip(rows, picked, strict=True):
            squares = row.square()
            squares[:, i] = 0.0
            if isinstance(design, UnitVectors):
                squares = torch.zeros_like(squares)
            elif isinstance(design, Coloring):
                colors = design.colors(tuple(x.shape[1:]), x.device).flatten()
                squares = squares * (colors == colors[i])
            energy += squares.sum(dim=1) / NUM_PILOTS
        energies.append(energy)
    return Decay(torch.stack(energies, dim=1), own.square().mean(dim=0))


def choose(
    decay: Decay,
    designs: list[ProbeDesign],
    sample_shape: tuple[int, ...],
    max_probes: int,
    tolerance: Tolerance | None,
) -> Tensor:
    """Return for each sample the number of the best design, shape (B,).

    Without a tolerance that is the one of least variance after ``max_probes``; with one, that
    which reaches it with fewest probes, and two blocks at least.
    """
    sizes = torch.tensor(
        [design.block_size(sample_shape) for design in designs], device=decay.energy.device
    )
    blocks = max_probes // sizes
    variance = decay.energy / blocks
    if tolerance is None:
        return variance.argmin(dim=1)
    target = (tolerance.atol + tolerance.rtol * decay.diagonal.sqrt()).square()
    # A standard error needs two blocks, but for the exact diagonal.
    least = torch.tensor([1 if isinstance(d, UnitVectors) else 2 for d in designs]).to(sizes)
    needed = torch.maximum(torch.ceil(decay.energy / target[:, None]), least)
    cost = torch.where(needed <= blocks, needed * sizes, torch.inf)
    reachable = torch.isfinite(cost).any(dim=1)
    variance = torch.where(blocks >= least, variance, torch.inf)
    return torch.where(reachable, cost.argmin(dim=1), variance.argmin(dim=1))
