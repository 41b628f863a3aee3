"""Roots of the Hessian of a loss in the outputs: each block from its definition."""

import math

import pytest
import torch
from torch.nn import functional

from hessdiag import curvature
from hessdiag.curvature import LossCurvature, roots

N = 3


def hinge_cubed(o, y):
    """Curved both ways, and coupled."""
    return o.pow(3).sum() / 6 + (o[:, 0] * o[:, 1]).sum()


CLASSES = {
    "cross entropy": (functional.cross_entropy, 1),
    "sum": (lambda o, y: functional.cross_entropy(o, y, reduction="sum"), 1),
    "class weights": (
        lambda o, y: functional.cross_entropy(
            o, y, weight=torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=o.dtype), reduction="sum"
        ),
        1,
    ),
    "smoothing": (lambda o, y: functional.cross_entropy(o, y, label_smoothing=0.1), 1),
    "ignored": (lambda o, y: functional.cross_entropy(o, y, ignore_index=0, reduction="sum"), 1),
    "squares": (lambda o, y: o.square().sum(), 1),
    "binary": (lambda o, y: functional.binary_cross_entropy_with_logits(o, o.detach().abs()), 1),
    "both signs": (lambda o, y: o.pow(3).sum(), 2),
    "coupled": (hinge_cubed, 2),
    "norm": (lambda o, y: o.norm(dim=1).sum(), 1),
    "linear": (lambda o, y: o.sum(), 0),
}


def blocks(loss, outputs):
    """The Hessian of each sample, (N, C, C), and no coupling between samples."""
    size = outputs[0].numel()
    H = torch.func.jacrev(torch.func.jacrev(loss))(outputs).reshape(N, size, N, size)
    return torch.stack([H[n, :, n] for n in range(N)])


def rebuilt(found, outputs):
    """The blocks again, from the columns of the roots."""
    size = outputs[0].numel()
    total = torch.zeros(N, size, size, dtype=outputs.dtype)
    for root in found:
        units = torch.eye(root.size, dtype=outputs.dtype)[:, None].expand(-1, N, -1)
        S = root.times(units).reshape(root.size, N, size)
        total += root.sign * torch.einsum("rni,rnj->nij", S, S)
    return total


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_roots_rebuild_the_hessian(name, shape):
    loss, parts = CLASSES[name]
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, *shape, dtype=torch.float64, generator=generator)
    targets = torch.randint(4, (N, *shape[1:]), generator=generator)
    found = roots(LossCurvature(lambda o: loss(o, targets), outputs), outputs)
    assert len(found) == parts
    if parts:
        expected = blocks(lambda o: loss(o, targets), outputs)
        torch.testing.assert_close(rebuilt(found, outputs), expected)


def test_classes_along_the_last_axis():
    outputs = torch.randn(N, 2, 4, dtype=torch.float64)
    targets = torch.randint(4, (N, 2))

    def loss(o):
        return functional.cross_entropy(o.flatten(0, 1), targets.flatten())

    (root,) = roots(LossCurvature(loss, outputs), outputs)
    assert root.size == 2 * 3  # a column less than classes, for each of two positions
    torch.testing.assert_close(rebuilt([root], outputs), blocks(loss, outputs))


def test_a_root_of_a_dense_hessian_has_as_many_columns_as_its_rank():
    A = torch.randn(2, 5, dtype=torch.float64)
    outputs = torch.randn(N, 5, dtype=torch.float64)

    def loss(o):
        return (o @ A.T).pow(4).sum()

    (root,) = roots(LossCurvature(loss, outputs), outputs)
    assert root.size == 2
    torch.testing.assert_close(rebuilt([root], outputs), blocks(loss, outputs))


@pytest.mark.parametrize("margin", [1e-3, 10.0, 40.0, 800.0])
def test_a_sure_network(margin):
    """Probabilities of e^-800 are zero; what they would add is less than any other rounding."""
    outputs = torch.tensor([[0.0, margin, 0.5], [margin, 0.0, 0.0], [0.3, 0.1, margin]]).double()
    targets = torch.zeros(3, dtype=torch.int64)
    loss = lambda o: functional.cross_entropy(o, targets, reduction="sum")  # noqa: E731
    found = rebuilt(roots(LossCurvature(loss, outputs), outputs), outputs)
    p = outputs.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)


def test_one_coupled_sample_among_much_larger_ones_is_seen():
    outputs = torch.randn(N, 2, dtype=torch.float64)

    def loss(o):
        return 1e16 * o[:2].square().sum() + o[2, 0] * o[2, 1]

    torch.testing.assert_close(
        rebuilt(roots(LossCurvature(loss, outputs), outputs), outputs), blocks(loss, outputs)
    )


def test_errors(monkeypatch):
    outputs = torch.randn(N, 4)
    with pytest.raises(ValueError, match=r"loss must return a 0-dimensional tensor, got \(3, 4\)"):
        LossCurvature(torch.sin, outputs)
    with pytest.raises(ValueError, match="loss must have finite second derivatives"):
        roots(LossCurvature(lambda o: math.nan * o.square().sum(), outputs), outputs)
    monkeypatch.setattr(curvature, "_LARGEST", N * 4**2 - 1)
    with pytest.raises(ValueError, match="couples the 4 outputs of a sample, and its 3 blocks"):
        roots(LossCurvature(lambda o: o.prod(dim=1).sum(), outputs), outputs)
