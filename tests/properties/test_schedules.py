"""Paths are inverted, their steps keep the marginals and compose, their timesteps are in order."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import TENSOR_SEEDS, schedules, tensor, trajectories

import ocm
from ocm.checkpoints.reading import _schedule
from ocm.checkpoints.writing import _schedule_entry
from ocm.diffusion.predictions import PREDICTION_TYPES, coefficients, target
from ocm.diffusion.timesteps import SPACINGS, reverse_steps, timesteps_of
from ocm.likelihoods.probability_flow import between_timesteps
from ocm.sampling.any_sigma import sigmas, timestep_at

close = torch.testing.assert_close
SHARES = st.floats(0.0, 1.0)


def isclose(a, b, rel=1e-9, abs_=1e-12):
    return math.isclose(a, b, rel_tol=rel, abs_tol=abs_)


@given(st.data(), schedules())
def test_the_signal_to_noise_ratio_falls_from_infinity(data, schedule):
    places = data.draw(trajectories(schedule, count=20, least=1e-9))
    log_snr = schedule.log_snr(torch.tensor([0, *places], dtype=torch.float64))
    assert log_snr[0] == math.inf
    assert bool((log_snr.diff() < 0).all())
    alpha, sigma = schedule.scales(torch.tensor(places, dtype=torch.float64))
    assert bool((sigma > 0).all())
    assert bool((alpha > 0)[:-1].all())
    numbers = [schedule.level(t) for t in places]
    assert [level.log_snr for level in numbers] == log_snr[1:].tolist()


@given(st.data(), schedules(discrete=False))
def test_next_to_each_other_the_signal_to_noise_ratio_does_not_rise(data, schedule):
    N = schedule.num_timesteps
    t = data.draw(st.floats(1e-9, N, exclude_min=True) | st.sampled_from([1.0, N / 2]))
    near = [math.nextafter(t, 0.0), t, min(math.nextafter(t, math.inf), N)]
    log_snr = schedule.log_snr(torch.tensor(near, dtype=torch.float64))
    # By the rounding of the two logarithms; at N both may be infinite.
    most = log_snr[:-1] + 1e-13 * (1 + log_snr[:-1].abs())
    assert bool((log_snr[1:] <= most).all())
    for s, later in ((near[0], t), (t, near[2])):
        if s < later:
            assert schedule.lost(s, later) >= 0
            assert schedule.beta_tilde(s, later) >= 0


def test_timesteps_that_rounding_turns_around_lose_nothing():
    path = ocm.edm(2, sigma_min=0.03125, sigma_max=0.0625, rho=4.0, data_std=1.0)
    assert path.lost(math.nextafter(1.0, 0.0), 1.0) == 0.0


@given(st.data(), schedules(discrete=False))
def test_a_timestep_comes_back_from_its_log_snr_and_its_sigma(data, schedule):
    places = data.draw(trajectories(schedule, count=8))
    t = torch.tensor(places, dtype=torch.float64)
    log_snr = schedule.log_snr(t)
    again = schedule.timestep_of(log_snr)
    # As far as the rounding of log SNR tells timesteps apart, most next to N.
    close(schedule.log_snr(again), log_snr, rtol=1e-9, atol=1e-9)
    sigma = schedule.sigma(t)
    by_sigma = torch.tensor(ocm.timesteps_at(schedule, sigma), dtype=torch.float64)
    close(schedule.sigma(by_sigma), sigma, rtol=1e-12, atol=0)
    noisy = (-log_snr / 2).exp()
    known = noisy.isfinite() & (noisy < 1e6)
    back = timestep_at(schedule, noisy[known])
    close(schedule.log_snr(back), log_snr[known], rtol=1e-9, atol=1e-9)


@given(st.data(), schedules())
def test_a_discrete_timestep_is_the_nearest_one_of_its_sigma(data, schedule):
    assume(not schedule.is_continuous)
    levels = sigmas(schedule)
    t = data.draw(st.integers(1, schedule.num_timesteps))
    assert timestep_at(schedule, levels[t - 1 : t]).item() == t


@given(st.data(), schedules(), SHARES, SHARES)
def test_every_step_keeps_the_moments_given_x0(data, schedule, eta, noise):
    places = data.draw(trajectories(schedule, count=2, least=1e-6))
    for s, t in reverse_steps(places):
        (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = schedule.level(s), schedule.level(t)
        lost, beta_tilde = schedule.lost(s, t), schedule.beta_tilde(s, t)
        assert 0 < lost <= 1
        assert beta_tilde > 0 or s == 0
        assert beta_tilde <= sigma_s**2
        for a, b, variance in (
            ocm.ddpm(schedule, s, t),
            ocm.ddim(schedule, s, t, eta=eta),
            ocm.renoised(schedule, s, t, noise=noise),
        ):
            assert 0 <= variance <= sigma_s**2 * (1 + 1e-15)
            assert isclose((a * sigma_t) ** 2 + variance, sigma_s**2, abs_=1e-300)
            assert isclose(a * alpha_t + b, alpha_s)
        full = ocm.ddim(schedule, s, t, eta=1.0)
        for one, other in zip(ocm.ddpm(schedule, s, t), full, strict=True):
            # sqrt(sigma_s^2 - lambda^2) of a small difference has half of the digits.
            assert isclose(one, other, rel=1e-6, abs_=1e-7)


@given(st.data(), schedules())
def test_two_steps_make_up_one(data, schedule):
    places = data.draw(trajectories(schedule, count=3, least=1e-4))
    assume(len(places) == 3)
    r, s, t = places
    assume(schedule.has_signal(t))
    kept = {pair: 1 - schedule.lost(*pair) for pair in ((r, s), (s, t), (r, t))}
    assert isclose(kept[r, s] * kept[s, t], kept[r, t], abs_=1e-14)
    ratio = schedule.level(t).alpha / schedule.level(s).alpha
    both = schedule.beta(s, t) + ratio**2 * schedule.beta(r, s)
    # 1 - SNR_t / SNR_s of near timesteps is a difference of logarithms of size 30.
    assert isclose(both, schedule.beta(r, t), rel=1e-7)
    first, second, whole = (ocm.ddpm(schedule, *pair) for pair in ((s, t), (r, s), (r, t)))
    # q(x_r | x_t, x0) by way of x_s.
    assert isclose(second[0] * first[0], whole[0], rel=1e-7)
    assert isclose(second[0] * first[1] + second[1], whole[1], rel=1e-7)
    assert isclose(second[0] ** 2 * first[2] + second[2], whole[2], rel=1e-7)


@given(st.data(), schedules())
def test_timesteps_of_every_spacing_increase_within_the_path(data, schedule):
    N = schedule.num_timesteps
    K = data.draw(st.integers(1, N) | st.sampled_from([1, min(2, N), N]))
    for name, spacing in SPACINGS.items():
        timesteps = spacing(schedule, K)
        assert len(timesteps) == K
        assert timesteps_of(schedule, timesteps) == timesteps  # increasing, in (0, N], whole
        if name != "leading":
            assert timesteps[-1] == N
        assert reverse_steps(timesteps)[-1] == (0, timesteps[0])


@given(st.data(), st.sampled_from([ocm.linear, ocm.cosine, ocm.flow]), TENSOR_SEEDS)
def test_no_timesteps_have_a_smaller_bound_than_the_optimal_ones(data, path, seed):
    N = data.draw(st.integers(3, 8))
    K, schedule = data.draw(st.integers(2, N)), path(N)
    variances = (2 * tensor((N,), seed)).exp()

    def bound(timesteps):
        snr = schedule.log_snr(torch.tensor(timesteps)).exp()
        last = torch.tensor(timesteps[1:]) - 1
        return 0.5 * torch.log1p((snr[:-1] - snr[1:]) * variances[last]).sum().item()

    optimal = ocm.optimal_timesteps(schedule, variances, K)
    others = [[1, *inner, N] for inner in itertools.combinations(range(2, N), K - 2)]
    assert optimal in others
    assert isclose(bound(optimal), min(map(bound, others)))


@given(st.data(), schedules(), TENSOR_SEEDS)
def test_x0_comes_back_from_what_a_network_should_put_out(data, schedule, seed):
    t = data.draw(trajectories(schedule, count=1))[0]
    x0, noise = tensor((4,), seed), tensor((4,), seed + 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    std = data.draw(st.floats(0.1, 3.0))
    for kind in PREDICTION_TYPES:
        if kind == "epsilon" and alpha < 1e-6:
            continue
        p, q, scale = coefficients(kind, alpha, sigma, std)
        found = p * (alpha * x0 + sigma * noise) + q * target(kind, alpha, sigma, x0, noise, std)
        close(found, x0, rtol=1e-8, atol=1e-8)
        assert scale > 0


@given(schedules())
def test_a_schedule_comes_back_from_its_json(schedule):
    again = _schedule(json.loads(json.dumps(_schedule_entry(schedule))))
    assert (again.name, again.num_timesteps) == (schedule.name, schedule.num_timesteps)
    assert (again.data_std, again.is_continuous) == (schedule.data_std, schedule.is_continuous)
    exact = schedule.name != "betas"
    places = torch.arange(schedule.num_timesteps + 1)
    for of in ("alpha", "sigma", "log_snr", "time"):
        one, other = (getattr(s, of)(places) for s in (schedule, again))
        close(one, other, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9)


@given(st.data(), schedules())
def test_a_discrete_path_is_filled_in_between_its_timesteps(data, schedule):
    path = between_timesteps(schedule)
    whole = torch.tensor(data.draw(trajectories(schedule)), dtype=torch.float64)
    for of in ("alpha", "sigma"):
        close(getattr(path, of)(whole), getattr(schedule, of)(whole), rtol=1e-9, atol=1e-12)
    N = schedule.num_timesteps
    places = torch.linspace(0, N, 41, dtype=torch.float64)
    assert bool((path.log_snr(places).diff() < 0).all())


@given(st.floats(1e-3, 50.0), st.lists(SHARES, min_size=1, max_size=6))
def test_a_shift_is_undone_by_its_inverse(shift, sigmas):
    there = ocm.shifted(sigmas, shift)
    assert bool(((there >= 0) & (there <= 1 + 1e-12)).all())
    close(
        ocm.shifted(there, 1 / shift),
        torch.tensor(sigmas, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )


def test_betas_that_leave_no_signal_long_before_the_end_are_refused():
    """alpha was 0 from the middle on, log SNR -inf, and every difference of two of them NaN."""
    with pytest.raises(ValueError, match=r"betas must leave signal before the last timestep.*1418"):
        ocm.from_betas([0.632] * 2000)
    with pytest.raises(ValueError, match="betas must leave signal"):
        ocm.linear(200_000)
