"""Settings by a tolerance: the errors that they promise are those that come."""

import math

import pytest
import torch
from known_likelihoods import Data, correlated, denoiser_of, noise_variance, points

import ocm
from ocm.likelihoods import budget

# Bits in nats, for three features.
NATS = 3 * math.log(2)


@pytest.fixture(scope="module")
def denoiser():
    return denoiser_of(correlated(), ocm.flow(), "flow_prediction")


@pytest.mark.parametrize("tolerance", [0.1, 1e-3])
def test_the_solver_errs_by_what_was_measured(denoiser, tolerance):
    """In few dimensions the divergence is exact, and the solver is all that errs."""
    settings = ocm.likelihood_settings(denoiser, points(8, 3), tolerance)
    assert settings.max_probes == 3
    y = points(8, 3)
    found = ocm.log_likelihood(denoiser, y, settings)
    exact = correlated().log_prob(y, noise_variance(denoiser.schedule, 1))
    error = (found.value - exact).square().mean().sqrt().item()
    assert settings.solver_error <= tolerance / 2 * NATS
    # What twice as many steps change is nearly all that there is to change.
    assert error <= math.hypot(1.1 * settings.solver_error, 4 * found.stderr.max().item())
    assert found.budget["solver"].item() == pytest.approx(settings.solver_error / NATS)


def test_less_tolerance_takes_more_of_everything(denoiser):
    images = ocm.quantise(points(8, 3).clamp(-1, 1).float(), 17)
    settings = [
        ocm.likelihood_settings(denoiser, images, tolerance, levels=17)
        for tolerance in (1.0, 0.3, 0.1)
    ]
    steps, draws = ([getattr(s, name) for s in settings] for name in ("num_steps", "num_draws"))
    assert steps == sorted(steps)
    assert draws == sorted(draws)
    assert draws[0] == 2  # a standard error takes two
    assert draws[-1] > draws[0]
    found = ocm.log_likelihood(denoiser, images, settings[1], levels=17, seed=5)
    assert found.bits_per_dim_stderr.square().mean().sqrt() < 2 * 0.3


@pytest.mark.parametrize(("tolerance", "most"), [(0.3, 2), (0.03, 12), (1e-3, 12)])
def test_probes_err_by_no_more_than_they_may(tolerance, most):
    """Continuous data have no draws to average over: products alone make the error small."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    data = Data([1.0], [[0.0] * 12], [(mix @ mix.T / 12 + 0.1 * torch.eye(12)).tolist()])
    denoiser = denoiser_of(data, ocm.flow(), "flow_prediction")
    settings = ocm.likelihood_settings(denoiser, points(8, 12), tolerance)
    assert settings.max_probes <= most
    found = ocm.log_likelihood(denoiser, points(8, 12), settings, seed=3)
    assert found.budget["probes"].square().mean().sqrt() <= 1.5 * tolerance


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan])
def test_no_tolerance(denoiser, tolerance):
    with pytest.raises(ValueError, match=r"tolerance must be (positive, in bits/dim|finite), got"):
        ocm.likelihood_settings(denoiser, points(2, 3), tolerance)


def test_no_samples(denoiser):
    with pytest.raises(ValueError, match="x must hold samples to measure on, got none"):
        ocm.likelihood_settings(denoiser, torch.zeros(0, 3), 0.1)


def test_a_tolerance_that_is_out_of_reach(denoiser):
    images = ocm.quantise(points(4, 3).clamp(-1, 1).float(), 3)
    with pytest.raises(ValueError, match=r"tolerance must be larger: 0.01 bits/dim take more"):
        ocm.likelihood_settings(denoiser, images, 0.01, levels=3)


def test_steps_that_never_suffice(monkeypatch):
    """A velocity that is rough at every scale."""
    monkeypatch.setattr(budget, "_MOST_STEPS", 16)

    def rough(x, time):
        return torch.sin(1e7 * time[:, None]) * x

    denoiser = ocm.Denoiser(rough, ocm.flow(), "flow_prediction")
    with pytest.raises(ValueError, match="steps still err by"):
        ocm.likelihood_settings(denoiser, points(2, 2), 1e-6)
