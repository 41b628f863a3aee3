"""Samplers and bounds on every path: the moments and the likelihood of Gaussian data."""

import math
from functools import partial

import pytest
import torch
from path_denoiser import DATA_STD, FEATURES, PATHS, SHAPE, gaussian, path_denoiser

import ocm
from ocm.diffusion.timesteps import reverse_steps
from ocm.sampling.samplers import renoised

TYPES = {
    "linear": "epsilon",
    "zero_snr": "v_prediction",
    "vp": "sample",
    "flow": "flow_prediction",
    "edm": "edm",
    "trigflow": "trigflow",
}
SAMPLERS = {
    "ode": ocm.ddim,
    "0.3": partial(renoised, noise=0.3),
    "ddim 0.5": partial(ocm.ddim, eta=0.5),
    "ddpm": ocm.ddpm,
    "0.8": partial(renoised, noise=0.8),
    "all new": renoised,
}


def denoiser_of(path):
    return path_denoiser(gaussian(), path, TYPES[path])


def propagated(denoiser, covariance, timesteps, sampler):
    """Mean and covariance of x_0 by the affine steps of Gaussian data, without any sampling."""
    schedule, D = denoiser.schedule, FEATURES
    start = math.hypot(schedule.alpha(timesteps[-1]), schedule.sigma(timesteps[-1]))
    mean = torch.zeros(D, dtype=torch.float64)
    spread = start**2 * torch.eye(D, dtype=torch.float64)
    # The law at the origin and at every unit vector tells the affine map of the mean.
    points = torch.cat([torch.zeros(1, D), torch.eye(D)]).double().reshape(D + 1, *SHAPE)
    for s, t in reverse_steps(timesteps):
        prediction = denoiser.predict(points, t, s=s)
        step = sampler(schedule, s, t)
        law = ocm.transition(prediction, covariance, step, x0_range=None)
        means = law.mean.flatten(1)
        offset, slope = means[0], (means[1:] - means[0]).T
        unit = torch.eye(D, dtype=torch.float64)
        added = torch.stack(
            [law.covariance.multiply(v.expand(D + 1, D).reshape(points.shape))[0] for v in unit]
        ).flatten(1)
        mean = offset + slope @ mean
        spread = slope @ spread @ slope.T + added
    return mean, spread


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_has_the_moments_of_the_data(path, name):
    denoiser, data = denoiser_of(path), gaussian()
    for K in (2, 10):
        timesteps = ocm.trailing_timesteps(denoiser.schedule, K)
        mean, covariance = propagated(denoiser, ocm.Full(denoiser), timesteps, SAMPLERS[name])
        # A path with signal at N does not start from its own x_N.
        tolerance = 1e-9 if not denoiser.schedule.has_signal(1000) else 0.02
        assert (mean - data.mean).norm() < tolerance
        assert (covariance - data.covariance).norm() < tolerance * data.covariance.norm()
        # and without the covariance they are too narrow
        _, narrow = propagated(denoiser, ocm.BetaTilde(denoiser), timesteps, SAMPLERS[name])
        assert narrow.trace() < 0.9 * data.covariance.trace()


@pytest.mark.parametrize("path", PATHS)
def test_samples_have_the_moments_that_were_propagated(path):
    denoiser, data = denoiser_of(path), gaussian()
    x = ocm.sample(
        denoiser,
        ocm.Full(denoiser),
        (20_000, *SHAPE),
        ocm.trailing_timesteps(denoiser.schedule, 3),
        x0_range=None,
        noise_at_end=True,
    ).flatten(1)
    assert (x.mean(0).double() - data.mean).norm() < 0.02
    assert (x.T.cov().double() - data.covariance).norm() < 0.03 * data.covariance.norm()


