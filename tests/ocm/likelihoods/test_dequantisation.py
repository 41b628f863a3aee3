"""Continuous data from grey levels: their law by SciPy, and that their weights make one of P."""

import math

import pytest
import torch
from known_likelihoods import Data, denoiser_of, noise_variance
from scipy import stats

import ocm
from ocm.likelihoods.dequantisation import DEQUANTISATIONS, dequantise

LEVELS, HALF_BIN = 5, 0.25
GRID = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
# Midpoints of equal shares of the normal distribution: means over them are integrals.
SHARES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
NOISE = torch.special.ndtri(SHARES)
STDS = [0.02, 0.08, 1.0]


def drawn(name, x0, std, noise=NOISE[:, None]):
    return dequantise(torch.full_like(noise, x0), noise, name, levels=LEVELS, std=std)


def law_of(name, x0, std):
    if name == "uniform":
        return stats.uniform(x0 - HALF_BIN, 2 * HALF_BIN)
    if name == "truncated_normal":
        return stats.truncnorm(-HALF_BIN / std, HALF_BIN / std, loc=x0, scale=std)
    return stats.norm(x0, std)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("name", DEQUANTISATIONS)
def test_y_is_drawn_from_q_and_weighed_by_it(name, std):
    """y is the quantile of its noise, and the weight is -log q(y)."""
    y, log_weight = drawn(name, 0.5, std)
    law = law_of(name, 0.5, std)
    expected = torch.from_numpy(law.ppf(SHARES.numpy()))
    torch.testing.assert_close(y[:, 0], expected, rtol=1e-9, atol=1e-9)
    inside = slice(1, -1)
    density = torch.from_numpy(law.logpdf(y[inside, 0].numpy()))
    torch.testing.assert_close(log_weight[inside], -density, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("std", STDS[1:])
@pytest.mark.parametrize("name", ["uniform", "truncated_normal"])
def test_the_mean_weight_of_a_density_is_the_mass_of_the_bin(name, std):
    p = stats.norm(0.1, 0.4)
    for x0 in GRID.tolist():
        y, log_weight = drawn(name, x0, std)
        weights = log_weight.exp() * torch.from_numpy(p.pdf(y[:, 0].numpy()))
        mass = p.cdf(x0 + HALF_BIN) - p.cdf(x0 - HALF_BIN)
        assert weights.mean().item() == pytest.approx(mass, rel=1e-3)


def test_weights_of_several_features_multiply():
    noise = torch.special.ndtri(torch.tensor([[[0.2, 0.7]], [[0.9, 0.4]]], dtype=torch.float64))
    for name in DEQUANTISATIONS:
        y, log_weight = drawn(name, 0.5, 0.1, noise)
        each = [drawn(name, 0.5, 0.1, noise[..., k]) for k in (0, 1)]
        torch.testing.assert_close(y, torch.stack([one.y for one in each], dim=2))
        torch.testing.assert_close(log_weight, sum(one.log_weight for one in each))


@pytest.mark.parametrize("name", ["uniform", "truncated_normal"])
def test_y_stays_within_its_bin(name):
    """For the noise of any tail, in float32 too."""
    noise = torch.tensor([[-40.0], [-8.0], [0.0], [8.0], [40.0]])
    for std in (1e-4, 0.05, 3.0):
        for x0 in (-1.0, 0.5):
            y, log_weight = drawn(name, x0, std, noise)
            assert torch.isfinite(y).all()
            assert torch.isfinite(log_weight).all()
            assert ((y - x0).abs() <= HALF_BIN).all()
            assert y.dtype == log_weight.dtype == torch.float64


def test_unknown_names():
    with pytest.raises(ValueError, match=r"dequantisation must be one of uniform, .*'gaussian'"):
        drawn("gaussian", 0.5, 0.1)


# One feature, a normal density, on the straight path at s = 1/4.
DATA = Data([1.0], [[0.1]], [[[0.09]]])
SETTINGS = ocm.LikelihoodSettings(num_steps=12, max_probes=1)
FIRST = 200


def likelihoods(dequantisation, copies=400):
    """Those of every level, (levels, copies): each copy has noise of its own."""
    denoiser = denoiser_of(DATA, ocm.flow(), "flow_prediction")
    covariance = ocm.Exact(denoiser) if dequantisation == "decoder" else None
    x = GRID.repeat_interleave(copies).reshape(-1, 1, 1, 1)
    found = ocm.log_likelihood(
        denoiser,
        x,
        SETTINGS,
        levels=LEVELS,
        dequantisation=dequantisation,
        covariance=covariance,
        first_timestep=FIRST,
    )
    assert found.draw_stderr.isinf().all()
    return found.value.reshape(LEVELS, copies)


@pytest.mark.parametrize("dequantisation", ["uniform", "truncated_normal"])
def test_the_mean_likelihood_is_the_mass_of_the_model(dequantisation):
    found = likelihoods(dequantisation).exp()
    y = stats.norm(0.1, math.sqrt(0.09 + noise_variance(ocm.flow(), FIRST)))
    grid = GRID.numpy()
    mass = torch.from_numpy(y.cdf(grid + HALF_BIN) - y.cdf(grid - HALF_BIN))
    error = found.mean(1) - mass
    assert (error.abs() < 4 * found.std(1) / found.shape[1] ** 0.5 + 1e-3 * mass).all()
    # The mean of their logarithms is a bound, E_q [log p(y) - log q(y)].
    bounds = []
    for x0 in grid:
        q = law_of(dequantisation, x0, noise_variance(ocm.flow(), FIRST) ** 0.5)
        bounds.append(q.expect(lambda at, q=q: y.logpdf(at) - q.logpdf(at)))
    logs = found.log()
    error = logs.mean(1) - torch.tensor(bounds)
    assert (error.abs() < 4 * logs.std(1) / found.shape[1] ** 0.5 + 1e-3).all()
    assert (logs.mean(1) < mass.log()).all()


def test_likelihoods_by_the_decoder_sum_to_one():
    found = likelihoods("decoder").exp()
    error = found.var(1).sum().sqrt() / found.shape[1] ** 0.5
    assert (found.mean(1).sum() - 1).abs() < 4 * error + 1e-3
    assert error < 0.02


def test_a_covariance_stands_for_the_decoder():
    denoiser = denoiser_of(DATA, ocm.flow(), "flow_prediction")
    x = GRID.reshape(-1, 1, 1, 1)

    def value(**options):
        return ocm.log_likelihood(
            denoiser, x, SETTINGS, levels=LEVELS, first_timestep=FIRST, **options
        ).value

    exact = ocm.Exact(denoiser)
    decoder = value(covariance=exact, dequantisation="decoder")
    assert torch.equal(value(covariance=exact), decoder)
    assert torch.equal(value(), value(dequantisation="uniform"))
    assert ((decoder - value()).abs() > 1e-3).any()


def test_the_decoder_counts_every_dimension():
    """Three that are independent and alike have three times the log-likelihood of one."""
    values = []
    for D in (1, 3):
        data = Data([1.0], [[0.1] * D], [(0.09 * torch.eye(D)).tolist()])
        denoiser = denoiser_of(data, ocm.flow(), "flow_prediction")
        x = ocm.quantise(torch.zeros(400, D, 1, 1).double(), LEVELS)
        found = ocm.log_likelihood(
            denoiser, x, SETTINGS, levels=LEVELS, first_timestep=FIRST,
            covariance=ocm.Exact(denoiser),
        )  # fmt: skip
        values.append(found.value)
    error = (values[1].var() / 400 + 9 * values[0].var() / 400).sqrt()
    assert (values[1].mean() - 3 * values[0].mean()).abs() < 5 * error
    assert error < 0.1
