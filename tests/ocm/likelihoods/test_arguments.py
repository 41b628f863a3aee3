"""Wrong arguments: an error names the argument, what it was, and what would be right."""

import re

import pytest
import torch

import hessdiag
import ocm
from ocm.likelihoods.settings import LikelihoodSettings

X = torch.zeros(2, 2, 4, 4)
DENOISER = ocm.Denoiser(lambda x, time: 0.5 * x, ocm.flow(), "sample")
DISCRETE = ocm.Denoiser(lambda x, time: 0.5 * x, ocm.linear(), "sample")
NOISE = ocm.Denoiser(lambda x, time: 0.5 * x, ocm.vp(beta_max=60.0))
QUICK = LikelihoodSettings("euler", 1, probes="rademacher", max_probes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk5"}, "solver must be one of euler, heun, rk4, bosh3, .*, got 'rk5'"),
        ({"probes": "hadamard"}, "probes must be a design or one of auto, .*, got 'hadamard'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"max_probes": 0}, "max_probes must be at least 1, got 0"),
        ({"num_draws": -1}, "num_draws must be at least 1, got -1"),
        ({"tolerance": 0.0}, "tolerance must lie between 0 and 1, got 0.0"),
        ({"tolerance": 1.0}, "tolerance must lie between 0 and 1, got 1.0"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodSettings(**options)


@pytest.mark.parametrize("name", ["num_steps", "max_probes", "num_draws"])
def test_numbers_that_are_not_whole(name):
    with pytest.raises(TypeError, match=f"{name} must be"):
        LikelihoodSettings(**{name: 2.5})


def test_numbers_of_sets_of_probes():
    assert LikelihoodSettings("rk4", 3).num_sets_of_probes == 12
    assert LikelihoodSettings("rk4", 3, new_probes=False).num_sets_of_probes == 1
    assert LikelihoodSettings("dopri5").num_sets_of_probes == 1


@pytest.mark.parametrize(
    ("options", "shape", "design"),
    [
        ({"max_probes": 32}, (2, 4, 4), hessdiag.UnitVectors()),
        ({"max_probes": 31}, (2, 4, 4), hessdiag.Coloring(15)),
        ({"max_probes": 23}, (2, 4, 4), hessdiag.Rademacher()),
        ({"max_probes": 24}, (2, 4, 4), hessdiag.Coloring(12)),
        ({"max_probes": 24, "new_probes": False}, (2, 4, 4), hessdiag.Rademacher()),
        ({"max_probes": 24, "solver": "dopri5"}, (2, 4, 4), hessdiag.Rademacher()),
        ({"max_probes": 48, "new_probes": False}, (3, 16, 16), hessdiag.Coloring(12)),
        ({"max_probes": 30}, (50,), hessdiag.BalancedColoring(15)),
        ({"max_probes": 50}, (50,), hessdiag.UnitVectors()),
        ({"probes": "coloring", "max_probes": 9}, (2, 4, 4), hessdiag.Coloring(4)),
        ({"probes": "coloring", "max_probes": 1}, (2, 4, 4), hessdiag.Coloring(1)),
        ({"probes": "coloring", "max_probes": 99}, (1, 2, 2), hessdiag.Coloring(4)),
        ({"probes": "rademacher", "max_probes": 99}, (1, 2, 2), hessdiag.Rademacher()),
        ({"probes": "exact", "max_probes": 4}, (1, 2, 2), hessdiag.UnitVectors()),
        ({"probes": hessdiag.Normal()}, (2, 4, 4), hessdiag.Normal()),
    ],
)
def test_designs(options, shape, design):
    assert LikelihoodSettings(**options).design(shape) == design


@pytest.mark.parametrize(
    ("settings", "x", "message"),
    [
        (
            LikelihoodSettings(probes="exact", max_probes=31),
            X,
            "max_probes must be at least D = 32 for probes='exact', got 31",
        ),
        (
            LikelihoodSettings(probes="coloring", max_probes=4),
            torch.zeros(2, 32),
            r"probes='coloring' needs samples of shape \(channels, ...\) .*, got \(32,\)",
        ),
        (
            LikelihoodSettings(probes="coloring", max_probes=1),
            torch.zeros(2, 32),
            r"probes='coloring' needs samples of shape .*, got \(32,\)",
        ),
        (
            LikelihoodSettings(probes=hessdiag.Coloring(12), max_probes=11),
            X,
            r"max_probes must be at least 12, a block of Coloring\(.*\), got 11",
        ),
    ],
)
def test_probes_that_do_not_fit(settings, x, message):
    with pytest.raises(ValueError, match=message):
        ocm.log_likelihood(DENOISER, x, settings)


@pytest.mark.parametrize(
    ("denoiser", "first", "interval"),
    [
        (DENOISER, 0, "(0, 1000)"),
        (DENOISER, 1000.5, "(0, 1000)"),
        (DENOISER, 1000, "(0, 1000)"),
        (DENOISER, torch.nan, "(0, 1000)"),
        (NOISE, 999, "(0, 581.9"),
        (DISCRETE, 0.5, "[1, 1000)"),
        (DISCRETE, 1001, "[1, 1000)"),
        (DISCRETE, -3, "[1, 1000)"),
    ],
)
def test_first_timesteps(denoiser, first, interval):
    """With noise, and before the noise that the density of the data ends in."""
    message = f"first_timestep must lie in {re.escape(interval)}.*, got {first}"
    with pytest.raises(ValueError, match=message):
        ocm.log_likelihood(denoiser, X, QUICK, first_timestep=first)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("levels", "name"), [(None, "x"), (256, "x0")])
def test_data_that_are_not_finite(levels, name, bad):
    x = X.clone()
    x[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite of 64"):
        ocm.log_likelihood(DENOISER, x, QUICK, levels=levels)


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (X + 0.001, 256, "x0 must lie on the grid of levels = 256 grey levels"),
        (X + 3, 256, r"x0 must lie in \[-1, 1\], got values up to 3"),
        (X, 1, "levels must be at least 2, got 1"),
    ],
)
def test_images_that_leave_the_grid(x, levels, message):
    with pytest.raises(ValueError, match=message):
        ocm.log_likelihood(DENOISER, x, QUICK, levels=levels)


@pytest.mark.parametrize("options", [{"dequantisation": "uniform"}, {"covariance": "any"}])
def test_continuous_data_are_not_dequantised(options):
    with pytest.raises(ValueError, match="dequantisation and covariance must be left out for"):
        ocm.log_likelihood(DENOISER, X, QUICK, **options)


@pytest.mark.parametrize(
    ("dequantisation", "has_covariance"), [("decoder", False), ("uniform", True)]
)
def test_a_covariance_is_the_decoders(dequantisation, has_covariance):
    with pytest.raises(ValueError, match=f"covariance must be given with .*'{dequantisation}'"):
        ocm.log_likelihood(
            DENOISER,
            ocm.quantise(X),
            QUICK,
            levels=256,
            dequantisation=dequantisation,
            covariance=ocm.Exact(DENOISER) if has_covariance else None,
        )


def test_unknown_dequantisation():
    with pytest.raises(ValueError, match=r"dequantisation must be one of uniform, .*'gaussian'"):
        ocm.log_likelihood(DENOISER, ocm.quantise(X), QUICK, levels=256, dequantisation="gaussian")


def test_a_network_that_returns_nan():
    """In one sample of two, which is what the error counts."""

    def network(x, time):
        return torch.where(x.flatten(1).sum(1)[:, None, None, None] > 0, torch.nan, 0.5) * x

    broken = ocm.Denoiser(network, ocm.flow(), "sample")
    x = torch.stack([-X[0] - 1, X[0] + 1])
    with pytest.raises(FloatingPointError, match="of 1 of 2 samples is not finite"):
        ocm.log_likelihood(broken, x, LikelihoodSettings("euler", 1, probes="rademacher"))
