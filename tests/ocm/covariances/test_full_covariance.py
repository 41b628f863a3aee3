"""A correlated Gaussian needs a full covariance: with one, two steps reproduce it.

For Gaussian data p(x_s | x_t) with the full covariance is q(x_s | x_t), so every number of steps is
exact but for the prior (alpha_bar_N = 4e-5) and the last step, which adds no noise (beta_bar_1 =
1e-4). Both are far below the tolerance of the tests, 5 standard errors of an empirical covariance.
"""

import math

import pytest
import torch
from mixtures.mixture import Mixture
from mixtures.true_score import mixture_denoiser
from torch.distributions import MultivariateNormal, kl_divergence

import ocm
from ocm.covariances.operators import full
from ocm.sampling.likelihood import step_term

SAMPLES = 20_000
SAMPLERS = [ocm.ddpm, ocm.ddim]


def correlated_gaussian(D):
    """Mean and covariance, with correlations of 0.8 and more between neighbours."""
    places = torch.arange(D).double()
    correlation = 0.9 ** (places[:, None] - places).abs()
    std = torch.linspace(0.5, 1.5, D).double()
    return torch.linspace(-1.0, 1.0, D).double(), std[:, None] * correlation * std


def draw(D, K, covariance_of, sampler, prediction_type="epsilon"):
    mean, C = correlated_gaussian(D)
    mixture = Mixture(mean[None], C[None], torch.ones(1))
    denoiser = mixture_denoiser(mixture, ocm.linear(), prediction_type)
    samples = ocm.sample(
        denoiser,
        covariance_of(denoiser),
        (SAMPLES, D),
        K,
        sampler=sampler,
        x0_range=None,
        dtype=torch.float64,
    )
    tolerance = 5 * ((C.diagonal()[:, None] * C.diagonal() + C.square()) / SAMPLES).sqrt()
    return samples, C, tolerance


def full_covariances(D):
    return [ocm.Full, lambda denoiser: ocm.Lanczos(denoiser, num_probes=D)]


@pytest.mark.parametrize("which", [0, 1], ids=["full", "lanczos"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("D", [2, 6])
def test_a_full_covariance_is_reproduced(D, K, sampler, which):
    samples, C, tolerance = draw(D, K, full_covariances(D)[which], sampler)
    assert ((samples.T.cov() - C).abs() < tolerance).all()
    mean, _ = correlated_gaussian(D)
    # The prior has mean 0 where q(x_N) has sqrt(alpha_bar_N) = 0.006 of the data's.
    assert ((samples.mean(dim=0) - mean).abs() < 5 * (C.diagonal() / SAMPLES).sqrt() + 0.01).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("D", "K"), [(2, 2), (2, 3), (2, 5), (6, 2), (6, 5)])
def test_a_diagonal_covariance_is_not(D, K, sampler):
    """Neighbours' covariance is off by 5 to 40 tolerances, and with two steps nearly absent."""
    samples, C, tolerance = draw(D, K, ocm.Exact, sampler)
    off = (samples.T.cov() - C).abs() / tolerance
    assert (off.diagonal(1) > 3).all()
    if K == 2:
        assert (samples.T.corrcoef().diagonal(1).abs() < 0.1).all()
        # Its variances are right: only correlations are lost.
        assert (off.diagonal() < 1).all()


def test_a_diagonal_of_a_diagonal_gaussian_is_enough():
    """The counterpart: without correlations the diagonal is the full covariance."""
    variances = torch.tensor([0.1, 2.0]).double()
    mixture = Mixture(torch.zeros(1, 2), torch.diag(variances)[None], torch.ones(1))
    denoiser = mixture_denoiser(mixture, ocm.linear(), "sample")
    samples = ocm.sample(
        denoiser, ocm.Exact(denoiser), (SAMPLES, 2), [1, 1000], x0_range=None, dtype=torch.float64
    )
    error = (samples.T.cov() - torch.diag(variances)).abs()
    assert (error < 5 * (2.0 / SAMPLES) ** 0.5 * variances.max()).all()


def test_lanczos_with_fewer_products_comes_near():
    """Two products of six: the largest eigenvalue, along which most of the noise lies."""
    samples, C, _ = draw(6, 3, lambda denoiser: ocm.Lanczos(denoiser, 2), ocm.ddpm, "sample")
    diagonal, _, _ = draw(6, 3, ocm.Exact, ocm.ddpm, "sample")
    error, of_diagonal = (((s.T.cov() - C).norm() / C.norm()).item() for s in (samples, diagonal))
    assert error < 0.1 < 0.4 < of_diagonal


class Stated(torch.nn.Module):
    """A backbone that predicts a given x0."""

    def __init__(self, x0_hat):
        super().__init__()
        self.features, self.x0_hat = torch.nn.Identity(), torch.nn.Parameter(x0_hat)

    def forward(self, x):
        self.features(x)
        return self.x0_hat


@pytest.mark.parametrize(("s", "t"), [(1, 2), (10, 300), (500, 1000)])
def test_the_kl_of_a_step_is_that_of_two_gaussians(s, t):
    """Against torch.distributions, with the step's coefficients written a second time."""
    D, B = 6, 4
    generator = torch.Generator().manual_seed(t)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    schedule = ocm.linear()
    factor = randn(B, D, D) / 4
    C = factor @ factor.mT + 0.01 * torch.eye(D)
    x_t, x0 = randn(B, D), torch.tanh(randn(B, D))
    x0_hat = torch.tanh(randn(B, D))
    architecture = ocm.Architecture("Stated", "features", lambda net, x, level, labels: net(x))
    denoiser = ocm.Denoiser(Stated(x0_hat), schedule, "sample", architecture)
    prediction = denoiser.predict(x_t, t, s=s)
    bits = step_term(full(C, x_t.shape), prediction, x0)

    alpha_bar = schedule.alpha_bar
    step_beta = 1 - alpha_bar[t] / alpha_bar[s]
    tilde = step_beta * (1 - alpha_bar[s]) / (1 - alpha_bar[t])
    b = alpha_bar[s].sqrt() * step_beta / (1 - alpha_bar[t])
    a = (alpha_bar[t] / alpha_bar[s]).sqrt() * (1 - alpha_bar[s]) / (1 - alpha_bar[t])
    q = MultivariateNormal(a * x_t + b * x0, tilde * torch.eye(D).double())
    p = MultivariateNormal(a * x_t + b * x0_hat, tilde * torch.eye(D) + b**2 * C)
    expected = kl_divergence(q, p) / (D * math.log(2.0))
    torch.testing.assert_close(bits, expected, rtol=1e-6, atol=1e-12)
