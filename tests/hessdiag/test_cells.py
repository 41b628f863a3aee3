"""Random cells: how often two features share a color."""

import math

import pytest
import torch

from hessdiag.cells import cell_colors, cell_numbers, random_words
from hessdiag.kernels import philox

SHAPES = [(1, 16, 16), (3, 8, 8), (15,), (24, 10), (2, 3, 4, 4), (1, 1), (5, 1)]


@pytest.mark.parametrize(
    ("shape", "m"),
    [(shape, m) for shape in SHAPES for m in (1, 2, 3, 7, 12, 48) if m <= math.prod(shape)],
)
def test_a_cell_has_every_color_once(shape, m):
    size = math.prod(shape)
    cells = cell_numbers(m, shape, 3, 5).flatten()
    colors = cell_colors(m, shape, 3, 5).flatten()
    pairs = torch.stack([cells, colors]).unique(dim=1)
    assert pairs.shape[1] == size
    assert colors.min() >= 0
    assert colors.max() < m
    counts = cells.bincount()
    assert (counts[1:-1] == m).all()
    assert counts.max() <= m


@pytest.mark.parametrize(("shape", "m"), [((1, 8, 8), 4), ((3, 4, 4), 12), ((20,), 5)])
def test_features_of_two_cells_share_a_color_as_often_as_by_chance(shape, m):
    """And those of one never do: so no Jacobian can be worse off than with m signs."""
    size, seeds = math.prod(shape), 1000
    apart, together, alike = (torch.zeros(size, size) for _ in range(3))
    for seed in range(seeds):
        cells = cell_numbers(m, shape, seed, 0).flatten()
        colors = cell_colors(m, shape, seed, 0).flatten()
        same = colors[:, None] == colors
        different = cells[:, None] != cells
        apart += different
        together += different & same
        alike += ~different & same
    assert torch.equal(alike, seeds * torch.eye(size))
    share = together / apart.clamp(min=1)
    error = (1 / m * (1 - 1 / m) / apart.clamp(min=1)).sqrt()
    assert ((share - 1 / m).abs() <= 5 * error)[apart > 100].all()


def test_neighbours_are_mostly_in_one_cell_and_never_always_cut_apart():
    shape, m, seeds = (1, 12, 12), 16, 400
    cut = torch.zeros(shape[1:])[:, 1:]
    for seed in range(seeds):
        cells = cell_numbers(m, shape, seed, 0)[0]
        cut += cells[:, 1:] != cells[:, :-1]
    assert (cut / seeds).max() < 0.6
    assert (cut / seeds).mean() < 0.4


@pytest.mark.parametrize(
    ("shape", "m", "axis"),
    [((24,), 6, 0), ((1, 12, 12), 16, 1), ((1, 12, 12), 16, 2)],
    ids=["of a row", "across strips", "along strips"],
)
def test_cells_begin_anywhere_along_every_axis(shape, m, axis):
    """So that any two neighbours are in one cell of some block."""
    first, second = slice(None, -1), slice(1, None)
    together = torch.zeros(shape).narrow(axis, 0, shape[axis] - 1)
    for block in range(80):
        cells = cell_numbers(m, shape, 0, block).movedim(axis, 0)
        together = together + (cells[first] == cells[second]).movedim(0, axis)
    assert together.min() > 10


def test_channels_of_a_pixel_are_in_one_cell():
    cells = cell_numbers(12, (3, 8, 8), 0, 0)
    assert (cells == cells[:1]).double().mean() > 0.8


def test_words_are_those_of_the_contract():
    numbers = torch.arange(3)
    words = philox.philox(torch.tensor(7), numbers, *(torch.tensor(n) for n in (2, 9, 4)))
    assert torch.equal(random_words(7, 2, 9, 10), torch.stack(words, dim=1).flatten()[:10])
    assert torch.equal(random_words(2**64 - 1, 0, 0, 4), random_words(-1, 0, 0, 4))
