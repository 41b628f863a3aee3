"""One block of probes that becomes a lattice of colors where its first products say that it may.

A lattice (:mod:`hessdiag.lattices`) keeps close features apart at the price of others, at its own
period, that always meet: four to twelve times the variance of Rademacher probes, where a Jacobian
couples just those. Random cells (:mod:`hessdiag.cells`) are never worse and gain less. So the
first probes, the pilots, each have a random half A of a class C of the lattice. They estimate the
features of A like any other, and at the rest of C, where no entry of the diagonal disturbs, they
show what the lattice would leave. From the products y the energies for a pair of features are

    heard   mean of y_i^2 / |A| over the i in C but not in A: of pairs in a class,
    far     mean of y_i^2 / |A| over the i further from A than classes are from themselves,
    all     sum of y_i^2 / (|A| (D - 1)): of any pair, which is what random cells leave at most.

Where n outputs hear, (n heard + 8 far) / (n + 8) stands for the lattice: what falls off with
distance speaks for it from the start, anything else has to be heard. Few large outputs say less
than many alike, so n is the listeners' part of (sum of y^2)^2 / sum of y^4. Where that is clearly below
"all" the lattice's classes follow, with the rest of C among them; else random cells of what A
leaves. Every feature is in one probe, with signs of its own that no decision has seen, so the
estimate stays unbiased. Which of the lattices of the same quality it is, turned and mirrored, is
drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.cells import cell_colors, random_words
from hessdiag.lattices import turned_lattice

# Features that listen, beyond which no further pilot is taken.
_ENOUGH_LISTENERS = 24
# Outputs that "far" counts for.
_PRIOR = 8.0
# What the pilots may add to the variance where J has no structure at all.
_MOST_ADDED = 0.045
# Below this part of all energy a lattice is clearly better.
_CLEARLY = 0.85
# Distances between more pairs than that are not worth their time; as many features listen then.
_MOST_PAIRS = 2**24


@dataclass(frozen=True, eq=False)
class Plan:
    """Two ways to go on after the same pilots: sets of features, one for each probe.

    Attributes:
        num_pilots: Probes 0 .. num_pilots - 1 are those of both.
        lattice: The number of each feature's probe with a lattice, int64 of shape (...).
        cells: The same with random cells.
        listeners: For each pilot the features that listen, bool of shape (num_pilots, D).
        far: For each pilot the features that are far from it, bool of shape (num_pilots, D).
    """

    num_pilots: int
    lattice: Tensor
    cells: Tensor
    listeners: Tensor
    far: Tensor


def plan(sample_shape: tuple[int, ...], num_probes: int, seed: int, block: int) -> Plan | None:
    """Return the sets of features of a block, or None where pilots would cost too much.

    Args:
        sample_shape: Shape of a sample, of two axes or more. Of three or more the first is that
            of channels, of two the shorter.
        num_probes: Probes of the block, fewer than features.
        seed: Seed of the design.
        block: Number of the block.
    """
    num_pilots = _num_pilots(math.prod(sample_shape), num_probes)
    if num_pilots == 0:
        return None
    m = num_probes - num_pilots
    colors = turned_lattice(m, sample_shape, random_words(seed, 2, block, 16).tolist()).flatten()
    keys = random_words(seed, 3, block, len(colors))
    pilots = torch.full_like(colors, -1)
    listeners = torch.zeros(num_pilots, len(colors), dtype=torch.bool)
    far = torch.ones_like(listeners)
    largest = colors.bincount(minlength=m).argsort(descending=True, stable=True)
    for k in range(num_pilots):
        members = (colors == largest[k]).nonzero()[:, 0]
        members = members[keys[members].argsort(stable=True)]
        half = -(-len(members) // 2)
        pilots[members[:half]] = k
        listeners[k, members[half:]] = True
        far[k] = _far(sample_shape, members, half)
    cells = cell_colors(m, sample_shape, seed, block).flatten()
    lattice, cells = (
        torch.where(pilots < 0, num_pilots + rest, pilots).reshape(sample_shape)
        for rest in (colors, cells)
    )
    return Plan(num_pilots, lattice, cells, listeners, far)


def lattice_is_better(plan: Plan, products: Tensor) -> Tensor:
    """Return for each sample whether the products of the pilots speak for the lattice, (B,).

    Args:
        plan: The sets.
        products: Those of the pilots, shape (num_pilots, B, ...).
    """
    energy = products.flatten(2).to(torch.promote_types(products.dtype, torch.float32)).square()
    listeners, far = plan.listeners.to(energy.device), plan.far.to(energy.device)
    numbers = plan.lattice.flatten().to(energy.device)
    own = torch.arange(plan.num_pilots, device=energy.device)[:, None] == numbers
    probed = own.sum(dim=1, keepdim=True)

    def for_a_pair(where: Tensor) -> Tensor:
        return (energy * where[:, None]).sum(dim=(0, 2)) / (where * probed).sum().clamp(min=1)

    heard, beyond, all_pairs = (for_a_pair(where) for where in (listeners, far, ~own))
    outputs = energy * ~own[:, None]
    tiny = torch.finfo(energy.dtype).tiny
    alike = outputs.sum(dim=(0, 2)).square() / outputs.square().sum(dim=(0, 2)).clamp(min=tiny)
    count = alike * listeners.sum() / (~own).sum()
    expected = torch.lerp(beyond, heard, count / (count + _PRIOR))
    return torch.maximum(expected, heard) < _CLEARLY * all_pairs


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


def _num_pilots(features: int, num_probes: int) -> int:
    """Return how many pilots are enough, as far as they may cost."""
    affordable = 0
    for number in range(1, num_probes // 2):
        m = num_probes - number
        members = -(-features // m)
        if members < 2 or _added(features, num_probes, number) > _MOST_ADDED:
            break
        affordable = number
        if number * (members // 2) >= _ENOUGH_LISTENERS:
            break
    return affordable


def _added(features: int, num_probes: int, number: int) -> float:
    """Return by how much the pilots' way to random cells exceeds Rademacher's variance."""
    m = num_probes - number
    probed = number * -(-features // m // 2)
    rest = (1 - (m - 1) / (features - 1)) * (features - probed) / features
    return num_probes / m * rest - 1
