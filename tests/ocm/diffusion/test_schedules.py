import itertools
import math

import pytest
import torch

from ocm.diffusion import schedules, timesteps


@pytest.fixture(params=["linear", "cosine"])
def schedule(request):
    return schedules.SCHEDULES[request.param](1000)


def test_tables_against_their_definitions():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    linear = schedules.linear()
    torch.testing.assert_close(linear.alpha_bar[1:], torch.cumprod(1 - betas, 0))
    assert linear.alpha_bar[0] == 1.0
    cosine = schedules.cosine()

    def curve(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert cosine.alpha_bar[400].item() == pytest.approx(curve(400) / curve(0), rel=1e-12)
    assert cosine.beta(999, 1000) == pytest.approx(0.999)


def test_tables_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    for name, mine in (("linear", schedules.linear()), ("squaredcos_cap_v2", schedules.cosine())):
        theirs = DDPMScheduler(beta_schedule=name)
        torch.testing.assert_close(
            mine.alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7
        )
        taken = schedules.from_betas(theirs.betas)
        torch.testing.assert_close(
            taken.alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7
        )


def test_relations_between_timesteps(schedule):
    alpha_bar, beta_bar = schedule.alpha_bar, schedule.beta_bar
    torch.testing.assert_close(alpha_bar + beta_bar, torch.ones(1001, dtype=torch.float64))
    for s, t in [(0, 1), (1, 2), (3, 700), (999, 1000)]:
        alpha = (alpha_bar[t] / alpha_bar[s]).item()
        assert schedule.beta(s, t) == pytest.approx(1 - alpha, rel=1e-9)
        # Composition of the two noises
        assert beta_bar[t].item() == pytest.approx(
            alpha * beta_bar[s].item() + schedule.beta(s, t), rel=1e-12
        )
        assert schedule.beta_tilde(s, t) == pytest.approx(
            schedule.beta(s, t) * beta_bar[s].item() / beta_bar[t].item(), rel=1e-12
        )


@pytest.mark.parametrize(("s", "t"), [(5, 5), (6, 5), (-1, 5), (5, 1001)])
def test_timesteps_out_of_order(schedule, s, t):
    with pytest.raises(ValueError, match=rf"0 <= s < t <= 1000, got s = {s}, t = {t}"):
        schedule.beta(s, t)


def test_even_timesteps():
    assert timesteps.even_timesteps(schedules.linear(), 1) == [1000]
    assert timesteps.even_timesteps(schedules.linear(), 2) == [1, 1000]
    assert timesteps.even_timesteps(schedules.linear(), 1000) == list(range(1, 1001))
    for K in (3, 10, 25, 50, 999):
        chosen = timesteps.even_timesteps(schedules.linear(), K)
        assert (len(chosen), chosen[0], chosen[-1]) == (K, 1, 1000)
        assert all(s < t for s, t in itertools.pairwise(chosen))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timesteps.even_timesteps(schedules.linear(), 0), "K must be at least 1, got 0"),
        (lambda: timesteps.even_timesteps(schedules.linear(), 1001), "K must lie in .* got 1001"),
        (lambda: timesteps.reverse_steps([1, 5, 5]), r"must increase .* got \[1, 5, 5\]"),
        (lambda: timesteps.reverse_steps([]), r"must increase .* got \[\]"),
        (lambda: timesteps.reverse_steps([0, 3]), r"must increase .* got \[0, 3\]"),
        (lambda: schedules.from_betas([1.0, 0.1]), "betas must be"),
        (lambda: schedules.from_betas([]), "betas must be"),
        (lambda: schedules.cosine(1), r"num_timesteps must be in \[2, 1000000\], got 1"),
        (lambda: schedules.linear(0), "num_timesteps must be at least 1, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
