"""Trees in and out of products, further outputs, and keyword arguments."""

from functools import partial

import pytest
import torch

import hessdiag
from hessdiag import Jacobian
from hessdiag.trees import ravel


def point(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def positions_and_velocities(state):
    q, v = state["q"], state["v"]
    return {"q": v.flatten(1).cumsum(1).reshape(q.shape) * q, "v": -q.sin().flatten(1)}


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_a_diagonal_of_a_tree(mode):
    state = {"q": point(3, 2, 2), "v": point(3, 4, seed=1)}
    x, restore = ravel(state)
    J = Jacobian(lambda z: ravel(positions_and_velocities(restore(z)))[0], x, mode=mode)
    diagonal = restore(hessdiag.exact(J))
    expected = state["v"].cumsum(1).reshape(3, 2, 2)
    torch.testing.assert_close(diagonal, {"q": expected, "v": torch.zeros(3, 4).double()})


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_products_from_one_tree_to_another(mode, batching):
    def score_fn(pair):
        a, b = pair
        return [a.sum(1), (a[:, :2] * b).unsqueeze(1)]

    pair = (point(3, 4), point(3, 2, seed=1))
    x, restore_in = ravel(pair)
    y, restore_out = ravel(score_fn(pair))
    J = Jacobian(
        lambda z: ravel(score_fn(restore_in(z)))[0],
        x,
        mode=mode,
        batching=batching,
        rectangular=True,
    )
    if mode == "vjp":
        probes = point(5, *y.shape, seed=2)
        first, second = restore_out(probes)
        through = torch.zeros(5, 3, 4).double()
        through[..., :2] = second[:, :, 0] * pair[1]
        expected = (first[..., None] + through, second[:, :, 0] * pair[0][:, :2])
        torch.testing.assert_close(restore_in(J.products(probes)), expected)
    else:
        probes = point(5, *x.shape, seed=2)
        a, b = restore_in(probes)
        expected = [a.sum(-1), (a[..., :2] * pair[1] + pair[0][:, :2] * b).unsqueeze(2)]
        torch.testing.assert_close(restore_out(J.products(probes)), expected)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_further_outputs_and_keyword_arguments(mode):
    def network(x, *, scale):
        return scale * x.sin(), {"features": x.cos()}

    J = Jacobian(partial(network, scale=3.0), point(2, 3), mode=mode, has_aux=True)
    torch.testing.assert_close(hessdiag.hutchinson(J, M=2), 3 * point(2, 3).cos())
    torch.testing.assert_close(J.aux["features"], point(2, 3).cos())


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ([], ValueError, "at least one tensor"),
        ([torch.ones(2), 3.0], TypeError, "tensors only, got float"),
        ([torch.ones(2), torch.ones(2).double()], TypeError, "one type on one device"),
        ([torch.ones(2), torch.ones(3)], ValueError, r"of one B, got \(2,\), \(3,\)"),
        ([torch.tensor(1.0)], ValueError, r"shapes \(B, \.\.\.\)"),
    ],
)
def test_errors(tree, error, message):
    with pytest.raises(error, match=message):
        ravel(tree)
