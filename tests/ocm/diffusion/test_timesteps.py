"""Trajectories: quadratic spacing, and the optimal one against every other."""

import itertools
import math

import pytest
import torch

import ocm
from ocm.diffusion import timesteps

SHORT = ocm.linear(12, 0.02, 0.4)


@pytest.mark.parametrize("K", [1, 2, 5, 40, 999, 1000])
def test_quadratic_timesteps_increase_to_the_end(K):
    chosen = timesteps.quadratic_timesteps(ocm.linear(), K)
    assert len(chosen) == K
    assert chosen[-1] == 1000
    assert all(s < t for s, t in itertools.pairwise(chosen))
    if 2 < K < 30:
        assert chosen[1] < ocm.even_timesteps(ocm.linear(), K)[1]


def bound(path, variances):
    """The sum of E log(sigma^2 / lambda^2) / 2 over steps, sigma^2 from DDPM's coefficients."""
    alpha_bar = [math.exp(v) for v in SHORT.log_alpha_bar.tolist()]
    total = 0.0
    for s, t in itertools.pairwise(path):
        beta = 1 - alpha_bar[t] / alpha_bar[s]
        beta_tilde = beta * (1 - alpha_bar[s]) / (1 - alpha_bar[t])
        weight = alpha_bar[s] * beta**2 / (1 - alpha_bar[t]) ** 2
        total += math.log(1 + weight * variances[t - 1] / beta_tilde) / 2
    return total


@pytest.mark.parametrize("K", [1, 2, 3, 5, 8, 12])
def test_the_optimal_path_is_the_best_of_all(K):
    generator = torch.Generator().manual_seed(K)
    variances = torch.rand(12, generator=generator, dtype=torch.float64)
    found = ocm.optimal_timesteps(SHORT, variances, K)
    assert len(found) == K
    if K == 1:
        assert found == [12]
        return
    paths = [(1, *middle, 12) for middle in itertools.combinations(range(2, 12), K - 2)]
    best = min(bound(path, variances.tolist()) for path in paths)
    assert bound(found, variances.tolist()) == pytest.approx(best, rel=1e-12)


def test_the_optimal_path_lowers_the_bound_of_gaussian_data():
    from gaussian_denoiser import gaussian_denoiser

    std = torch.tensor([0.02, 0.05, 0.3, 0.2])
    denoiser = gaussian_denoiser(torch.zeros(4), torch.diag(std**2), ocm.linear())
    x0 = ocm.quantise(torch.randn(500, 1, 1, 4) * std).clamp(-1, 1)
    covariance = ocm.fit_analytic_from_data(denoiser, x0, [1, *range(25, 1001, 25)], seed=1)
    best = ocm.optimal_timesteps(denoiser.schedule, covariance.variances(), 6)
    bits = {
        name: ocm.bits_per_dim(denoiser, covariance, x0, path).total.mean().item()
        for name, path in (("even", ocm.even_timesteps(ocm.linear(), 6)), ("optimal", best))
    }
    assert bits["optimal"] < bits["even"] - 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ocm.quadratic_timesteps(ocm.linear(), 0), "K must be at least 1, got 0"),
        (lambda: ocm.optimal_timesteps(SHORT, torch.ones(12), 13), r"K must lie in 1 \.\. 12"),
        (lambda: ocm.optimal_timesteps(SHORT, torch.ones(5), 3), r"variances must be 12 .* \(5,\)"),
        (lambda: ocm.optimal_timesteps(SHORT, -torch.ones(12), 3), "variances must be .* -1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
