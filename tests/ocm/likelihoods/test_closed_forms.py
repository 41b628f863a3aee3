"""Log-likelihoods of Gaussians and of mixtures, whose closed forms are known, on every path."""

import math

import pytest
import torch
from known_likelihoods import PATHS, correlated, denoiser_of, noise_variance, points, two_lumps
from path_denoiser import zero_snr

import ocm
from ocm.likelihoods.probability_flow import ProbabilityFlow

COMBINATIONS = [
    ("vp", "epsilon"),
    ("flow", "flow_prediction"),
    ("flow", "sample"),
    ("edm", "edm"),
    ("edm", "sample"),
    ("trigflow", "trigflow"),
]
FINE = ocm.LikelihoodSettings(num_steps=72, max_probes=3)
# From where steps are few.
FIRST = 10


@pytest.mark.parametrize(("path", "prediction_type"), COMBINATIONS)
def test_a_correlated_gaussian(path, prediction_type):
    """By the map of its solutions, which is linear; and the noise of the data alone, where N is."""
    data = correlated()
    denoiser = denoiser_of(data, PATHS[path](), prediction_type)
    y = points(4, 3)
    found = ocm.log_likelihood(denoiser, y, FINE, first_timestep=FIRST)
    schedule, last = denoiser.schedule, ProbabilityFlow.of(denoiser).last_timestep
    ends = ((schedule.alpha(t).item(), schedule.sigma(t).item()) for t in (FIRST, last))
    torch.testing.assert_close(found.value, data.pushed_forward(y, *ends), rtol=0, atol=1e-4)
    if last == schedule.num_timesteps:
        exact = data.log_prob(y, noise_variance(schedule, FIRST))
        torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-4)
    assert found.value.dtype == torch.float64
    assert torch.equal(found.stderr, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        (ocm.linear(), "epsilon"),
        (ocm.vp(), "epsilon"),
        (ocm.edm(), "edm"),
    ],
    ids=["linear", "vp", "edm"],
)
def test_the_model_starts_from_the_normal_distribution(schedule, prediction_type):
    """Where x_N still holds signal, the density is that of the model, not of its data."""
    data = correlated()
    denoiser = denoiser_of(data, schedule, prediction_type)
    y = points(4, 3)
    found = ocm.log_likelihood(denoiser, y, FINE, first_timestep=FIRST).value
    path, last = denoiser.schedule, ProbabilityFlow.of(denoiser).last_timestep
    ends = ((path.alpha(t).item(), path.sigma(t).item()) for t in (FIRST, last))
    torch.testing.assert_close(found, data.pushed_forward(y, *ends), rtol=0, atol=1e-4)
    assert (found - data.log_prob(y, noise_variance(schedule, FIRST))).abs().max() > 5e-4


@pytest.mark.parametrize(
    ("path", "prediction_type"),
    [
        ("vp", "v_prediction"),
        ("linear", "sample"),
        ("zero_snr", "v_prediction"),
        ("flow", "flow_prediction"),
        ("edm", "edm"),
        ("trigflow", "trigflow"),
    ],
)
def test_a_mixture_in_the_plane(path, prediction_type):
    data = two_lumps()
    schedule = zero_snr() if path == "zero_snr" else PATHS[path]()
    denoiser = denoiser_of(data, schedule, prediction_type)
    y = points(5, 2, seed=1)
    settings = ocm.LikelihoodSettings(num_steps=48, max_probes=2)
    found = ocm.log_likelihood(denoiser, y, settings, first_timestep=FIRST)
    exact = data.log_prob(y, noise_variance(schedule, FIRST))
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("first", [0.5, 20.0, 400.0])
def test_the_density_is_that_of_data_with_the_noise_of_the_first_timestep(first):
    data = two_lumps()
    denoiser = denoiser_of(data, ocm.flow(), "flow_prediction")
    y = points(4, 2, seed=2)
    settings = ocm.LikelihoodSettings(num_steps=64, max_probes=2)
    found = ocm.log_likelihood(denoiser, y, settings, first_timestep=first).value
    exact = data.log_prob(y, noise_variance(ocm.flow(), first))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    assert (exact - data.log_prob(y, noise_variance(ocm.flow(), 1))).abs().max() > 1e-6


def test_between_the_timesteps_of_a_discrete_path_too():
    data = two_lumps()
    schedule = PATHS["linear"]()
    denoiser = denoiser_of(data, schedule, "sample")
    y = points(4, 2, seed=2)
    settings = ocm.LikelihoodSettings(num_steps=64, max_probes=2)
    found = ocm.log_likelihood(denoiser, y, settings, first_timestep=30.5).value
    exact = data.log_prob(y, noise_variance(denoiser.schedule, 30.5))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "tolerance", "path", "prediction_type"),
    [
        ("bosh3", 1e-6, "flow", "flow_prediction"),
        ("dopri5", 3e-8, "edm", "edm"),
        ("dopri8", 3e-6, "flow", "flow_prediction"),
    ],
)
def test_adaptive_steps(solver, tolerance, path, prediction_type):
    data = two_lumps()
    schedule = PATHS[path]()
    denoiser = denoiser_of(data, schedule, prediction_type)
    y = points(3, 2, seed=3)
    settings = ocm.LikelihoodSettings(solver, tolerance=tolerance, max_probes=2)
    found = ocm.log_likelihood(denoiser, y, settings, first_timestep=500)
    exact = data.log_prob(y, noise_variance(schedule, 500))
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-4)
    assert torch.equal(found.stderr, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_the_error_falls_as_the_order_says(solver, order):
    data = two_lumps()
    denoiser = denoiser_of(data, ocm.flow(), "flow_prediction")
    y = points(4, 2, seed=4)
    exact = data.log_prob(y, noise_variance(ocm.flow(), 1))
    errors = []
    for num_steps in (32, 64):
        settings = ocm.LikelihoodSettings(solver, num_steps=num_steps, max_probes=2)
        found = ocm.log_likelihood(denoiser, y, settings).value
        errors.append((found - exact).square().mean().sqrt())
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.35)


def test_the_parts_add_up():
    """Bits of a dimension, and the prior of the normal distribution itself."""
    denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.vp(), "v_prediction")
    x = points(3, 4)
    found = ocm.log_likelihood(denoiser, x.reshape(3, 2, 2), ocm.LikelihoodSettings())
    # v = 0 says that z stays where it is: the data are N(0, I), and so are they with their scale.
    normal = torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64))
    r = ocm.vp().alpha(1).item()
    torch.testing.assert_close(found.log_prior, normal.log_prob(r * x).sum(1))
    torch.testing.assert_close(found.value, found.log_prior + 4 * math.log(r))
    torch.testing.assert_close(found.bits_per_dim, -found.value / (4 * math.log(2)))
    assert found.num_features == 4


def test_float32_is_shown_to_a_network_of_that_type():
    data = correlated()
    exact = denoiser_of(data, ocm.flow(), "flow_prediction")
    shown = []

    def network(x, time):
        shown.append(x.dtype)
        return exact.backbone(x, time)

    denoiser = ocm.Denoiser(network, exact.schedule, "flow_prediction")
    x = points(3, 3).float()
    found = ocm.log_likelihood(denoiser, x, ocm.LikelihoodSettings(max_probes=3)).value
    assert set(shown) == {torch.float32}
    assert found.dtype == torch.float64
    double = ocm.log_likelihood(exact, x.double(), ocm.LikelihoodSettings(max_probes=3)).value
    torch.testing.assert_close(found, double, rtol=0, atol=0.02)
