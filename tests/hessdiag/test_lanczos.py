"""The Lanczos recurrence against matrices whose functions are known."""

import pytest
import torch

import hessdiag


def products_of(A):
    return lambda v: v @ A


def symmetric(eigenvalues):
    """A matrix of these eigenvalues, float64, and a vector that holds all eigenvectors."""
    g = torch.Generator().manual_seed(0)
    size = len(eigenvalues)
    U, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    start = torch.randn(2, size, generator=g, dtype=torch.float64)
    return (U * eigenvalues) @ U.T, start


def without_reorthogonalisation(A, start, k):
    """The recurrence of three terms alone."""
    v, before, beta, basis = start / start.norm(), torch.zeros_like(start), 0.0, []
    for _ in range(k):
        basis.append(v)
        w = A @ v - beta * before
        w = w - (v @ w) * v
        beta = w.norm()
        before, v = v, w / beta
    return torch.stack(basis)


def test_the_basis_stays_orthonormal_where_the_plain_recurrence_does_not():
    A, start = symmetric(torch.logspace(-6, 0, 60, dtype=torch.float64))
    plain = without_reorthogonalisation(A, start[0], 40)
    identity = torch.eye(40, dtype=torch.float64)
    assert (plain @ plain.T - identity).abs().max() > 0.1
    V, T = hessdiag.lanczos(products_of(A), start, 40)
    for sample in range(2):
        v = V[:, sample]
        torch.testing.assert_close(v @ v.T, identity, rtol=0, atol=1e-13)
        torch.testing.assert_close(v @ A @ v.T, T[sample], rtol=0, atol=1e-13)


def test_all_products_give_any_function():
    eigenvalues = torch.linspace(0.5, 3.0, 7, dtype=torch.float64)
    A, start = symmetric(eigenvalues)
    V, T = hessdiag.lanczos(products_of(A), start, 7)
    values, vectors = torch.linalg.eigh(T)
    torch.testing.assert_close(values, eigenvalues.expand(2, -1))
    weights = vectors @ (values.log() * vectors[:, 0])[..., None]  # log(T) e_1
    found = start.norm(dim=1, keepdim=True) * torch.einsum("kbd,bk->bd", V, weights[..., 0])
    own, axes = torch.linalg.eigh(A)
    torch.testing.assert_close(found, start @ (axes * own.log()) @ axes.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_space_is_exhausted_the_rest_is_cut_off(dtype):
    """Two eigenvectors, of eigenvalues 2 and 5, are all that the recurrence ever sees."""
    A, _ = symmetric(torch.tensor([2.0, 5.0, 7.0, 11.0, 13.0], dtype=torch.float64))
    _, axes = torch.linalg.eigh(A)
    start = (3.0 * axes[:, 0] + 4.0 * axes[:, 1])[None]
    V, T = hessdiag.lanczos(products_of(A.to(dtype)), start.to(dtype), 5)
    assert (V[2:] == 0).all()
    assert (T[:, 1, 2:] == 0).all()
    assert (T[:, 2:, :2] == 0).all()
    # The diagonal may be put into any function: that of the space stands there.
    torch.testing.assert_close(T[0, 2:, 2:], T[0, 0, 0] * torch.eye(3, dtype=dtype))
    seen = torch.linalg.eigvalsh(T[0, :2, :2].double())
    torch.testing.assert_close(seen, torch.tensor([2.0, 5.0]).double(), rtol=1e-5, atol=0)


def test_a_sample_that_is_exhausted_leaves_the_others_alone():
    A, start = symmetric(torch.linspace(1.0, 2.0, 6, dtype=torch.float64))
    alone = hessdiag.lanczos(products_of(A), start[:1], 4)
    start[1] = torch.linalg.eigh(A)[1][:, 2]
    V, T = hessdiag.lanczos(products_of(A), start, 4)
    torch.testing.assert_close(V[:, :1], alone[0])
    torch.testing.assert_close(T[:1], alone[1])
    assert (V[1:, 1] == 0).all()
