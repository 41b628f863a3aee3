"""Which design a name stands for, and how many colors a coloring has.

A coloring leaves the energy E = sum of J_ij^2 over the other features j of the color of i. Without
a tolerance "auto" measures it on the way (:mod:`hessdiag.piloting`). With one, or for "coloring",
a few rows of J (columns in forward mode), at features drawn over the sample, show E for any number
of colors, and with it the variance that N blocks of them would have: E / N. The choice is made for
each sample alone, so that it does not depend on the batch it comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.cells import cell_colors, random_words
from hessdiag.piloting import first_pilot_warns, lattice_is_better, plan
from hessdiag.probes import (
    BalancedColoring,
    Coloring,
    Normal,
    Partition,
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
_WORTH_IT = 7 / 8


@dataclass(frozen=True, eq=False)
class Start:
    """Products that were taken before the choice.

    Attributes:
        lanes: The designs of the samples.
        num_spent: Products that served the choice alone.
        begun: The first probes of every lane, (m, B, ...), and their products, if taken already.
    """

    lanes: list[Lane]
    num_spent: int = 0
    begun: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be estimated, as far as the choice of a design needs it.

    Attributes:
        x: Where the Jacobian is taken.
        max_probes: Most products for a sample, those that serve the choice included.
        tolerance: When the estimate will stop.
        geometry: Whether neighbours along the axes of x are close.
        total: Whether it is the sum of the diagonal that counts.
        seed: Seed of the probes, on the device of x.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
    """

    x: Tensor
    max_probes: int
    tolerance: Tolerance | None
    geometry: bool
    total: bool
    seed: Tensor
    sample_offset: int
    probe_offset: int

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(self.x.shape[1:])


def checked_design(probes: ProbeDesign) -> ProbeDesign:
    """Return ``probes``, unless it is no design.

    Raises:
        TypeError: If it is none.

    Example:
        >>> checked_design(Rademacher())
        Rademacher()
    """
    if isinstance(probes, type):
        raise TypeError(f"probes must be an object, got the class {probes.__name__}: call it")
    # By descent first: to ask a protocol takes longer than all else here.
    if ProbeDesign in type(probes).__mro__ or isinstance(probes, ProbeDesign):
        return probes
    raise TypeError(
        "probes must be a name or a design, an object of a class that derives from "
        f"hessdiag.ProbeDesign, got {type(probes).__name__}"
    )


def choose_start(
    products: Products, request: Request, probes: ProbeName, notes: list[str]
) -> Start:
    """Return the designs of the samples, and the products that choosing them took.

    Args:
        products: Products with J or its transpose.
        request: What is to be estimated.
        probes: A name of :func:`hessdiag.estimate`.
        notes: Takes what was chosen and why.

    Raises:
        ValueError: If the name is unknown, or no block of the design fits.
    """
    if probes not in get_args(ProbeName):
        raise ValueError(f"probes must be one of {', '.join(get_args(ProbeName))}, got {probes!r}")
    x = request.x
    if probes == "coloring" and x.dim() < 3:
        raise ValueError(
            "probes='coloring' needs x of shape (B, channels, ...) with a spatial axis, got "
            f"{tuple(x.shape)}; use 'orthogonal' for features without geometry"
        )
    if probes == "normal":
        return Start([Lane(Normal())])
    if probes == "rademacher" or x.numel() == 0:
        return Start([Lane(Rademacher())])
    if probes == "orthogonal":
        return Start(_balanced_lane(x, request.max_probes, notes))
    if probes == "auto" and request.tolerance is None:
        return _least_variance(products, request, notes)
    return _by_rows(products, request, probes, notes)


def _least_variance(products: Products, request: Request, notes: list[str]) -> Start:
    """Return what "auto" is without a tolerance."""
    x, max_probes, shape = request.x, request.max_probes, request.sample_shape
    features = x[:1].numel()
    if max_probes >= features:
        return _unit_vectors(features, notes)
    if len(shape) < 2 or not request.geometry or max_probes == 1:
        return Start(_without_geometry(x, max_probes, notes))
    seed, block = int(request.seed), request.probe_offset // max_probes
    sets = plan(shape, max_probes, seed, block)
    if sets is None:
        notes.append(f"random cells of {max_probes} colors")
        colors = cell_colors(max_probes, shape, seed, block)
        return Start([Lane(Partition(max_probes, colors.to(x.device)))])
    lattice, cells, early = (
        Partition(max_probes, numbers.to(x.device))
        for numbers in (sets.lattice, sets.cells, sets.early)
    )

    def draw(design: ProbeDesign, first: int, count: int) -> Tensor:
        return design.draw(
            (count, *x.shape),
            request.seed,
            probe_offset=request.probe_offset + first,
            sample_offset=request.sample_offset,
            dtype=x.dtype,
            device=x.device,
        )

    pilots = draw(lattice, 0, 1)
    taken = products(pilots)
    warned = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if sets.num_pilots > 1:
        warned = first_pilot_warns(sets, taken)
        number, over = sets.num_pilots - 1, warned.reshape(-1, *[1] * len(shape))
        further = torch.where(over, draw(early, 1, number), draw(lattice, 1, number))
        pilots, taken = torch.cat([pilots, further]), torch.cat([taken, products(further)])
    better = lattice_is_better(sets, taken) & ~warned
    count = int(better.sum())
    notes.append(
        f"samples by what {sets.num_pilots} of the products show: a lattice of "
        f"{max_probes - sets.num_pilots} colors for {count}, random cells for {len(x) - count}"
    )
    ways = ((lattice, better), (cells, ~better & ~warned), (early, warned))
    lanes = [Lane(design, samples) for design, samples in ways if bool(samples.any())]
    if len(lanes) == 1:
        lanes = [Lane(lanes[0].design)]
    return Start(lanes, 0, (pilots, taken))


