"""Lattices of colors against all pairs of features, one by one."""

import itertools
import math

import pytest
import torch

from hessdiag.lattices import lattice_colors, lattice_cost, turned_lattice

SMALL = [(3, (2, 4, 3)), (5, (1, 4, 4)), (4, (3, 7)), (6, (2, 3, 2, 2))]


def energies(shape):
    """What every pair of features costs, (distance^2 + [channels differ])^-3, zero for itself."""
    places = torch.tensor(list(itertools.product(*map(range, shape)))).double()
    difference = places[:, None] - places
    squares = difference[..., 1:].square().sum(-1) + (difference[..., 0] != 0)
    return squares.pow(-3).fill_diagonal_(0.0)


def within_classes(colors, shape):
    colors = colors.flatten()
    return (energies(shape) * (colors[:, None] == colors)).sum().item() / 2


@pytest.mark.parametrize(("num_colors", "shape"), SMALL)
def test_no_lattice_costs_less(num_colors, shape):
    found = within_classes(lattice_colors(num_colors, shape, "cpu"), shape)
    channels, *positions = shape
    ranges = [range(num_colors if channels > 1 else 1), (1,)]
    ranges += [range(num_colors) for _ in positions[1:]]
    costs = []
    for coefficients in itertools.product(*ranges):
        places = torch.cartesian_prod(*map(torch.arange, shape))
        colors = (places * torch.tensor(coefficients)).sum(1) % num_colors
        costs.append(within_classes(colors, shape))
    assert found == pytest.approx(min(costs), rel=1e-6)
    assert found < sum(costs) / len(costs)


@pytest.mark.parametrize(("num_colors", "shape"), SMALL)
def test_costs_are_those_of_all_pairs(num_colors, shape):
    colors = lattice_colors(num_colors, shape, "cpu").flatten()
    cost, moved_by, moved = lattice_cost(num_colors, shape)
    assert cost == pytest.approx(within_classes(colors, shape), rel=1e-6)
    # What a feature costs among those of the class k further, in the mean over all of them.
    among = {
        k: (energies(shape) * ((colors - colors[:, None]) % num_colors == k)).sum().item()
        / math.prod(shape)
        for k in range(1, num_colors)
    }
    assert among[moved_by] == pytest.approx(min(among.values()), rel=1e-6)
    assert moved == pytest.approx(among[moved_by], rel=1e-6)


class TestTurned:
    SHAPE = (2, 4, 4)
    PLAIN = lattice_colors(5, SHAPE, "cpu")

    def test_by_nothing(self):
        assert torch.equal(turned_lattice(5, self.SHAPE, [0, 0, 0, 0, 0]), self.PLAIN)

    def test_begins_with_any_color(self):
        turned = turned_lattice(5, self.SHAPE, [0, 8, 0, 0, 0])
        assert torch.equal(turned, (self.PLAIN + 3) % 5)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_mirrored_along_an_axis(self, axis):
        words = [0, 0, 0, 0, 0]
        words[2 + axis] = 1
        turned, mirrored = turned_lattice(5, self.SHAPE, words), self.PLAIN.flip(axis)
        assert torch.equal((turned - turned.flatten()[0]) % 5, (mirrored - mirrored[0, 0, 0]) % 5)
        assert not torch.equal(turned, self.PLAIN)

    def test_axes_of_one_length_change_places_with_each_other(self):
        turned = turned_lattice(5, self.SHAPE, [1, 0, 0, 0, 0])
        assert torch.equal(turned, self.PLAIN.mT)
        assert not torch.equal(turned, self.PLAIN)

    def test_axes_of_other_lengths_do_not(self):
        plain = lattice_colors(5, (2, 4, 3), "cpu")
        assert torch.equal(turned_lattice(5, (2, 4, 3), [1, 0, 0, 0, 0]), plain)

    def test_of_two_axes_the_shorter_is_that_of_channels(self):
        turned = turned_lattice(5, (7, 3), [0, 0, 0, 0])
        assert torch.equal(turned, lattice_colors(5, (3, 7), "cpu").mT)
