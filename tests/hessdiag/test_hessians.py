"""Hessian diagonals of functions of a batch against the matrices."""

import pytest
import torch
from torch import nn

import hessdiag


def test_of_a_function_of_each_sample():
    x = torch.randn(3, 5, dtype=torch.float64)

    def f(x):
        return x.prod(dim=1) + x.pow(4).sum(dim=1)

    for function in (f, lambda x: f(x).sum()):
        for mode in ("vjp", "jvp"):
            result = hessdiag.hessian_diagonal(function, x, max_probes=5, probes="auto", mode=mode)
            torch.testing.assert_close(result.diagonal, 12 * x**2)


def test_of_an_energy_network_against_the_hessian():
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    result = hessdiag.hessian_diagonal(lambda x: energy(x)[:, 0], x, max_probes=4000)
    for sample in range(2):
        H = torch.func.hessian(lambda z: energy(z)[0])(x[sample])
        difference = (result.diagonal[sample] - H.diagonal()).abs()
        assert (difference < 4.5 * result.stderr[sample]).all()


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x, ValueError, r"f must return one number for each sample, shape \(2,\)"),
        (lambda x: 3.0, TypeError, "f must return a torch.Tensor, got float"),
    ],
)
def test_errors_of_f(f, error, message):
    with pytest.raises(error, match=message):
        hessdiag.hessian_diagonal(f, torch.zeros(2, 3), max_probes=1)