def _unit_vectors(features: int, notes: list[str]) -> Start:
    notes.append(f"exact, by the {features} unit vectors")
    return Start([Lane(UnitVectors())])


def _without_geometry(x: Tensor, max_probes: int, notes: list[str]) -> list[Lane]:
    """Return two balanced colorings where that gains more than an eighth, else Rademacher."""
    features, colors = x[:1].numel(), max_probes // 2
    if colors and (features / colors - 1) / (features - 1) / 2 < _WORTH_IT / max_probes:
        return _balanced_lane(x, max_probes, notes)
    return [Lane(Rademacher())]


def _by_rows(products: Products, request: Request, probes: ProbeName, notes: list[str]) -> Start:
    """Return what a few rows of J speak for: for "coloring", or where there is a tolerance."""
    x, tolerance = request.x, request.tolerance
    features = x[:1].numel()
    rest = request.max_probes - NUM_PILOTS
    geometry = request.geometry and x.dim() >= 3
    affordable = NUM_PILOTS <= _MOST_FOR_PILOTS * request.max_probes
    designs: list[ProbeDesign] = []
    if probes == "auto":
        # Products that choose are worth it where they leave a choice, of colorings or unit vectors.
        chooses = affordable and (geometry or features <= rest)
        if features <= request.max_probes and not chooses:
            return _unit_vectors(features, notes)
        if not affordable:
            return Start([Lane(Rademacher())])
        designs = [Rademacher(), *([UnitVectors()] if features <= rest else [])]
    if probes == "coloring" or geometry:
        number = rest if affordable else request.max_probes
        designs = [*_colorings(number, features, tolerance), *designs]
    if not affordable or len(designs) == 1:
        notes.append(str(designs[0]))
        return Start([Lane(designs[0])])
    lanes = _measured_lanes(products, request, designs, rest, notes)
    return Start(lanes, NUM_PILOTS)


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
    request: Request,
    designs: list[ProbeDesign],
    max_probes: int,
    notes: list[str],
) -> list[Lane]:
    x = request.x
    # Blocks of estimates that are continued take the same rows, and so the same design.
    words = random_words(int(request.seed), 4, 0, NUM_PILOTS).tolist()
    picked = [word % x[0].numel() for word in words]
    decay = measure_decay(products, x, designs, picked)
    chosen = choose(decay, designs, request, max_probes)
    numbers = sorted(set(chosen.tolist()))
    counts = [f"{designs[k]} for {int((chosen == k).sum())}" for k in numbers]
    notes.append(f"samples by the decay that {NUM_PILOTS} products show: {', '.join(counts)}")
    if len(numbers) == 1:
        return [Lane(designs[numbers[0]])]
    return [Lane(designs[k], chosen == k) for k in numbers]


@dataclass(frozen=True)
class Decay:
    """What a few rows of the Jacobian say.

    Attributes:
        energy: For each design the mean over the rows of its E, shape (B, number of designs).
        diagonal: The mean square of the diagonal entries of the rows, shape (B,).
        trace: The square of their mean, times that of the number of features, shape (B,).
    """

    energy: Tensor
    diagonal: Tensor
    trace: Tensor


def measure_decay(
    products: Products, x: Tensor, designs: list[ProbeDesign], picked: list[int]
) -> Decay:
    """Measure the decay with unit vectors.

    Args:
        products: Products with J or its transpose.
        x: Where the Jacobian is taken, shape (B, ...).
        designs: Those to choose from.
        picked: The features of the unit vectors, flat.
    """
    num_features, count = x[0].numel(), len(picked)
    units = torch.zeros(count, num_features, dtype=x.dtype, device=x.device)
    units[torch.arange(count), picked] = 1.0
    units = units[:, None].repeat(1, len(x), 1).reshape(count, *x.shape)
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
            energy += squares.sum(dim=1) / count
        energies.append(energy)
    trace = (num_features * own.mean(dim=0)).square()
    return Decay(torch.stack(energies, dim=1), own.square().mean(dim=0), trace)


def choose(decay: Decay, designs: list[ProbeDesign], request: Request, max_probes: int) -> Tensor:
    """Return for each sample the number of the best design, shape (B,).

    Without a tolerance that is the first, unless another has less than half of its variance after
    ``max_probes``; with one, that which reaches it with fewest probes, and two blocks at least.
    """
    tolerance = request.tolerance
    sizes = torch.tensor(
        [design.block_size(request.sample_shape) for design in designs],
        device=decay.energy.device,
    )
    blocks = max_probes // sizes
    variance = decay.energy / blocks
    if tolerance is None:
        # Two rows are a rough measure: the first design stands until another is clearly better.
        variance[:, 0] /= _CLEARLY_BETTER
        return variance.argmin(dim=1)
    # Of a sum, the variances of its terms add up, twice where J is symmetric.
    energy = decay.energy * (2 * request.x[0].numel() if request.total else 1)
    square = decay.trace if request.total else decay.diagonal
    target = (tolerance.atol + tolerance.rtol * square.sqrt()).square()
    # A standard error needs two blocks, but for the exact diagonal.
    least = torch.tensor([1 if design.is_exact else 2 for design in designs]).to(sizes)
    needed = torch.maximum(torch.ceil(energy / target[:, None]), least)
    cost = torch.where(needed <= blocks, needed * sizes, torch.inf)
    reachable = torch.isfinite(cost).any(dim=1)
    variance = torch.where(blocks >= least, variance, torch.inf)
    return torch.where(reachable, cost.argmin(dim=1), variance.argmin(dim=1))
