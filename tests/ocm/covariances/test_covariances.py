"""Covariances of Gaussian data against Bayes' rule, and the two of DDPM against their steps."""

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance

import hessdiag
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
    variance = ocm.Hutchinson(denoiser, num_probes=2, floor=None).at(prediction).diagonal()
    estimates = variance.reshape(-1, D)
    expected = posterior_covariance(gaussian[1], schedule, t).diagonal()
    standard_error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert ((estimates.mean(dim=0) - expected).abs() < 5 * standard_error).all()


def correlated(schedule):
    """A denoiser of strongly correlated data, whose estimates by few probes are often negative."""
    covariance = 0.05 * (0.1 * torch.eye(16) + 0.9 * torch.ones(16, 16))
    return gaussian_denoiser(torch.zeros(16), covariance, schedule), covariance


def test_the_floor_is_the_mean_size_of_the_negative_estimates():
    denoiser, _ = correlated(ocm.linear())
    x_t = torch.randn(8, 1, 1, 16, dtype=torch.float64)
    prediction = denoiser.predict(x_t, 200)
    raw = ocm.Hutchinson(denoiser, 1, floor=None).at(prediction).diagonal()
    stated = ocm.Hutchinson(denoiser, 1).at(prediction).diagonal()
    for sample, estimates in zip(stated.flatten(1).tolist(), raw.flatten(1).tolist(), strict=True):
        negative = [-v for v in estimates if v < 0]
        floor = sum(negative) / max(len(negative), 1)
        assert sample == pytest.approx([max(v, floor) for v in estimates], rel=1e-12)
    assert (raw < 0).double().mean() > 0.1


def test_the_floor_leaves_positive_estimates_alone(gaussian):
    denoiser = gaussian_denoiser(*gaussian, ocm.linear())
    prediction = denoiser.predict(torch.randn(3, 1, 1, D, dtype=torch.float64), 200)
    design = hessdiag.BalancedColoring(D)
    plain, floored = (
        ocm.Hutchinson(denoiser, D, probes=design, floor=floor).at(prediction).diagonal()
        for floor in (None, "error")
    )
    assert torch.equal(plain, floored)
    assert (plain > 0).all()


def test_the_floor_keeps_the_bound_of_few_probes_near_the_exact_one():
    denoiser, covariance = correlated(ocm.linear())
    root = torch.linalg.cholesky(covariance)
    x0 = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) @ root.T
    x0 = ocm.quantise(x0.clamp(-1, 1)).reshape(64, 1, 1, 16).double()

    def bits(covariance):
        return ocm.bits_per_dim(denoiser, covariance, x0, 10).total.mean().item()

    exact = bits(ocm.Exact(denoiser))
    raw, floored = (bits(ocm.Hutchinson(denoiser, 2, floor=f)) for f in (None, "error"))
    assert floored - exact < 0.2 * (raw - exact)


def test_estimates_that_are_not_positive_are_told_once(recwarn):
    denoiser, _ = correlated(ocm.linear())
    x_t = torch.randn(50, 1, 1, 16, dtype=torch.float64)
    raw = ocm.Hutchinson(denoiser, 1, floor=None)
    share = (raw.at(denoiser.predict(x_t, 200)).diagonal() <= 0).double().mean().item()
    assert share > 0.1
    assert not recwarn.list  # as asked for
    covariance = ocm.Hutchinson(denoiser, 1)
    # Where there is more noise than signal every network errs.
    covariance.at(denoiser.predict(x_t, 300))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=f"^{share:.0%} of the variances that num_probes = 1") as w:
        covariance.at(denoiser.predict(x_t, 200))
    assert w[0].filename == __file__
    with pytest.warns(UserWarning, match="at t = [0-9]+ are not positive") as w:
        ocm.sample(denoiser, ocm.Hutchinson(denoiser, 1), (50, 1, 1, 16), 10)
    assert w[0].filename == __file__
    covariance.at(denoiser.predict(x_t, 200))
    ocm.Hutchinson(denoiser, 16, probes=hessdiag.UnitVectors()).at(denoiser.predict(x_t, 200))
    assert not recwarn.list


def test_an_unknown_floor_is_refused(gaussian):
    with pytest.raises(ValueError, match=r"floor must be 'error' or None, got 0\.1"):
        ocm.Hutchinson(gaussian_denoiser(*gaussian, ocm.linear()), 1, floor=0.1)


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
    head = ocm.make_head(denoiser)
    covariance = ocm.OptimalCovarianceMatching(denoiser, head, ocm.PAPER)
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
    # What listens there keeps nothing, and is not doubled by another denoiser.
    ocm.Denoiser(unet, ocm.linear())
    (hook,) = unet.conv_norm_out._forward_pre_hooks.values()
    assert hook.entered is None


@pytest.mark.parametrize("t", [0, 1001, torch.tensor([1, 0])])
def test_a_timestep_out_of_range(unet, t):
    denoiser = ocm.Denoiser(unet, ocm.linear())
    with pytest.raises(ValueError, match=r"t must lie in 1 \.\. 1000"):
        denoiser.output(torch.randn(2, 2, 8, 8), t)
