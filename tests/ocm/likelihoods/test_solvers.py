"""Fixed steps against equations that are solved in closed form."""

import itertools
import math

import pytest
import torch

from ocm.likelihoods.solvers import SOLVERS, evaluation_places, evaluation_weights, solve

ORDERS = [("euler", 1), ("heun", 2), ("rk4", 4)]


def uneven(num_steps, end=2.0):
    """A mesh from 0 whose steps grow."""
    return [end * (k / num_steps) ** 1.5 for k in range(num_steps + 1)]


def solved(name, num_steps):
    """z' = -2 w z^2 from z(0) = 1, with the integral of z along it."""
    method, mesh = SOLVERS[name], uneven(num_steps)
    places, weights = evaluation_places(method, mesh), evaluation_weights(method, mesh)
    integral = 0.0

    def velocity(z, k):
        nonlocal integral
        integral += weights[k] * z.item()
        return -2 * places[k] * z**2

    return solve(method, velocity, torch.ones(1, dtype=torch.float64), mesh).item(), integral


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_the_order_is_that_of_the_method(name, order):
    """z = 1 / (1 + w^2), whose integral is the arc tangent."""
    exact = 1 / 5, math.atan(2)
    coarse, fine = (
        [found - true for found, true in zip(solved(name, n), exact, strict=True)]
        for n in (160, 320)
    )
    for error, smaller in zip(coarse, fine, strict=True):
        assert math.log2(abs(error / smaller)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_weights_integrate_polynomials(name, order):
    """Of a degree below the order; and not of the next one."""
    method, mesh = SOLVERS[name], uneven(5)
    places, weights = evaluation_places(method, mesh), evaluation_weights(method, mesh)
    assert len(places) == len(weights) == 5 * method.num_stages
    for degree in range(order + 1):
        found = sum(w * place**degree for place, w in zip(places, weights, strict=True))
        exact = 2.0 ** (degree + 1) / (degree + 1)
        assert (found == pytest.approx(exact, rel=1e-12)) == (degree < order)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_where_and_when_they_are_said_to_be(name):
    """In order, each once, its place within its step; also backward."""
    method = SOLVERS[name]
    for mesh in (uneven(4), uneven(4)[::-1]):
        asked = []

        def velocity(z, k, asked=asked):
            asked.append(k)
            return torch.ones_like(z)

        z = solve(method, velocity, torch.zeros(1, dtype=torch.float64), mesh)
        assert asked == list(range(4 * method.num_stages))
        assert z.item() == pytest.approx(mesh[-1] - mesh[0])
        places = evaluation_places(method, mesh)
        for i, (start, end) in enumerate(itertools.pairwise(mesh)):
            own = places[i * method.num_stages : (i + 1) * method.num_stages]
            assert own[0] == start
            assert all(min(start, end) <= place <= max(start, end) for place in own)


def test_heun_is_the_mean_of_both_slopes():
    """One step of z' = z^2 by hand."""
    z, h = torch.tensor([0.7], dtype=torch.float64), 0.3
    first = z**2
    second = (z + h * first) ** 2
    found = solve(SOLVERS["heun"], lambda z, k: z**2, z, [0.0, h])
    torch.testing.assert_close(found, z + h * (first + second) / 2)


def test_rk4_is_the_classical_one():
    """Step after step by the textbook's formulas, on an equation that depends on w."""
    mesh = [0.0, 0.3, 0.5, 1.2]
    places = evaluation_places(SOLVERS["rk4"], mesh)
    z = torch.tensor([0.7, -0.2], dtype=torch.float64)

    def slope(w, z):
        return torch.sin(3 * z) + w

    found = solve(SOLVERS["rk4"], lambda z, k: slope(places[k], z), z, mesh)
    for w, end in itertools.pairwise(mesh):
        h = end - w
        k1 = slope(w, z)
        k2 = slope(w + h / 2, z + h / 2 * k1)
        k3 = slope(w + h / 2, z + h / 2 * k2)
        k4 = slope(w + h, z + h * k3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(found, z)