@pytest.mark.parametrize("path", PATHS)
def test_bounds_are_the_likelihood(path):
    """In expectation over the noise, for any number of steps; but for the prior's mismatch."""
    denoiser, data = denoiser_of(path), gaussian()
    generator = torch.Generator().manual_seed(0)
    x0 = data.mean + 0.5 * torch.randn(1, FEATURES, generator=generator).double()
    exact = -data.log_prob(x0).item() / (FEATURES * math.log(2.0))
    repeated = x0.reshape(1, *SHAPE).expand(4000, *SHAPE)
    for K in (1, 2, 7):
        timesteps = ocm.trailing_timesteps(denoiser.schedule, K)
        bits = ocm.bits_per_dim(
            denoiser, ocm.Full(denoiser), repeated, timesteps, levels=None, x0_range=None
        ).total
        error = bits.std().item() / math.sqrt(len(bits))
        prior_gap = 1e-3 if denoiser.schedule.has_signal(1000) else 1e-9
        assert bits.mean().item() == pytest.approx(exact, abs=5 * error + prior_gap)
        assert error < 0.02


def test_a_smaller_covariance_has_a_larger_bound():
    denoiser, data = denoiser_of("flow"), gaussian()
    x0 = torch.distributions.MultivariateNormal(data.means[0], data.covariances[0]).sample((500,))
    bits = {
        name: ocm.bits_per_dim(
            denoiser, of(denoiser), x0.reshape(-1, *SHAPE), 5, levels=None, x0_range=None
        ).total.mean()
        for name, of in (("full", ocm.Full), ("diagonal", ocm.Exact))
    }
    assert bits["full"] < bits["diagonal"] - 0.05


@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_the_ode_is_that_of_the_family(path):
    """Euler's step of dx/dt for a flow; DDIM; Karras' Euler step; TrigFlow's rotation."""
    denoiser = denoiser_of(path)
    schedule = denoiser.schedule
    s, t = 300, 700
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    prediction = denoiser.predict(x, t)
    law = ocm.transition(
        prediction, ocm.BetaTilde(denoiser), ocm.ddim(schedule, s, t), x0_range=None
    )
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
    output, x0 = prediction.output, prediction.x0_hat
    expected = {
        "flow": lambda: x + (sigma_s - sigma_t) * output,
        "edm": lambda: x + (sigma_s - sigma_t) * (x - x0) / sigma_t,
        "trigflow": lambda: _rotated(x, output, (t - s) / 1000 * math.pi / 2),
    }.get(path, lambda: alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t)()
    torch.testing.assert_close(law.mean, expected, rtol=1e-9, atol=1e-9)


def _rotated(x, F, angle):
    # x_s = cos(t - s) x_t - sin(t - s) data_std F
    return math.cos(angle) * x - math.sin(angle) * DATA_STD * F


def test_without_the_covariance_the_flow_is_diffusers():
    """Euler and stochastic_sampling, with the same noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    denoiser = denoiser_of("flow")
    schedule = denoiser.schedule
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    for stochastic in (False, True):
        theirs = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
        theirs.set_timesteps(4)
        ours, at = x, x
        for k, time in enumerate(theirs.timesteps):
            output = denoiser.output(at, time.item())
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5 + k))
            at = theirs.step(
                output, time, at, generator=torch.Generator().manual_seed(5 + k)
            ).prev_sample
            s, t = (1000 * theirs.sigmas[k + i].double().item() for i in (1, 0))
            step = renoised(schedule, s, t) if stochastic else ocm.ddim(schedule, s, t)
            law = ocm.transition(
                denoiser.predict(ours, t), ocm.BetaTilde(denoiser), step, x0_range=None
            )
            ours = law.draw(z) if stochastic else law.mean
        torch.testing.assert_close(ours, at, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [-0.1, 1.1])
def test_a_share_of_noise_outside_of_zero_and_one(noise):
    with pytest.raises(ValueError, match=rf"noise must lie in \[0, 1\], got {noise}"):
        renoised(ocm.flow(), 100, 200, noise=noise)
