"""Every family of covariances against the matrix that it stands for."""

import numpy as np
import pytest
import scipy.fft
import torch

import ocm
from ocm.covariances.lanczos import LanczosCovariance
from ocm.covariances.operators import channel_blocks, cosine_diagonal, diagonal, full

SHAPE = torch.Size([2, 2, 2, 3])
B, C, D = 2, 2, 12
X0_RANGE = (-0.5, 1.0)
BOUND = 0.75**2
EYE = torch.eye(D).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def positive(*shape):
    return 0.1 + randn(*shape).square()


def of_diagonal():
    values = positive(*SHAPE)
    return diagonal(values, SHAPE), torch.diag_embed(values.flatten(1))


def of_one_number():
    values = positive(B, 1, 1, 1)
    return diagonal(values, SHAPE), values.reshape(B, 1, 1) * EYE


def of_matrices():
    factor = randn(B, D, D)
    matrix = factor @ factor.mT / D + 0.1 * EYE
    return full(matrix, SHAPE), matrix


def of_channels():
    factor = randn(B, 6, C, C)
    blocks = factor @ factor.mT + 0.1 * torch.eye(C)
    matrix = torch.zeros(B, C, 6, C, 6).double()
    for place in range(6):
        matrix[:, :, place, :, place] = blocks[:, place]
    return channel_blocks(blocks, SHAPE), matrix.reshape(B, D, D)


def of_cosines():
    values = positive(*SHAPE)
    units = np.eye(D).reshape(D, *SHAPE[1:])
    F = torch.from_numpy(scipy.fft.dctn(units, axes=(2, 3), norm="ortho")).reshape(D, D).T
    return cosine_diagonal(values, SHAPE), (F.T * values.reshape(B, 1, D)) @ F


def lanczos(matrix):
    def products(v):
        return torch.einsum("bij,mbj->mbi", matrix, v.flatten(2)).reshape(v.shape)

    return LanczosCovariance(products, torch.zeros(SHAPE).double(), D)


def of_lanczos():
    _, matrix = of_matrices()
    return lanczos(matrix), matrix


FAMILIES = [of_diagonal, of_one_number, of_matrices, of_channels, of_cosines, of_lanczos]


def applied(operator):
    """The matrix of each sample by unit vectors, (B, D, D)."""
    units = torch.eye(D).double().reshape(D, 1, *SHAPE[1:]).expand(D, *SHAPE)
    return torch.stack([operator(unit).flatten(1) for unit in units], dim=2)


def check(covariance, matrix):
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    variances = covariance.diagonal().expand(SHAPE).flatten(1)
    torch.testing.assert_close(variances, matrix.diagonal(dim1=1, dim2=2), **tolerance)
    torch.testing.assert_close(applied(covariance.multiply), matrix, **tolerance)
    torch.testing.assert_close(applied(covariance.solve), torch.linalg.inv(matrix), **tolerance)
    root = applied(covariance.noise)
    torch.testing.assert_close(root @ root.mT, matrix, **tolerance)
    torch.testing.assert_close(covariance.log_determinant(), torch.logdet(matrix), **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_it_can_do_is_that_of_its_matrix(family):
    covariance, matrix = family()
    check(covariance, matrix)
    check(covariance.affine(2.0, 0.3), 2.0 * matrix + 0.3 * EYE)
    values, vectors = torch.linalg.eigh(matrix)
    clamped = (vectors * values.clamp(0.2, 0.9)[:, None]) @ vectors.mT
    check(covariance.clamped(0.2, 0.9), clamped)


@pytest.mark.parametrize("family", [of_matrices, of_channels])
def test_a_bound_keeps_correlations(family):
    covariance, matrix = family()
    s = (BOUND / matrix.diagonal(dim1=1, dim2=2)).clamp(max=1.0).sqrt()
    assert (s < 1).any(dim=1).all()
    assert (s == 1).any()
    check(covariance.bounded(X0_RANGE), s[:, :, None] * matrix * s[:, None, :])


def test_a_bound_of_a_diagonal_is_that_of_each_dimension():
    covariance, matrix = of_diagonal()
    check(covariance.bounded(X0_RANGE), matrix.clamp(max=BOUND))


def test_a_bound_of_cosines_is_that_of_each_sample():
    """The first is scaled down as a whole, the second, which is small enough, is left alone."""
    covariance, matrix = of_cosines()
    small = torch.tensor([1.0, 0.05]).double()
    covariance = cosine_diagonal(covariance.eigenvalues * small.reshape(B, 1, 1, 1), SHAPE).bounded(
        X0_RANGE
    )
    matrix = matrix * small.reshape(B, 1, 1)
    largest = matrix.diagonal(dim1=1, dim2=2).amax(dim=1)
    assert largest[0] > BOUND > largest[1]
    check(covariance, matrix * torch.tensor([BOUND / largest[0], 1.0]).reshape(B, 1, 1))


def test_a_bound_of_lanczos_is_that_of_the_vector():
    """The mean variance in the direction of v, at most that of data."""
    matrix = of_matrices()[1] * torch.tensor([1.0, 0.1]).reshape(B, 1, 1)
    covariance = lanczos(matrix).bounded(X0_RANGE)
    v = randn(*SHAPE, seed=3)
    product = torch.einsum("bij,bj->bi", matrix, v.flatten(1))
    mean = (v.flatten(1) * product).sum(1) / v.flatten(1).square().sum(1)
    assert mean[0] > BOUND > mean[1]
    factor = torch.tensor([BOUND / mean[0], 1.0])[:, None]
    torch.testing.assert_close(covariance.multiply(v).flatten(1), factor * product)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("x0_range", [None, (-torch.inf, torch.inf), (0.0, torch.inf)])
def test_a_range_without_an_end_bounds_nothing(family, x0_range):
    covariance, matrix = family()
    check(covariance.bounded(x0_range), matrix)


@pytest.mark.parametrize("family", [of_diagonal, of_matrices, of_channels, of_cosines, of_lanczos])
def test_nothing_negative_is_left(family):
    covariance, _ = family()
    shifted = covariance.affine(1.0, -0.5).bounded(None)
    values = torch.linalg.eigvalsh(applied(shifted.multiply))
    assert values.min() == pytest.approx(0.0, abs=1e-9)
    assert torch.isfinite(shifted.noise(randn(*SHAPE))).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_lanczos_takes_the_mean_of_both_products_where_it_is_asked_to(symmetric):
    A, schedule = randn(D, D), ocm.linear()
    denoiser = ocm.Denoiser(lambda x, _: (x.flatten(1) @ A.T).reshape(x.shape), schedule, "sample")
    v, prediction = randn(*SHAPE), denoiser.predict(torch.zeros(SHAPE).double(), 400)
    stated = ocm.Lanczos(denoiser, D, symmetric=symmetric).at(prediction)
    factor = schedule.sigma(400) ** 2 / schedule.alpha(400)
    matrix = (A + A.T) / 2 if symmetric else A.T
    expected = factor * (v.flatten(1) @ matrix.T).reshape(SHAPE)
    torch.testing.assert_close(stated.multiply(v), expected, rtol=1e-6, atol=1e-6)
