"""The pilots of "auto": that it cannot lose against Rademacher, gains, and stays unbiased."""

import math

import pytest
import torch
from harness.structures import (
    further_structures,
    known_structures,
    unseen_structures,
    variance_ratio,
)

import hessdiag
from hessdiag.lattices import lattice_colors, turned_lattice
from hessdiag.piloting import lattice_is_better, plan

STRUCTURES = known_structures() | further_structures() | unseen_structures()
PROBES = (1, 4, 12, 24, 48, 192)


def linear(A):
    return lambda x: (x.flatten(1) @ A.T.to(x.dtype)).reshape(x.shape)


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_no_worse_than_rademacher(name):
    shape, J = STRUCTURES[name]
    num_seeds = 8 if len(J) <= 256 else 3
    ratios = {M: variance_ratio(shape, J, M, num_seeds) for M in PROBES[2::2]}
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


@pytest.mark.soak
@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_no_worse_than_rademacher_over_many_seeds(name):
    shape, J = STRUCTURES[name]
    num_seeds = 200 if len(J) <= 256 else 40
    ratios = {M: variance_ratio(shape, J, M, num_seeds) for M in PROBES}
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("convolution", {12: 0.5, 48: 0.01}),
        ("decay", {12: 0.3, 48: 0.1}),
        ("sequence convolution", {12: 0.5, 24: 0.01}),
        ("tokens, MLP", {12: 0.8, 48: 0.5}),
        ("video convolutions", {24: 0.6, 48: 0.3}),
        ("ViT, patch 4", {48: 0.2}),
    ],
)
def test_it_gains_where_there_is_structure(name, most):
    shape, J = STRUCTURES[name]
    for M, bound in most.items():
        assert variance_ratio(shape, J, M, 8) <= bound


@pytest.mark.parametrize("name", ["decay", "random dense", "transpose"])
def test_the_measured_variance_is_that_of_the_closed_form(name):
    """And the estimate is unbiased, whichever way the pilots decided."""
    shape, J = STRUCTURES[name]
    M, count, seeds = 12, 200, 12
    x = torch.zeros(1, *shape).expand(count, *shape)
    errors = torch.stack(
        [
            hessdiag.estimate(
                linear(J), x, probes="auto", max_probes=M, seed=seed, mode="jvp"
            ).diagonal.flatten(1)
            - J.diagonal()
            for seed in range(seeds)
        ]
    ).double()
    off = J.double().square()
    off.fill_diagonal_(0.0)
    measured = errors.square().mean() / (off.sum(1).mean() / M)
    assert measured == pytest.approx(variance_ratio(shape, J, M, 60), abs=0.12)
    mean, spread = errors.mean((0, 1)), errors.std((0, 1))
    assert (mean.abs() <= 5.5 * spread / (count * seeds) ** 0.5 + 1e-6).all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (4, 64), (64, 8), (2, 4, 8, 8)])
@pytest.mark.parametrize("M", [11, 12, 24, 48])
def test_sets_of_a_plan(shape, M):
    features = math.prod(shape)
    sets = plan(shape, M, 5, 2)
    for numbers in (sets.lattice, sets.cells):
        assert numbers.shape == shape
        assert sorted(numbers.unique().tolist()) == list(range(M))
    pilots = sets.lattice < sets.num_pilots
    assert torch.equal(pilots, sets.cells < sets.num_pilots)
    assert torch.equal(sets.lattice[pilots], sets.cells[pilots])
    for k in range(sets.num_pilots):
        own = (sets.lattice == k).flatten()
        assert own.any()
        assert sets.listeners[k].any()
        assert not (sets.listeners[k] & own).any()
        assert not (sets.far[k] & own).any()
        assert 0 < sets.far[k].sum() < features
    # Another block, another plan; the same one, the same.
    assert torch.equal(sets.lattice, plan(shape, M, 5, 2).lattice)
    assert not torch.equal(sets.lattice, plan(shape, M, 5, 3).lattice)


def test_no_plan_where_pilots_cost_too_much():
    assert plan((3, 64, 64), 4, 0, 0) is None
    assert plan((3, 64, 64), 12, 0, 0) is not None
    assert plan((1, 4, 4), 12, 0, 0) is None


def test_what_is_heard_decides():
    """Energy between the features of a class speaks against it, energy elsewhere for it."""
    shape, M = (1, 16, 16), 24
    sets = plan(shape, M, 0, 0)
    pilots = sets.lattice.flatten()
    products = torch.zeros(sets.num_pilots, 2, 256)
    products[:, 0] = torch.randn(sets.num_pilots, 256, generator=torch.Generator().manual_seed(0))
    products[:, 1] = products[:, 0]
    near = ~sets.far & ~sets.listeners
    products[:, 0] *= near.float()
    products[:, 1] *= (sets.listeners | (torch.rand(256) < 0.1)).float()
    products[:, :, pilots < sets.num_pilots] = 100.0  # the diagonal, which says nothing
    for scale in (1.0, 1e-20, 1e20):  # whose fourth powers float32 does not hold
        assert lattice_is_better(sets, scale * products).tolist() == [True, False]
    assert lattice_is_better(sets, torch.zeros(sets.num_pilots, 1, 256)).tolist() == [False]


def test_what_is_heard_in_the_class_counts_whatever_is_far():
    """As much as random cells would leave, and nothing far away: few listeners would not weigh."""
    sets = plan((1, 16, 16), 24, 0, 0)
    own = torch.arange(sets.num_pilots)[:, None] == sets.lattice.flatten()
    near = ~sets.far & ~sets.listeners & ~own
    for heard, better in ((0.95, False), (0.3, True)):
        # One at every listener, and near by what makes that the part of all which is heard.
        wanted = (~own).sum() / heard - sets.listeners.sum()
        energy = sets.listeners + near * (wanted / near.sum())
        products = energy.sqrt()[:, None]
        assert lattice_is_better(sets, products).tolist() == [better]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10), (2, 4, 6, 6), (4, 20), (20, 4)])
def test_turned_lattices_are_as_good(shape):
    """The distances within classes are those of the lattice itself."""

    def distances(colors, shape):
        places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).double()
        first = 0 if shape[0] < shape[1] or len(shape) > 2 else 1
        moved = places.clone()
        moved[:, first] = 0
        squares = torch.cdist(moved, moved).square().round()
        squares += (places[:, None, first] != places[None, :, first]).double()
        same = colors.flatten()[:, None] == colors.flatten()
        return squares[same].sort().values

    transposed = len(shape) == 2 and shape[0] > shape[1]
    plain = lattice_colors(7, shape[::-1] if transposed else shape, "cpu")
    if transposed:
        plain = plain.T
    expected = distances(plain, shape)
    seen = set()
    for words in ([0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 1], [1, 3, 1, 1, 0, 0]):
        turned = turned_lattice(7, shape, words)
        assert turned.shape == shape
        torch.testing.assert_close(
            distances(turned, shape).mean(), expected.mean(), rtol=0.1, atol=0
        )
        assert distances(turned, shape)[math.prod(shape)] == expected[math.prod(shape)]
        seen.add(tuple(turned.flatten().tolist()))
    assert len(seen) == 4
