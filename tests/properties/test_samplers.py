"""Samplers and bounds take any timesteps: moments, densities and likelihoods come out right."""

import math
from functools import partial

import torch
from gaussian_on_paths import Gaussian
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SEEDS, TENSOR_SEEDS, offsets, parts, schedules, splits, tensor, trajectories

import ocm
from ocm.covariances.operators import full
from ocm.diffusion.divergences import discretised_gaussian_log_prob, gaussian_step_kl
from ocm.diffusion.predictions import target
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import reverse_steps
from ocm.likelihoods.dequantisation import dequantise

close = torch.testing.assert_close
SAMPLERS = st.sampled_from(
    [ocm.ddpm, ocm.ddim, partial(ocm.ddim, eta=0.5), ocm.renoised, partial(ocm.renoised, noise=0.5)]
)


@given(st.data(), schedules(), st.floats(0.05, 3.0), SAMPLERS)
def test_gaussian_data_keep_their_variance_in_any_steps(data, schedule, variance, sampler):
    """By the recursion of the variance: from that of x_t, a^2 + ... to that of x_s, down to x_0."""
    law = Gaussian(schedule, variance)
    places = data.draw(trajectories(schedule))
    alpha, sigma, *_ = schedule.level(places[-1])
    current = alpha**2 * variance + sigma**2
    for s, t in reverse_steps(places):
        a, b, noise_variance = sampler(schedule, s, t)
        stated = noise_variance + b**2 * law.posterior_variance(t)
        current = (a + b * law.gain(t)) ** 2 * current + stated
        alpha, sigma, *_ = schedule.level(s)
        assert math.isclose(current, alpha**2 * variance + sigma**2, rel_tol=1e-6)


@given(st.data(), schedules(), st.floats(0.05, 3.0), SAMPLERS, SEEDS)
def test_a_trajectory_is_the_sample_and_its_density_is_found_again(
    data, schedule, variance, sampler, seed
):
    law = Gaussian(schedule, variance)
    denoiser = law.denoiser()
    shape, steps = (2, 3), data.draw(trajectories(schedule, count=4, least=1e-2))
    options = {"seed": seed, "sampler": sampler, "x0_range": None, "dtype": torch.float64}
    options |= {"sample_offset": data.draw(offsets(2))}
    trajectory = ocm.sample_trajectory(denoiser, law, shape, steps, **options)
    samples = ocm.sample(denoiser, law, shape, steps, **options)
    close(trajectory.x0, samples, rtol=1e-9, atol=1e-12)
    again = ocm.trajectory_log_prob(denoiser, law, trajectory, sampler=sampler, x0_range=None)
    close(again, trajectory.log_prob, rtol=1e-6, atol=1e-6)
    for k, (s, t) in enumerate(reverse_steps(steps)[:-1]):
        a, b, noise_variance = sampler(schedule, s, t)
        x_t, x_s = trajectory.states[k : k + 2]
        std = (noise_variance + b**2 * law.posterior_variance(t)) ** 0.5
        reverse = torch.distributions.Normal((a + b * law.gain(t)) * x_t, std)
        close(trajectory.log_prob[:, k], reverse.log_prob(x_s).sum(1), rtol=1e-5, atol=1e-4)


@given(st.data(), schedules(), st.floats(0.05, 3.0), SAMPLERS, SEEDS)
def test_a_batch_is_sampled_in_any_parts(data, schedule, variance, sampler, seed):
    law = Gaussian(schedule, variance)
    denoiser = law.denoiser()
    steps = data.draw(trajectories(schedule, count=3, least=1e-2))
    first = data.draw(offsets(4))

    def draw(count, offset):
        return ocm.sample(
            denoiser, law, (count, 2), steps,
            sampler=sampler, seed=seed, sample_offset=first + offset, noise_at_end=True,
        )  # fmt: skip

    whole = draw(4, 0)
    for part in parts(data.draw(splits(4))):
        close(draw(part.stop - part.start, part.start), whole[part], rtol=1e-6, atol=1e-6)


@given(st.data(), schedules(), st.floats(0.05, 3.0), SEEDS, TENSOR_SEEDS)
def test_the_terms_of_a_bound_are_those_of_the_two_gaussians(
    data, schedule, variance, seed, tensor_seed
):
    law = Gaussian(schedule, variance)
    denoiser = law.denoiser()
    steps = data.draw(trajectories(schedule, count=4, least=1e-2, to_the_end=True))
    x = variance**0.5 * tensor((2, 3), tensor_seed)
    bits = ocm.bits_per_dim(denoiser, law, x, steps, levels=None, x0_range=None, seed=seed)
    # Term by term the KL of two Gaussians, written a second time from their variances.
    for k, (s, t) in enumerate(reverse_steps(steps)[:-1]):
        _, b, noise_variance = ocm.ddpm(schedule, s, t)
        own = noise_variance + b**2 * law.posterior_variance(t)
        prediction = ocm.diffusion.noise.noisy_prediction(denoiser, x, t, seed)
        error = b * (x - prediction.x0_hat)
        kl = 0.5 * (math.log(own / noise_variance) + (noise_variance + error.square()) / own - 1.0)
        expected = kl.mean(1) / math.log(2)
        close(bits.steps[:, k], expected, rtol=1e-5, atol=1e-7)
    prediction = ocm.diffusion.noise.noisy_prediction(denoiser, x, steps[0], seed)
    decoder = torch.distributions.Normal(prediction.x0_hat, law.posterior_variance(steps[0]) ** 0.5)
    close(bits.decoder, -decoder.log_prob(x).mean(1) / math.log(2), rtol=1e-6, atol=1e-7)


