"""Which design a name stands for, and how many colors a coloring has.

That number follows the measured decay of the Jacobian. A coloring leaves the energy E = sum of
J_ij^2 over the other features j of the color of i. A few rows of J (columns in forward mode), at
features spread over the sample, show E for any number of colors, and with it the variance that N
blocks of them would have: E / N. The choice is made for each sample alone, so that it does not
depend on the batch it comes in.
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
_CLEARLY_BETTER = 2.0
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
                "probes must be a name or a design, an object of a class that derives from "
                f"hessdiag.ProbeDesign, got {type(probes).__name__}"
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
    designs: list[ProbeDesign] = []
    if probes == "coloring" or _is_image(x, geometry):
        designs = [*_colorings(max_probes, features, tolerance)]
    rest = max_probes - NUM_PILOTS
    others: list[ProbeDesign] = []
    if probes == "auto":
        others = [Rademacher(), *([UnitVectors()] if features <= rest else [])]
    affordable = NUM_PILOTS <= _MOST_FOR_PILOTS * max_probes
    if not affordable or len(designs + others) == 1 or len(x) == 0:
        design = [*designs, *others][0]
        notes.append(str(design))
        return [Lane(design)], 0
    designs = [*(_colorings(rest, features, tolerance) if designs else []), *others]
    return _measured_lanes(products, x, designs, rest, tolerance, notes), NUM_PILOTS


def _balanced_lane(x: Tensor, max_probes: int, notes: list[str]) -> list[Lane]:
    """Return two blocks of as many colors as fit: one more than none for a standard error."""
    design = BalancedColoring(max(1, min(x[:1].numel(), max_probes // 2)))
    notes.append(str(design))
    return [Lane(design)]


def _colorings(max_probes: int, features: int, tolerance: Tolerance | None) -> list[Coloring]:
    """Return the colorings to choose from, the one for when nothing is measured first."""
    blocks = [1, 2, 4] if tolerance is None else [2 ** (k + 1) for k in range(8)]
    numbers = [min(features, max_probes // count) for count in blocks]
    return [Coloring(number) for number in dict.fromkeys(numbers) if number > 0] or [Coloring(1)]


def _measured_lanes(
    products: Products,
    x: Tensor,
    designs: list[ProbeDesign],
    max_probes: int,
    tolerance: Tolerance | None,
    notes: list[str],
) -> list[Lane]:
    shape = tuple(x.shape[1:])
    chosen = choose(measure_decay(products, x, designs), designs, shape, max_probes, tolerance)
    numbers = sorted(set(chosen.tolist()))
    counts = [f"{designs[k]} for {int((chosen == k).sum())}" for k in numbers]
    notes.append(f"samples by the decay that {NUM_PILOTS} products show: {', '.join(counts)}")
    return [Lane(designs[k], chosen == k) for k in numbers]


def _is_image(x: Tensor, geometry: bool) -> bool:
    return geometry and x.dim() >= 4


@dataclass(frozen=True)
class Decay:
    """What a few rows of the Jacobian say.

    Attributes:
        energy: For each design the mean over the rows of its E, shape (B, number of designs).
        diagonal: The mean square of the diagonal entries of the rows, shape (B,).
    """

    energy: Tensor
    diagonal: Tensor


def measure_decay(products: Products, x: Tensor, designs: list[ProbeDesign]) -> Decay:
    """Measure the decay with :data:`NUM_PILOTS` unit vectors.

    Args:
        products: Products with J or its transpose.
        x: Where the Jacobian is taken, shape (B, C, ...).
        designs: Those to choose from.
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
            disturbing = design.disturbing(tuple(x.shape[1:]), i)
            if disturbing is not None:
                squares = squares * disturbing.flatten().to(x.device)
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

    Without a tolerance that is the first, unless another has less than half of its variance after
    ``max_probes``; with one, that which reaches it with fewest probes, and two blocks at least.
    """
    sizes = torch.tensor(
        [design.block_size(sample_shape) for design in designs], device=decay.energy.device
    )
    blocks = max_probes // sizes
    variance = decay.energy / blocks
    if tolerance is None:
        # Two rows are a rough measure: the first design stands until another is clearly better.
        variance[:, 0] /= _CLEARLY_BETTER
        return variance.argmin(dim=1)
    target = (tolerance.atol + tolerance.rtol * decay.diagonal.sqrt()).square()
    # A standard error needs two blocks, but for the exact diagonal.
    least = torch.tensor([1 if design.is_exact else 2 for design in designs]).to(sizes)
    needed = torch.maximum(torch.ceil(decay.energy / target[:, None]), least)
    cost = torch.where(needed <= blocks, needed * sizes, torch.inf)
    reachable = torch.isfinite(cost).any(dim=1)
    variance = torch.where(blocks >= least, variance, torch.inf)
    return torch.where(reachable, cost.argmin(dim=1), variance.argmin(dim=1))
