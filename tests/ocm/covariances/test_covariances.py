"""Covariances of Gaussian data against Bayes' rule, and the two of DDPM against their steps."""

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance

import ocm
from ocm.sampling.samplers import ddpm

D = 6


@pytest.fixture
def gaussian():
    factor = torch.randn(D, D, generator=torch.Generator().manual_seed(0)) / 4
    return torch.linspace(-0.4, 0.4, D), factor @ factor.T + 0.02 * torch.eye(D)


@pytest.mark.parametrize("schedule", [ocm.linear(), ocm.cosine()])
@pytest.mark.parametrize("t", [1, 30, 300, 800])
def test_exact_is_the_posterior_variance(gaussian, schedule, t):
    denoiser = gaussian_denoiser(*gaussian, schedule)
    x_t = torch.randn(3, 1, 1, D, dtype=torch.float64)
    variance = ocm.Exact(denoiser).at(denoiser.predict(x_t, t)).diagonal()
    expected = posterior_covariance(gaussian[1], schedule, t).diagonal().expand_as(x_t)
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=1e-9)


def test_hutchinson_is_unbiased(gaussian):
    schedule, t = ocm.linear(), 200
    denoiser = gaussian_denoiser(*gaussian, schedule)
    x_t = torch.randn(2000, 1, 1, D, dtype=torch.float64)
    prediction = denoiser.predict(x_t, t)
    variance = ocm.Hutchinson(denoiser, num_probes=2).at(prediction).diagonal()
    estimates = variance.reshape(-1, D)
    expected = posterior_covariance(gaussian[1], schedule, t).diagonal()
    standard_error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert ((estimates.mean(dim=0) - expected).abs() < 5 * standard_error).all()


def test_hutchinson_draws_new_probes_at_each_timestep_and_sample(gaussian):
    denoiser = gaussian_denoiser(*gaussian, ocm.linear())
    covariance = ocm.Hutchinson(denoiser, num_probes=1)
    x_t = torch.randn(1, 1, 1, D).expand(4, -1, -1, -1)
    whole = covariance.at(denoiser.predict(x_t, 200)).diagonal()
    assert not torch.equal(whole[0], whole[1])
    part = covariance.at(denoiser.predict(x_t[2:], 200, sample_offset=2)).diagonal()
    torch.testing.assert_close(whole[2:], part)
    signs = whole - whole.mean(dim=0)
    other = covariance.at(denoiser.predict(x_t, 201)).diagonal()
    assert not torch.allclose(signs, other - other.mean(dim=0), rtol=0.1)


@pytest.mark.parametrize(("s", "t"), [(1, 2), (10, 300), (500, 1000)])
def test_the_two_variances_of_ddpm_come_back_in_the_step(s, t):
    schedule = ocm.cosine()
    step = ddpm(schedule, s, t)
    denoiser = gaussian_denoiser(torch.zeros(4), torch.eye(4), schedule)
    prediction = denoiser.predict(torch.zeros(1, 1, 1, 4, dtype=torch.float64), t)
    for covariance, expected in (
        (ocm.Beta(denoiser), schedule.beta(s, t)),
        (ocm.BetaTilde(denoiser), schedule.beta_tilde(s, t)),
    ):
        variance = covariance.at(prediction).diagonal().item()
        noise = step.noise_variance + step.mean_from_x0**2 * variance
        assert noise == pytest.approx(expected, rel=1e-9)


def test_an_untrained_head_states_the_variance_of_a_flat_prior(unet):
    denoiser = ocm.Denoiser(unet, ocm.linear()).freeze()
    covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser))
    x_t = torch.randn(2, 2, 8, 8)
    variance = covariance.at(denoiser.predict(x_t, 100)).diagonal()
    expected = denoiser.schedule.beta_bar[100] / denoiser.schedule.alpha_bar[100]
    torch.testing.assert_close(variance, expected.float().expand(2, 2, 8, 8))


def test_features_are_the_input_of_the_last_layers(unet):
    denoiser = ocm.Denoiser(unet, ocm.linear()).freeze()
    x_t = torch.randn(2, 2, 8, 8)
    prediction = denoiser.predict(x_t, torch.tensor([3, 700]))
    after = unet.conv_out(unet.conv_act(unet.conv_norm_out(prediction.features)))
    torch.testing.assert_close(after, prediction.output)
    assert not unet.conv_norm_out._forward_pre_hooks


@pytest.mark.parametrize("t", [0, 1001, torch.tensor([1, 0])])
def test_a_timestep_out_of_range(unet, t):
    denoiser = ocm.Denoiser(unet, ocm.linear())
    with pytest.raises(ValueError, match=r"t must lie in 1 \.\. 1000"):
        denoiser.output(torch.randn(2, 2, 8, 8), t)
