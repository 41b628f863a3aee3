"""Heads that put out what no variance is: clamped by the stated rule, or an error that names them.

The rule (docs/explanations/numerics.md): below 0 counts as 0, and above what data in ``x0_range``
allow as that, infinity included. NaN is an error, and so is infinity where the data have no bounds.
"""

import math
from functools import partial

import pytest
import torch
from plain_heads import Constant
from torch import nn

import ocm
from ocm.covariances.operators import diagonal
from ocm.diffusion.tables import Table
from ocm.sampling.finite import all_finite

SHAPE = (2, 1, 4, 4)
STEPS = [1, 400, 1000]
VALUES = {"negative": -1e30, "zero": 0.0, "large": 1e30, "inf": math.inf, "-inf": -math.inf}


class Featured(nn.Module):
    """A backbone for standard normal data, whose features are its input."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x, time):
        self.time = time
        beta_bar = ocm.cosine().beta_bar.to(x)[time + 1]
        return self.features(x) * beta_bar.sqrt().reshape(-1, 1, 1, 1)


ARCHITECTURE = ocm.Architecture("Featured", "features", lambda module, x, time, _: module(x, time))


def denoiser():
    return ocm.Denoiser(Featured(), ocm.cosine(), architecture=ARCHITECTURE).freeze()


def of_frequencies(d, head):
    return ocm.FrequencyLikelihood(d, head, variances=torch.ones(1, 4, 4), colours=torch.eye(1))


def calibrated(d, head):
    table = Table({1: [0.5, 0.5, 0.1], 1000: [0.5, 0.5, 0.1]})
    return ocm.Calibrated((ocm.OptimalCovarianceMatching(d, head), ocm.NPR(d, head)), table)


LEARNED = {
    f"{kind.__name__}, {name}": partial(kind, parameterisation=units)
    for kind in (ocm.OptimalCovarianceMatching, ocm.NPR, ocm.SN, ocm.MaximumLikelihood)
    for name, units in (("bounded", ocm.BOUNDED), ("paper", ocm.PAPER))
} | {
    "ImprovedDDPM, bounded": partial(ocm.ImprovedDDPM, parameterisation=ocm.BOUNDED),
    "ImprovedDDPM, interpolated": partial(ocm.ImprovedDDPM, parameterisation=ocm.PAPER),
    "FrequencyLikelihood": of_frequencies,
    "Calibrated": calibrated,
}


def images():
    generator = torch.Generator().manual_seed(0)
    return ocm.quantise(torch.rand(SHAPE, generator=generator) * 2 - 1)


def half(x):
    return x[..., :2]


def sample(d, covariance, **options):
    return ocm.sample(d, covariance, SHAPE, STEPS, **options)


def inverse(d, covariance, **options):
    return ocm.sample_given_measurement(
        d, covariance, half(images()), half, noise_std=0.1, shape=SHAPE, steps=STEPS, **options
    )


def trajectory(d, covariance, **options):
    return ocm.sample_trajectory(d, covariance, SHAPE, STEPS, **options).log_prob


def bound(d, covariance, levels=256, **options):
    return ocm.bits_per_dim(d, covariance, images(), STEPS, levels=levels, **options).total


def density(d, covariance, **options):
    x = images()
    step = ocm.ddpm(d.schedule, 1, 400)
    return ocm.transition(d.predict(x, 400, s=1), covariance, step, **options).log_prob(x)


USES = {
    "ddpm": partial(sample, noise_at_end=True),
    "ddim": partial(sample, sampler=ocm.ddim),
    "renoised": partial(sample, sampler=ocm.renoised),
    "second order": partial(sample, sampler=ocm.SecondOrder(0.5)),
    "trajectory": trajectory,
    "transition": density,
    "bound": bound,
    "inverse": inverse,
    "row sums": partial(inverse, weighting="row_sums"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", LEARNED)
def test_what_is_no_variance_is_clamped_to_what_data_allow(name, use):
    d = denoiser()
    for value in VALUES.values():
        result = USES[use](d, LEARNED[name](d, Constant(value)))
        assert bool(torch.isfinite(result).all()), value


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", LEARNED)
def test_nan_of_a_head_is_an_error_that_names_head_and_timestep(name, use):
    d = denoiser()
    expected = {"transition": "covariance must be positive.*or NaN"}.get(
        use, f"{name.split(',')[0]}.* with the head Constant.*must state finite.*at t = "
    )
    with pytest.raises((FloatingPointError, ValueError), match=expected):
        USES[use](d, LEARNED[name](d, Constant(math.nan)))


@pytest.mark.parametrize("use", ["ddpm", "second order", "trajectory", "bound", "inverse"])
def test_an_infinite_variance_of_data_without_bounds_is_an_error(use):
    d = denoiser()
    options = {"levels": None} if use == "bound" else {}
    with pytest.raises(FloatingPointError, match=r"NPR with the head Constant.*at t = "):
        USES[use](d, ocm.NPR(d, Constant(math.inf)), x0_range=None, **options)


def test_the_clamped_variance_is_that_of_the_rule():
    d, x = denoiser(), images()
    for value, expected in ((-1e30, 0.0), (-math.inf, 0.0), (1e30, 1.0), (math.inf, 1.0)):
        for name in ("NPR, paper", "FrequencyLikelihood"):
            covariance = LEARNED[name](d, Constant(value))
            stated = covariance.at(d.predict(x, 400, s=1)).bounded((-1.0, 1.0)).diagonal()
            torch.testing.assert_close(stated, torch.full_like(stated, expected))


def test_the_error_names_the_first_timestep_that_is_wrong():
    class Late(Constant):
        def forward(self, features, *_):
            is_late = bool(d.backbone.time[0] < 500)
            return torch.full_like(features, math.nan if is_late else 0.0)

    d = denoiser()
    with pytest.raises(FloatingPointError, match=r"head Late .* 32 NaN .* of 32 .* at t = 400$"):
        sample(d, ocm.NPR(d, Late(0.0)), noise_at_end=True)
    with pytest.raises(FloatingPointError, match=r"head Late .* at t = 400$"):
        trajectory(d, ocm.NPR(d, Late(0.0)), noise_at_end=True)


@pytest.mark.parametrize("use", [use for use in USES if use != "transition"])
def test_nan_of_the_backbone_is_not_blamed_on_the_covariance(use):
    d = denoiser()
    broken = ocm.Denoiser(lambda x, time: x * math.nan, d.schedule)
    with pytest.raises(FloatingPointError, match=r"backbone must put out finite .* at t = 1000"):
        USES[use](broken, ocm.Beta(broken))


def test_nan_that_does_not_come_again_is_an_error_too():
    calls = []

    def once(x, time):
        calls.append(1)
        return x * (math.nan if len(calls) == 1 else 0.5)

    d = ocm.Denoiser(once, ocm.cosine())
    with pytest.raises(FloatingPointError, match="did not give again"):
        sample(d, ocm.Beta(d))


def test_a_density_of_variance_zero_is_an_error():
    d = denoiser()
    with pytest.raises(FloatingPointError, match=r"BetaTilde states variances of 0 \.\. 0"):
        bound(d, ocm.BetaTilde(d), levels=None)


def test_what_cannot_be_looked_at_is_not_waited_for():
    assert all_finite(torch.full((2,), math.nan, device="meta"))
    assert not all_finite(torch.tensor([math.inf]))


@pytest.mark.parametrize("weighting", [None, "row_sums", "covariance"])
def test_a_covariance_of_nan_does_not_solve_for_zero(weighting):
    mean = torch.zeros(1, 4)
    broken, whole = (diagonal(torch.full((1, 4), v), mean.shape) for v in (math.nan, 1.0))
    C, weighting = (whole, broken) if weighting == "covariance" else (broken, weighting)
    with pytest.raises((ValueError, FloatingPointError), match=r"nan|NaN"):
        ocm.posterior_mean_given_measurement(
            mean, C, torch.ones(1, 4), lambda x: x, noise_std=0.1, weighting=weighting
        )
