"""pytest-benchmark cases small enough for every machine: ``pytest benchmarks``."""

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.kernels import (
    StepCoefficients,
    gaussian_step,
    ocm_loss,
    probe_moments,
    rademacher,
)


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


def test_probe_moments(benchmark):
    products = torch.randn(16, 8, 3, 32, 32)
    moments = benchmark(probe_moments, products, 0)
    torch.testing.assert_close(
        moments.mean, (rademacher(products.shape, 0) * products).mean(dim=0), rtol=1e-4, atol=1e-5
    )


def test_ocm_loss(benchmark):
    head = torch.randn(8, 3, 32, 32, requires_grad=True)
    products = torch.randn(1, 8, 3, 32, 32)
    (gradient,) = benchmark(lambda: torch.autograd.grad(ocm_loss(head, products, 0), head))
    assert torch.isfinite(gradient).all()
