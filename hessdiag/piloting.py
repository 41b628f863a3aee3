"""One block of probes that becomes a lattice of colors where its first products say that it may.

A lattice (:mod:`hessdiag.lattices`) keeps close features apart at the price of others, at its own
period, that always meet: four to twelve times the variance of Rademacher probes, where a Jacobian
couples just those. Random cells (:mod:`hessdiag.cells`) are never worse and gain less. So the
first probes, the pilots, each have a random part A of a class C of the lattice. They estimate the
features of A like any other, and at the rest of C, where no entry of the diagonal disturbs, they
show what the lattice would leave. From the products y the energies for a pair of features are::

    heard   mean of y_i^2 / |A| over the i in C but not in A: of pairs in a class,
    far     mean of y_i^2 / |A| over the i further from A than classes are from themselves,
    all     sum of y_i^2 / (|A| (D - 1)): of any pair, which is what random cells leave at most.

Where n outputs hear, (n heard + 12 far) / (n + 12) stands for the lattice: what falls off with
distance speaks for it from the start, anything else has to be heard. Few large outputs say less
than many alike, so n is the listeners' part of (sum of y^2)^2 / sum of y^4; in the same way "far"
is held against "all". Where that, and "heard" itself, are clearly below "all", the lattice's
classes follow, the rest of C as one more or moved to another one; else random cells of what A
leaves. Every feature is in one probe, with signs of its own that no decision has seen, so the
estimate stays unbiased. Which of the lattices of the same quality it is, turned and mirrored, is
drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hessdiag.cells import cell_colors, random_words
from hessdiag.lattices import channels_first, lattice_cost, turned_lattice

# Features that listen, beyond which no further pilot is taken.
_ENOUGH_LISTENERS = 16
# Outputs that "far" counts for.
_PRIOR = 12.0
# Outputs that "all" counts for against "far".
_PRIOR_FAR = 4.0
# What a single listener adds to the cost of a lattice, relative to it: few may err.
_DOUBT = 0.2
# Tenths of a class that a pilot has where the rest moves to another one.
_PROBED = 6
# What the pilots may add to the variance where J has no structure at all.
_MOST_ADDED = 0.045
# The part of all features that pilots may have: theirs is a lattice's variance, whatever they show.
_MOST_PILOTED = 0.04
# Below this part of all energy a lattice is clearly better.
_CLEARLY = 0.8
# Distances between more pairs than that are not worth their time; as many features listen then.
_MOST_PAIRS = 2**20


@dataclass(frozen=True, eq=False)
class Plan:
    """Ways to go on after the same pilots: sets of features, one for each probe.

    Attributes:
        num_pilots: Probes 0 .. num_pilots - 1 are those of both.
        lattice: The number of each feature's probe with a lattice, int64 of shape (...).
        cells: The same with random cells.
        early: The same with random cells right after the first pilot.
        listeners: For each pilot the features that listen, bool of shape (num_pilots, D).
        far: For each pilot the features that are far from it, bool of shape (num_pilots, D).
    """

    num_pilots: int
    lattice: Tensor
    cells: Tensor
    early: Tensor
    listeners: Tensor
    far: Tensor


@lru_cache(maxsize=4)
def plan(sample_shape: tuple[int, ...], num_probes: int, seed: int, block: int) -> Plan | None:
    """Return the sets of features of a block, or None where pilots would cost too much.

    Args:
        sample_shape: Shape of a sample, of two axes or more. Of three or more the first is that
            of channels, of two the shorter.
        num_probes: Probes of the block, fewer than features.
        seed: Seed of the design.
        block: Number of the block.
    """
    features = math.prod(sample_shape)
    lattices = [
        _lattice(sample_shape, num_probes, number)
        for number in _numbers_of_pilots(features, num_probes)
    ]
    if not lattices:
        return None
    # What networks couple at a distance is mostly at a power of two.
    odd = [lattice for lattice in lattices if lattice.num_colors % 2 or lattice.moved is not None]
    num_pilots, m, tenths, moved, _ = min(odd or lattices, key=lambda lattice: lattice.cost)
    colors = turned_lattice(m, sample_shape, random_words(seed, 2, block, 16).tolist()).flatten()
    # The largest classes have most to say.
    classes = colors.bincount(minlength=m).argsort(descending=True, stable=True)[:num_pilots]
    numbers = torch.ones(m, dtype=torch.int64)
    if m == num_probes:
        numbers[classes] = 0
    numbers = numbers.cumsum(0) + num_pilots - 1
    lattice = numbers[colors]
    cells, early = (
        count + cell_colors(num_probes - count, sample_shape, seed, block).flatten()
        for count in (num_pilots, 1)
    )
    keys = random_words(seed, 3, block, len(colors))
    listeners = torch.zeros(num_pilots, len(colors), dtype=torch.bool)
    far = torch.ones_like(listeners)
    for k, color in enumerate(classes.tolist()):
        members = (colors == color).nonzero()[:, 0]
        members = members[keys[members].argsort(stable=True)]
        probed = -(-len(members) * tenths // 10)
        lattice[members[:probed]] = cells[members[:probed]] = k
        if k == 0:
            early[members[:probed]] = k
        listeners[k, members[probed:]] = True
        far[k] = _far(sample_shape, members, probed)
        if moved is not None:
            away = ((color + step) % m for step in (moved, -moved, *range(1, m)))
            target = next(other for other in away if other not in classes)
            lattice[members[probed:]] = numbers[target]
    lattice, cells, early = (sets.reshape(sample_shape) for sets in (lattice, cells, early))
    return Plan(num_pilots, lattice, cells, early, listeners, far)


class _Lattice(NamedTuple):
    """A lattice and its pilots, and where the rest of their classes is.

    The rest is a probe of its own, with a color less for each pilot; or, where classes are large,
    it moves to another class, that which is furthest away.
    """

    num_pilots: int
    num_colors: int
    tenths: int
    moved: int | None
    cost: float


def _lattice(shape: tuple[int, ...], num_probes: int, num_pilots: int) -> _Lattice:
    """Return the lattice that costs less with that many pilots."""
    shape, rest = channels_first(shape), num_probes - num_pilots
    own = lattice_cost(rest, shape)[0] * (1 - num_pilots / (2 * rest))
    whole, moved, each = lattice_cost(num_probes, shape)
    listeners = num_pilots * math.prod(shape) / num_probes / 2
    whole += each * 2 * listeners * (1 - _PROBED / 10)
    doubt = 1 + _DOUBT / listeners
    if whole < own:
        return _Lattice(num_pilots, num_probes, _PROBED, moved, doubt * whole)
    return _Lattice(num_pilots, rest, 5, None, doubt * own)


def first_pilot_warns(plan: Plan, products: Tensor) -> Tensor:
    """Return for each sample whether the first pilot heard more than random cells leave, (B,).

    A pilot's own features have a lattice's variance, whatever it shows: no further one is taken.

    Args:
        plan: The sets.
        products: Those of the first pilot, shape (1, B, ...).
    """
    energies = _energies(plan, products)
    return energies.heard > energies.all_pairs


def lattice_is_better(plan: Plan, products: Tensor) -> Tensor:
    """Return for each sample whether the products of the pilots speak for the lattice, (B,).

    Args:
        plan: The sets.
        products: Those of the pilots, shape (num_pilots, B, ...).
    """
    energies = _energies(plan, products)
    beyond = torch.lerp(energies.all_pairs, energies.far, _share(energies.count_far, _PRIOR_FAR))
    expected = torch.lerp(beyond, energies.heard, _share(energies.count_heard, _PRIOR))
    return torch.maximum(expected, energies.heard) < _CLEARLY * energies.all_pairs


def _share(count: Tensor, prior: float) -> Tensor:
    return count / (count + prior)


class _Energies(NamedTuple):
    """Energies for a pair of features, and how many outputs stand behind two of them: (B,) each."""

    heard: Tensor
    far: Tensor
    all_pairs: Tensor
    count_heard: Tensor
    count_far: Tensor


def _energies(plan: Plan, products: Tensor) -> _Energies:
    y = products.flatten(2).to(torch.promote_types(products.dtype, torch.float32))
    tiny = torch.finfo(y.dtype).tiny
    # Only ratios count, and no power may overflow.
    energy = (y / y.abs().amax(dim=(0, 2))[:, None].clamp(min=tiny)).square()
    number = len(products)
    listeners, far = (sets[:number].to(energy.device) for sets in (plan.listeners, plan.far))
    numbers = plan.lattice.flatten().to(energy.device)
    own = torch.arange(number, device=energy.device)[:, None] == numbers
    probed = own.sum(dim=1, keepdim=True)

    def for_a_pair(where: Tensor) -> Tensor:
        return (energy * where[:, None]).sum(dim=(0, 2)) / (where * probed).sum().clamp(min=1)

    outputs = energy * ~own[:, None]
    alike = outputs.sum(dim=(0, 2)).square() / outputs.square().sum(dim=(0, 2)).clamp(min=tiny)
    counts = [alike * where.sum() / (~own).sum() for where in (listeners, far)]
    return _Energies(for_a_pair(listeners), for_a_pair(far), for_a_pair(~own), *counts)


def _far(shape: tuple[int, ...], members: Tensor, half: int) -> Tensor:
    """Return which features are as far from the first half of a class as it is from itself.

    All of them but the class, where that would be too much to find out.
    """
    size = math.prod(shape)
    far = torch.ones(size, dtype=torch.bool)
    if size * len(members) <= _MOST_PAIRS and len(members) > 1:
        places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(size, len(shape))
        square = torch.zeros(size, len(members), dtype=torch.int64)
        for axis, place in enumerate(places.T):
            difference = place[:, None] - place[members]
            is_channel = axis == 0 and len(shape) > 2
            square += difference.ne(0).long() if is_channel else difference.square()
        among = square[members]
        among.fill_diagonal_(int(among.max()) + 1)
        beyond = (square[:, :half] >= among.min()).all(dim=1)
        if beyond.any():
            far = beyond
    far[members] = False
    return far


def _numbers_of_pilots(features: int, num_probes: int) -> list[int]:
    """Return how many pilots there may be: what they may cost, and until enough features listen."""
    numbers = list[int]()
    for number in range(1, num_probes // 2):
        m = num_probes - number
        # A single pilot is worth a little more.
        too_many = number > 2 * _MOST_PILOTED * m + 0.2
        if too_many or features < 2 * m or _added(features, num_probes, number) > _MOST_ADDED:
            break
        numbers.append(number)
        if (number - 1) * (features // m // 2) >= _ENOUGH_LISTENERS:
            break
    return numbers


def _added(features: int, num_probes: int, number: int) -> float:
    """Return by how much the pilots' way to random cells exceeds Rademacher's variance."""
    m = num_probes - number
    probed = number * -(-features // m // 2)
    rest = (1 - (m - 1) / (features - 1)) * (features - probed) / features
    return num_probes / m * rest - 1
