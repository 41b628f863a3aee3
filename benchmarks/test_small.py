"""pytest-benchmark cases small enough for every machine: ``make bench-small``.

Each is checked against something that it does not compute itself.
"""

import pytest
import torch
from mixtures.mixture import correlated_mixture
from mixtures.networks import point_head
from mixtures.true_score import mixture_denoiser
from torch import nn

import hessdiag
import ocm
from hessdiag.kernels import (
    StepCoefficients,
    gaussian_step,
    normal,
    ocm_loss,
    probe_moments,
    rademacher,
)
from ocm.data import digits
from ocm.sampling.samplers import reverse_step
from ocm.training.small_unet import small_unet


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).requires_grad_(False)


@pytest.fixture(scope="module")
def points():
    return torch.randn(8, 256, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def diagonal(network, points):
    """The diagonal of the network's Jacobian by PyTorch's own transforms."""
    jacobians = torch.func.vmap(torch.func.jacrev(network))(points)
    return jacobians.diagonal(dim1=1, dim2=2)


# Estimators


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_hutchinson(benchmark, network, points, diagonal, mode):
    estimated = benchmark(hessdiag.hutchinson, network, points, 16, mode=mode)
    v = rademacher((16, *points.shape), 0)
    J = torch.func.vmap(torch.func.jacrev(network))(points)
    products = torch.einsum("bij,mbj->mbi" if mode == "jvp" else "bji,mbj->mbi", J, v)
    torch.testing.assert_close(estimated, (v * products).mean(dim=0), rtol=1e-3, atol=1e-5)


def test_estimate(benchmark, network, points, diagonal):
    result = benchmark(hessdiag.estimate, network, points, max_probes=32)
    assert result.num_probes.eq(32).all()
    errors = (result.diagonal - diagonal) / result.stderr
    assert 0.8 < errors.square().mean().sqrt() < 1.25


def test_exact(benchmark, network, points, diagonal):
    result = benchmark(hessdiag.exact, network, points)
    torch.testing.assert_close(result, diagonal, rtol=1e-4, atol=1e-6)


# Kernels, or their references without a GPU


def test_rademacher(benchmark):
    v = benchmark(rademacher, (16, 64, 3, 32, 32), 0)
    assert v.abs().min() == 1
    assert v.mean().abs() < 5 / v.numel() ** 0.5


def test_normal(benchmark):
    z = benchmark(normal, (64, 3, 32, 32), 0, step=1).double()
    assert z.mean().abs() < 5 / z.numel() ** 0.5
    assert (z.square().mean() - 1).abs() < 5 * (2 / z.numel()) ** 0.5


def test_gaussian_step(benchmark):
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    coefficients = StepCoefficients(1.1, -0.5, 0.6, 0.4, 0.01, 0.2)
    result = benchmark(gaussian_step, x, x, 0.3, coefficients, seed=0, step=1)
    noise = normal(x.shape, 0, step=1)
    expected = 0.6 * x + 0.4 * (1.1 * x - 0.5 * x) + (0.01 + 0.2 * 0.3) ** 0.5 * noise
    torch.testing.assert_close(result, expected)


def test_probe_moments(benchmark):
    products = torch.randn(16, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = benchmark(probe_moments, products, 0)
    torch.testing.assert_close(
        moments.mean, (rademacher(products.shape, 0) * products).mean(dim=0), rtol=1e-4, atol=1e-5
    )


def test_ocm_loss(benchmark):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(8, 3, 32, 32, generator=generator).requires_grad_()
    products = torch.randn(1, 8, 3, 32, 32, generator=generator)
    (gradient,) = benchmark(lambda: torch.autograd.grad(ocm_loss(head, products, 0), head))
    target = (rademacher(products.shape, 0) * products)[0]
    torch.testing.assert_close(gradient, 2 * (head - target).detach() / head.numel())


# Covariances


@pytest.mark.parametrize("name", ["beta", "ocm head", "full"])
def test_ddpm_step(benchmark, name):
    """The noise of a step on a mixture, whitened by its covariance, is the noise it was made of."""
    schedule, mixture, s, t = ocm.linear(), correlated_mixture(), 300, 400
    denoiser = mixture_denoiser(mixture, schedule)
    covariance = {
        "beta": ocm.Beta(denoiser),
        "ocm head": ocm.OptimalCovarianceMatching(denoiser, point_head(denoiser).eval(), ocm.PAPER),
        "full": ocm.Full(denoiser),
    }[name]
    x_t = schedule.diffuse(mixture.sample(256, seed=0), t, torch.ones(256, 2))

    @torch.no_grad()
    def step():
        prediction = denoiser.predict(x_t, t, s=s)
        stated = covariance.at(prediction)
        return reverse_step(prediction, stated, ocm.ddpm(schedule, s, t), seed=0, x0_range=None)

    x_s = benchmark(step).double()
    x, beta_bar = x_t.double(), schedule.beta_bar
    b = (schedule.alpha_bar[s].sqrt() * schedule.beta(s, t) / beta_bar[t]).item()
    a = ((1 - schedule.beta(s, t)) ** 0.5 * beta_bar[s] / beta_bar[t]).item()
    residual = x_s - b * mixture.posterior_mean(x, t, schedule) - a * x
    # An untrained head states what x_t alone says, beta_bar / alpha_bar.
    identity, beta_tilde = torch.eye(2, dtype=torch.float64), schedule.beta_tilde(s, t)
    reverse = {
        "beta": schedule.beta(s, t) * identity,
        "ocm head": (beta_tilde + b**2 * beta_bar[t] / schedule.alpha_bar[t]) * identity,
        "full": beta_tilde * identity + b**2 * mixture.posterior_covariance(x, t, schedule),
    }[name]
    whitened = (residual * torch.linalg.solve(reverse.expand(256, 2, 2), residual)).sum(dim=1)
    squares = normal(x_t.shape, 0, step=t).double().square().sum(dim=1)
    torch.testing.assert_close(whitened, squares, rtol=2e-3, atol=1e-4)


def test_bits_per_dim(benchmark):
    """The bound of a batch is that of its images, each on its own."""
    denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.cosine()).freeze()
    images = digits().test[:4]
    covariance = ocm.Beta(denoiser)
    bound = benchmark(ocm.bits_per_dim, denoiser, covariance, images, 3, levels=17).total
    alone = [
        ocm.bits_per_dim(
            denoiser, covariance, images[i : i + 1], 3, levels=17, sample_offset=i
        ).total
        for i in range(4)
    ]
    torch.testing.assert_close(bound, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert bound.min() > 0
