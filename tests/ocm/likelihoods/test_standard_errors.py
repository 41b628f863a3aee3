"""What a log-likelihood says of its own errors, by copies of one image with probes of their own."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import hessdiag
import ocm
from ocm.likelihoods.settings import LikelihoodSettings, LogLikelihood

SHAPE = (2, 4, 4)
COPIES = 1600


@functools.cache
def network():
    """A denoiser of convolutions with random weights."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 3, padding=1)
    ).double()
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, std=0.25)
    return layers.requires_grad_(False)


def denoiser():
    return ocm.Denoiser(
        lambda x, time: network()(x) * (time / 500).cos()[:, None, None, None].to(x),
        ocm.flow(),
        "sample",
    )


@functools.cache
def image():
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(1)).double() - 0.5


@functools.cache
def without_chance(solver):
    settings = settings_of(solver, probes="exact", max_probes=32)
    return ocm.log_likelihood(denoiser(), image(), settings, first_timestep=100).value.item()


def settings_of(solver, **options):
    return LikelihoodSettings(solver, num_steps=4, tolerance=1e-2, **options)


@pytest.mark.parametrize(
    ("solver", "probes", "max_probes", "new_probes"),
    [
        ("heun", "rademacher", 8, True),
        ("heun", "rademacher", 8, False),
        ("heun", "coloring", 12, True),
        ("heun", "coloring", 16, False),
        ("heun", hessdiag.BalancedColoring(4), 16, True),
        ("rk4", "rademacher", 4, True),
        ("dopri5", "rademacher", 8, True),
    ],
)
def test_intervals_cover(solver, probes, max_probes, new_probes):
    """The errors are of mean zero, of the size that is stated, and within 95% of intervals.

    Chance: a binomial standard deviation of 0.0054 in what is covered.
    """
    if probes == "coloring":  # blocks enough for the quantiles of Student to hold
        probes = hessdiag.Coloring(3 if new_probes else 2)
    settings = settings_of(solver, probes=probes, max_probes=max_probes, new_probes=new_probes)
    copies = image().expand(COPIES, *SHAPE)
    found = ocm.log_likelihood(denoiser(), copies, settings, first_timestep=100)
    error = found.value - without_chance(solver)
    assert error.mean().abs() < 4 * error.std() / COPIES**0.5
    stated = found.stderr.square().mean().sqrt()
    low, high = found.interval(0.95)
    covered = ((low <= without_chance(solver)) & (without_chance(solver) <= high)).double().mean()
    assert error.std() > 0.05
    assert 0.93 < error.square().mean().sqrt() / stated < 1.07
    assert 0.93 <= covered <= 0.97
    torch.testing.assert_close(found.bits_per_dim_stderr, found.stderr / 32 / 0.6931471805599453)


LINEAR = ocm.Denoiser(
    lambda x, time: x * torch.linspace(0.1, 0.9, 32).reshape(SHAPE).to(x), ocm.flow(), "sample"
)


@pytest.mark.parametrize(
    ("solver", "new_probes"), [("heun", True), ("heun", False), ("bosh3", True)]
)
@pytest.mark.parametrize("probes", ["rademacher", "coloring"])
def test_no_variance_is_no_error(probes, solver, new_probes):
    """Signs find the trace of a diagonal matrix without chance."""
    settings = settings_of(solver, probes=probes, max_probes=8, new_probes=new_probes)
    x = image().expand(3, *SHAPE)
    found = ocm.log_likelihood(LINEAR, x, settings)
    exact = ocm.log_likelihood(LINEAR, x, settings_of(solver, probes="exact", max_probes=32))
    torch.testing.assert_close(found.value, exact.value)
    torch.testing.assert_close(found.stderr, torch.zeros(3).double(), rtol=0, atol=1e-9)
    low, high = found.interval()
    torch.testing.assert_close(high - low, torch.zeros(3).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "new_probes"), [("heun", True), ("heun", False), ("bosh3", True)]
)
@pytest.mark.parametrize(("probes", "max_probes"), [("rademacher", 1), (hessdiag.Coloring(6), 11)])
def test_a_single_block_says_nothing(probes, max_probes, solver, new_probes):
    settings = settings_of(solver, probes=probes, max_probes=max_probes, new_probes=new_probes)
    found = ocm.log_likelihood(denoiser(), image().expand(3, *SHAPE), settings)
    assert found.stderr.tolist() == [torch.inf] * 3
    assert found.degrees.tolist() == [0.0] * 3
    low, high = found.interval()
    assert low.tolist() == [-torch.inf] * 3
    assert high.tolist() == [torch.inf] * 3


@pytest.mark.parametrize("solver", ["heun", "bosh3"])
def test_unit_vectors_have_no_error(solver):
    found = ocm.log_likelihood(
        denoiser(), image(), settings_of(solver, probes="exact", max_probes=32)
    )
    assert (found.stderr.item(), found.degrees.item()) == (0.0, torch.inf)
    assert found.interval() == (found.value, found.value)


def result(probe_stderr, draw_stderr, degrees, num_draws):
    one = torch.ones(1, dtype=torch.float64)
    return LogLikelihood(
        value=-3 * one,
        log_prior=one,
        probe_stderr=probe_stderr * one,
        draw_stderr=draw_stderr * one,
        degrees=degrees * one,
        num_features=2,
        num_evaluations=1,
        num_products=1,
        settings=LikelihoodSettings(num_draws=num_draws),
    )


@pytest.mark.parametrize(
    ("probe_stderr", "draw_stderr", "degrees", "num_draws", "quantile"),
    [
        # Quantiles of tables of Student's distribution, 0.975.
        (0.5, 0.0, 5.0, 1, 2.570582),
        (0.0, 0.5, torch.inf, 11, 2.228139),
        (0.3, 0.4, torch.inf, 2, None),
        (0.5, 0.0, torch.inf, 1, 1.959964),
    ],
)
def test_intervals_of_student(probe_stderr, draw_stderr, degrees, num_draws, quantile):
    found = result(probe_stderr, draw_stderr, degrees, num_draws)
    low, high = found.interval(0.95)
    assert found.stderr.item() == pytest.approx(0.5)
    if quantile is None:  # 0.5^4 / 0.4^4 degrees
        from scipy.stats import t

        quantile = t.ppf(0.975, 0.5**4 / 0.4**4)
    assert high.item() == pytest.approx(-3 + 0.5 * quantile)
    assert low.item() == pytest.approx(-3 - 0.5 * quantile)


def test_both_kinds_of_errors_count():
    found = result(0.3, 0.4, 10.0, 5)
    from scipy.stats import t

    degrees = 0.5**4 / (0.3**4 / 10 + 0.4**4 / 4)
    assert found.interval(0.8)[1].item() == pytest.approx(-3 + 0.5 * t.ppf(0.9, degrees))
    unknown = dataclasses.replace(found, draw_stderr=torch.full((1,), torch.inf).double())
    assert unknown.interval()[1].item() == torch.inf


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_levels_of_intervals(level):
    with pytest.raises(ValueError, match=f"level must lie between 0 and 1, got {level}"):
        result(0.3, 0.0, 5.0, 1).interval(level)
