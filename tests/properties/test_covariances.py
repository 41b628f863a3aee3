"""Covariances as operators are consistent with their matrix, positive, and come back from JSON."""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import BATCHES, IMAGES, TENSOR_SEEDS, schedules, tables, tensor, trajectories
from told import told_denoiser
from torch import nn

import ocm
from ocm.covariances import operators
from ocm.covariances.calibrated import fit_variance_components
from ocm.covariances.hutchinson import floored
from ocm.covariances.lanczos import LanczosCovariance
from ocm.covariances.learned.frequencies import _basis
from ocm.diffusion.tables import Table

close = torch.testing.assert_close
RANGES = st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-3.0, 0.5)])


def positive(shape, seed):
    """Variances over several orders of magnitude."""
    return (1.5 * tensor(shape, seed)).exp()


def of_frequencies(shape, seed):
    colours = torch.linalg.qr(tensor((shape[1], shape[1]), seed))[0]
    return operators.SpectralCovariance(
        positive(shape, seed), torch.Size(shape), _basis(colours, 1)
    )


def of_roots(roots):
    return roots @ roots.mT + 0.1 * torch.eye(roots.shape[-1], dtype=roots.dtype)


def full(shape, seed):
    B, D = shape[0], math.prod(shape[1:])
    return operators.full(of_roots(tensor((B, D, D), seed) / math.sqrt(D)), torch.Size(shape))


def channel_blocks(shape, seed):
    B, C, positions = shape[0], shape[1], math.prod(shape[2:])
    return operators.channel_blocks(of_roots(tensor((B, positions, C, C), seed)), torch.Size(shape))


FAMILIES = {
    "diagonal": lambda shape, seed: operators.diagonal(positive(shape, seed), torch.Size(shape)),
    "one variance": lambda shape, seed: operators.diagonal(
        positive((shape[0], *[1] * (len(shape) - 1)), seed), torch.Size(shape)
    ),
    "full": full,
    "channel blocks": channel_blocks,
    "cosines": lambda shape, seed: operators.cosine_diagonal(
        positive(shape, seed), torch.Size(shape)
    ),
    "frequencies": of_frequencies,
}


def matrix_of(covariance, shape):
    """The matrices (B, D, D), column by column."""
    D = math.prod(shape[1:])
    columns = [
        covariance.multiply(e.expand(shape))
        for e in torch.eye(D).double().reshape(-1, 1, *shape[1:])
    ]
    return torch.stack([column.flatten(1) for column in columns], dim=2)


@pytest.mark.parametrize("family", FAMILIES)
@given(IMAGES, BATCHES, TENSOR_SEEDS, st.floats(0.0, 3.0), st.floats(1e-3, 2.0))
def test_an_operator_is_its_matrix(family, image, batch, seed, scale, shift):
    shape = (batch, *image)
    C, v = FAMILIES[family](shape, seed), tensor(shape, seed + 1)
    dense = matrix_of(C, shape)
    close(dense, dense.mT, rtol=1e-9, atol=1e-10)
    ones = torch.ones(shape, dtype=torch.float64)
    close((C.diagonal() * ones).flatten(1), dense.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-10)
    close(C.solve(C.multiply(v)), v, rtol=1e-6, atol=1e-8)
    close(C.noise(C.noise(v)), C.multiply(v), rtol=1e-8, atol=1e-9)
    close(C.log_determinant(), torch.linalg.slogdet(dense).logabsdet, rtol=1e-7, atol=1e-8)
    affine = C.affine(scale, shift)
    close(affine.multiply(v), scale * C.multiply(v) + shift * v, rtol=1e-8, atol=1e-9)
    close(affine.diagonal(), scale * C.diagonal() + shift, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@given(IMAGES, BATCHES, TENSOR_SEEDS, RANGES, st.floats(-3.0, 3.0), st.floats(1e-2, 1e6))
def test_what_is_bounded_is_a_covariance_of_data_in_their_range(
    family, image, batch, seed, x0_range, shift, scale
):
    C = FAMILIES[family]((batch, *image), seed).affine(scale, shift).affine(1.0, -scale)
    bounded = C.bounded(x0_range)
    most = operators.variance_bound(x0_range)
    for variances in (bounded.diagonal(), bounded.eigenvalues):
        assert bool((variances >= 0).all())
        assert bool(torch.isfinite(variances).all())
    assert bool((bounded.diagonal() <= most * (1 + 1e-9)).all())
    again = bounded.bounded(x0_range).diagonal()
    close(again, bounded.diagonal(), rtol=1e-6, atol=1e-9)
    kept = C.bounded(None)
    if bool((kept.diagonal() <= most).all()):
        close(bounded.diagonal(), kept.diagonal(), rtol=1e-9, atol=1e-12)


@given(st.integers(1, 5), BATCHES, TENSOR_SEEDS, st.floats(0.1, 2.0), st.floats(0.0, 1.0))
def test_the_full_covariance_by_products_is_the_one_by_eigenvectors(D, batch, seed, scale, shift):
    shape, v = torch.Size((batch, D)), tensor((batch, D), seed + 1)
    matrices = of_roots(tensor((batch, D, D), seed))
    by_products = LanczosCovariance(lambda v: (matrices @ v[..., None])[..., 0], v, D)
    pairs = [(C, C.affine(scale, shift)) for C in (by_products, operators.full(matrices, shape))]
    for one, other in zip(*pairs, strict=True):
        close(one.multiply(v), other.multiply(v), rtol=1e-6, atol=1e-7)
        close(one.noise(v), other.noise(v), rtol=1e-6, atol=1e-7)
        close(one.solve(v), other.solve(v), rtol=1e-5, atol=1e-6)
        close(one.diagonal(), other.diagonal(), rtol=1e-6, atol=1e-7)
        close(one.log_determinant(), other.log_determinant(), rtol=1e-6, atol=1e-7)


KINDS = {
    "npr": ocm.NPR,
    "ocm": ocm.OptimalCovarianceMatching,
    "ml": partial(ocm.MaximumLikelihood, step_counts=(1,)),
}


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.data(), schedules(), TENSOR_SEEDS, st.floats(0.05, 5.0), st.sampled_from([1.0, 30.0, 1e4])
)
def test_positive_units_state_positive_variances_whatever_the_head_says(
    kind, data, schedule, seed, std, size
):
    t = data.draw(trajectories(schedule, count=1))[0]
    x, output = tensor((2, 1, 2, 2), seed, torch.float32), size * tensor((2, 1, 2, 2), seed + 1)
    denoiser = told_denoiser(x, output.float(), schedule)
    units = ocm.Parameterisation(std, positive=True)
    stated = KINDS[kind](denoiser, nn.Identity(), units).at(denoiser.predict(x, t))
    variances = stated.bounded(None).eigenvalues
    assert bool((variances >= 0).all())
    assert bool(torch.isfinite(variances).all())
    # softplus of numbers above -80 is a positive float32, and so is its product with c_t.
    level = schedule.level(t)
    c = level.sigma**2 / (level.alpha**2 + (level.sigma / std) ** 2)
    assert bool((variances > 0)[(output > -80 + max(0.0, -math.log(c)))].all())
    close(units.scale(schedule, t).item(), c, rtol=1e-12, atol=0)


