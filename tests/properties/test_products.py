"""Products with a Jacobian are linear, agree in every way of taking them, and are transposes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BATCHES,
    FUNCTIONS,
    NUMBERS,
    SHAPES,
    TENSOR_SEEDS,
    block_jacobian,
    curved,
    network,
    tensor,
)

import hessdiag

MODES = ("vjp", "jvp")
close = torch.testing.assert_close


@pytest.mark.parametrize("mode", MODES)
@given(FUNCTIONS, SHAPES, BATCHES, TENSOR_SEEDS, NUMBERS, NUMBERS)
def test_products_are_linear_in_the_probes(mode, make, shape, batch, seed, a, b):
    x, u, v = (tensor((batch, *shape), seed + i) for i in range(3))
    J = hessdiag.Jacobian(make(shape, seed), x, mode=mode)
    one, other, both = (J.products(probe[None]) for probe in (u, v, a * u + b * v))
    close(both, a * one + b * other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@given(FUNCTIONS, FUNCTIONS, SHAPES, BATCHES, TENSOR_SEEDS, NUMBERS, NUMBERS)
def test_products_are_linear_in_the_function(mode, make_f, make_g, shape, batch, seed, a, b):
    x, v = tensor((batch, *shape), seed), tensor((2, batch, *shape), seed + 1)
    f, g = make_f(shape, seed), make_g(shape, seed + 7)
    of_f, of_g, of_both = (
        hessdiag.Jacobian(function, x, mode=mode).products(v)
        for function in (f, g, lambda x: a * f(x) + b * g(x))
    )
    close(of_both, a * of_f + b * of_g, rtol=1e-10, atol=1e-12)


@given(FUNCTIONS, SHAPES, BATCHES, TENSOR_SEEDS)
def test_the_two_modes_are_transposes(make, shape, batch, seed):
    x, u, v = (tensor((batch, *shape), seed + i) for i in range(3))
    f = make(shape, seed)
    forward, backward = (
        hessdiag.Jacobian(f, x, mode=mode).products(probe[None])[0]
        for mode, probe in (("jvp", v), ("vjp", u))
    )
    close((u * forward).flatten(1).sum(1), (backward * v).flatten(1).sum(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["perceptron", "normalised", "attention"])
@given(SHAPES, BATCHES, st.integers(1, 4), TENSOR_SEEDS, st.sampled_from(MODES))
def test_every_way_gives_the_products_of_the_matrix(kind, shape, batch, probes, seed, mode):
    x, v = tensor((batch, *shape), seed), tensor((probes, batch, *shape), seed + 1)
    f = network(shape, seed, kind)
    matrices = block_jacobian(f, x)
    matrices = matrices.mT if mode == "vjp" else matrices
    expected = torch.einsum("bij,mbj->mbi", matrices, v.flatten(2)).reshape(v.shape)
    for batching in ("loop", "vmap", "fold"):
        J = hessdiag.Jacobian(f, x, mode=mode, batching=batching)
        close(J.products(v), expected, rtol=1e-9, atol=1e-11)
        close(J.output, f(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["perceptron", "normalised", "attention"])
@given(SHAPES, BATCHES, st.integers(1, 5), TENSOR_SEEDS, st.sampled_from(MODES))
def test_the_exact_matrix_and_diagonal_are_those_of_pytorch(kind, shape, batch, chunk, seed, mode):
    x, f = tensor((batch, *shape), seed), network(shape, seed, kind)
    expected = block_jacobian(f, x)
    matrix = hessdiag.jacobian(f, x, mode=mode, chunk_size=chunk)
    close(matrix, expected, rtol=1e-9, atol=1e-11)
    diagonal = hessdiag.exact(f, x, mode=mode, chunk_size=chunk)
    close(diagonal.flatten(1), expected.diagonal(dim1=1, dim2=2), rtol=1e-9, atol=1e-11)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple), BATCHES, TENSOR_SEEDS)
def test_products_in_another_basis_are_those_of_the_rotated_matrix(shape, batch, seed):
    x, f = tensor((batch, *shape), seed), curved(shape, seed)
    basis, D = hessdiag.dct(), math.prod(shape)
    F = basis.analyse(torch.eye(D).double().reshape(D, *shape)).flatten(1).mT
    close(F @ F.mT, torch.eye(D).double())
    rotated = hessdiag.jacobian(hessdiag.Jacobian(f, x).in_basis(basis))
    close(rotated, F @ block_jacobian(f, x) @ F.mT, rtol=1e-9, atol=1e-11)


@given(st.integers(1, 6), BATCHES, TENSOR_SEEDS)
def test_the_hessian_diagonal_is_that_of_pytorch(D, batch, seed):
    x, A = tensor((batch, D), seed), tensor((D, D), seed + 1)

    def value(x):
        return torch.logsumexp(x @ A, dim=-1) + (x**4).sum(-1)

    expected = torch.stack([torch.func.hessian(value)(sample).diagonal() for sample in x])
    found = hessdiag.hessian_diagonal(value, x, probes=hessdiag.UnitVectors(), max_probes=D)
    close(found.diagonal, expected, rtol=1e-9, atol=1e-11)


@given(st.integers(1, 6), BATCHES, TENSOR_SEEDS)
def test_lanczos_is_exact_from_as_many_products_as_features(D, batch, seed):
    root, start = tensor((batch, D, D), seed), tensor((batch, D), seed + 1)
    A = root @ root.mT + torch.eye(D)
    V, T = hessdiag.lanczos(lambda v: (A @ v[..., None])[..., 0], start, D)
    values, vectors = torch.linalg.eigh(T)
    weights = (vectors @ (values.sqrt() * vectors[:, 0])[..., None])[..., 0]
    found = start.norm(dim=1)[:, None] * torch.einsum("kbd,bk->bd", V, weights)
    own, axes = torch.linalg.eigh(A)
    expected = (axes @ (own.sqrt()[..., None] * (axes.mT @ start[..., None])))[..., 0]
    close(found, expected, rtol=1e-6, atol=1e-8)