@given(st.floats(0.0, 4.0), st.floats(0.0, 50.0), st.floats(0.0, 1e6))
def test_a_step_costs_nothing_less_than_its_entropy(squared_error, variance, snr):
    e, v = (torch.tensor(x, dtype=torch.float64) for x in (squared_error, variance))
    kl = gaussian_step_kl(e, v, snr)
    assert kl >= -1e-12
    assert kl >= gaussian_step_kl(e, e, snr) - 1e-9  # least where the variance is the error


@given(st.integers(2, 60), st.floats(-1.0, 1.0), st.floats(1e-2, 4.0))
def test_the_masses_of_all_grey_levels_are_one(levels, mean, std):
    x0 = torch.linspace(-1.0, 1.0, levels, dtype=torch.float64)
    masses = discretised_gaussian_log_prob(x0, torch.full_like(x0, mean), std, levels)
    close(masses.exp().sum(), torch.tensor(1.0).double(), rtol=1e-9, atol=0)


@given(
    st.integers(2, 300),
    st.sampled_from(["uniform", "truncated_normal"]),
    st.floats(-5.0, 1.0).map(lambda x: 10**x),
    SEEDS,
    TENSOR_SEEDS,
)
def test_dequantised_images_round_to_themselves(levels, name, std, seed, tensor_seed):
    x0 = ocm.quantise(tensor((2, 5), tensor_seed).clamp(-1, 1), levels)
    noise = ocm.diffusion.noise.normal((2, 5), seed)
    extremes = torch.tensor([[-9.0, -6.0, 0.0, 6.0, 9.0]]).expand(2, 5)
    for z in (noise, extremes):
        y, log_weight = dequantise(x0, z, name, levels=levels, std=std)
        assert bool(torch.isfinite(log_weight).all())
        half = 1.0 / (levels - 1)
        assert bool(((y - x0).abs() <= half * (1 + 1e-9)).all())
        inside = (y - x0).abs() < half * (1 - 1e-6)
        close(ocm.quantise(y, levels)[inside], x0.double()[inside], rtol=0, atol=1e-9)


@given(st.integers(2, 300), TENSOR_SEEDS)
def test_quantising_takes_the_nearest_level_once(levels, seed):
    x = tensor((20,), seed).clamp(-1, 1)
    on_grid = ocm.quantise(x, levels)
    close(ocm.quantise(on_grid, levels), on_grid, rtol=0, atol=1e-12)
    assert bool(((on_grid - x).abs() <= (1 + 1e-9) / (levels - 1)).all())
    assert bool((on_grid.abs() <= 1).all())


@given(st.integers(1, 5), st.integers(1, 5), TENSOR_SEEDS, st.floats(0.01, 2.0))
def test_the_posterior_given_a_measurement_is_that_of_the_matrix(D, m, seed, noise_std):
    root, A = tensor((1, D, D), seed), tensor((m, D), seed + 1)
    C = root @ root.mT + 0.1 * torch.eye(D)
    mean, y = tensor((1, D), seed + 2), tensor((1, m), seed + 3)
    found = ocm.posterior_mean_given_measurement(
        mean, full(C, torch.Size((1, D))), y, lambda x: x @ A.T,
        noise_std=noise_std, tolerance=1e-9,
    )  # fmt: skip
    gram = A @ C[0] @ A.T + noise_std**2 * torch.eye(m)
    expected = mean + (C[0] @ A.T @ torch.linalg.solve(gram, (y - mean @ A.T)[0]))
    close(found, expected, rtol=1e-4, atol=1e-5)


@given(st.data(), schedules(discrete=False), TENSOR_SEEDS, st.floats(0.05, 3.0))
def test_x0_at_any_sigma_is_that_at_its_timestep(data, schedule, seed, variance):
    law = Gaussian(schedule, variance)
    t = data.draw(trajectories(schedule, count=1, least=1e-2))[0]
    alpha, sigma, *_ = schedule.level(t)
    assume(alpha >= 1e-3)
    x = tensor((2, 3), seed)
    posterior = ocm.x0_given(law.denoiser(), law, x, sigma / alpha, x0_range=None)
    close(posterior.mean, law.gain(t) * alpha * x, rtol=1e-5, atol=1e-7)
    stated = posterior.covariance.diagonal().item()
    close(stated, law.posterior_variance(t), rtol=1e-5, atol=1e-9)


@given(schedules(), st.integers(1, 12), st.floats(1e-3, 1.0))
def test_a_calibration_of_one_and_zero_changes_nothing(schedule, K, variance):
    law, N = Gaussian(schedule, variance), schedule.num_timesteps
    calibrated = ocm.Calibrated((law,), Table({1e-9: [1.0, 0.0], N: [1.0, 0.0]}))
    plain, other = (
        ocm.sample(law.denoiser(), c, (2, 2), min(K, N), dtype=torch.float64)
        for c in (law, calibrated)
    )
    close(plain, other, rtol=1e-9, atol=1e-12)


@given(st.data(), schedules(), TENSOR_SEEDS)
def test_every_prediction_type_says_the_same_of_x0(data, schedule, seed):
    t = data.draw(trajectories(schedule, count=1, least=1e-2))[0]
    x0, noise = tensor((2, 3), seed), tensor((2, 3), seed + 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = alpha * x0 + sigma * noise
    for kind in ("sample", "v_prediction", "flow_prediction", "edm", "trigflow"):
        made = target(kind, alpha, sigma, x0, noise, schedule.data_std)
        denoiser = ocm.Denoiser(lambda x, time, made=made: made, schedule, kind)
        close(denoiser.predict(x_t, t).x0_hat, x0, rtol=1e-7, atol=1e-7)
        per_sample = denoiser.predict(x_t, torch.full((2,), t)).x0_hat
        close(per_sample, x0, rtol=1e-5, atol=1e-5)