@given(tables())
def test_a_table_comes_back_from_its_json(table):
    again = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert dict(again.rows) == dict(table.rows)
    assert torch.equal(again.values, table.values)


@given(st.data(), tables(by_step=False))
def test_a_table_lies_between_its_neighbours(data, table):
    places = sorted(table.rows)
    for t, row in table.rows.items():
        assert table.numbers(None, t) == list(row)
    t = data.draw(st.floats(places[0], places[-1]))
    last = next(i for i, place in enumerate(places) if place >= t)
    near = table.rows[places[max(last - 1, 0)]], table.rows[places[last]]
    for value, *ends in zip(table.numbers(None, t), *near, strict=True):
        slack = 1e-12 * max(map(abs, ends))
        assert min(ends) - slack <= value <= max(ends) + slack


@given(st.none() | st.floats(1e-6, 1e6), st.booleans())
def test_a_parameterisation_comes_back_from_its_json(std, is_positive):
    units = ocm.Parameterisation(math.inf if std is None else std, is_positive)
    assert ocm.Parameterisation.from_json(json.loads(json.dumps(units.to_json()))) == units


@given(st.integers(1, 2), st.integers(4, 40), TENSOR_SEEDS, st.floats(1e-3, 1e3))
def test_a_calibration_goes_with_the_unit_of_the_data(count, errors, seed, unit):
    variances = positive((count, errors), seed)
    squared = positive((errors,), seed + 1)
    weights = fit_variance_components(variances, squared)
    assert bool((weights >= 0).all())
    scaled = fit_variance_components(variances, unit * squared)
    # In that of the mean error: a share next to 0 is still on its way there.
    size = squared.mean()
    close(scaled / unit / size, weights / size, rtol=1e-3, atol=1e-3)

    def loss(weights):
        v = weights[:-1] @ variances + weights[-1]
        return (v.log() + squared / v).mean()

    for shares in torch.eye(count + 1, dtype=torch.float64):
        terms = torch.cat([variances, torch.ones_like(squared)[None]])
        alone = shares * (squared / (shares @ terms)).mean()
        assert loss(weights) <= loss(alone) + 1e-6


@given(BATCHES, st.integers(1, 9), TENSOR_SEEDS)
def test_the_floor_is_never_negative_and_changes_no_certain_estimate(batch, features, seed):
    variances = tensor((batch, features), seed)
    raised = floored(variances)
    assert bool((raised >= variances.clamp(min=0)).all())
    close(floored(raised), raised)
    of_positive = floored(variances.abs())
    assert torch.equal(of_positive, variances.abs())


@given(st.data(), schedules(), TENSOR_SEEDS)
def test_both_fixed_variances_are_those_of_their_steps(data, schedule, seed):
    """Var = 0 and beta_bar are beta_tilde and beta of q(x_t | x_s), on a path of one total."""
    assume(schedule.name not in ("flow", "edm", "trigflow"))
    places = data.draw(trajectories(schedule, count=2, least=1e-2))
    assume(len(places) == 2)
    s, t = places
    denoiser = ocm.Denoiser(lambda x, time: x, schedule, "sample")
    prediction = denoiser.predict(tensor((1, 2), seed), t)
    _, b, noise_variance = ocm.ddpm(schedule, s, t)
    for kind, expected in (
        (ocm.BetaTilde, schedule.beta_tilde(s, t)),
        (ocm.Beta, schedule.beta(s, t)),
    ):
        stated = kind(denoiser).at(prediction).diagonal().item()
        close(noise_variance + b**2 * stated, expected, rtol=1e-7, atol=1e-300)
