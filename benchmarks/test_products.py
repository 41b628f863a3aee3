"""pytest-benchmark cases small enough for every machine: ``pytest benchmarks``."""

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.kernels import StepCoefficients, gaussian_step, rademacher


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).requires_grad_(False)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_hutchinson(benchmark, network, mode):
    x = torch.randn(64, 256)
    result = benchmark(hessdiag.hutchinson, network, x, 16, mode=mode)
    assert torch.isfinite(result).all()


def test_exact(benchmark, network):
    x = torch.randn(4, 256)
    result = benchmark(hessdiag.exact, network, x)
    torch.testing.assert_close(result, hessdiag.exact(network, x, mode="jvp"))


def test_rademacher(benchmark):
    assert benchmark(rademacher, (16, 64, 3, 32, 32), 0).abs().min() == 1


def test_gaussian_step(benchmark):
    x = torch.randn(64, 3, 32, 32)
    coefficients = StepCoefficients(1.1, -0.5, 0.6, 0.4, 0.01, 0.2)
    result = benchmark(gaussian_step, x, x, 0.3, coefficients, seed=0, step=1)
    assert torch.isfinite(result).all()
