"""Products at the edges: shapes, constants, rectangular Jacobians, and few words."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from wrong_under_vmap import WrongUnderVmap
from zero_by_loop import ZeroByLoop

import hessdiag
from hessdiag import Jacobian
from hessdiag.checks import as_int, check_positive_int

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]
AUTO = [*WAYS, ("auto", "auto")]


def point(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(("mode", "batching"), AUTO)
def test_products_own_their_elements(mode, batching, number):
    """Sums are taken back by expanding, which lays all elements in one place."""
    x, probes = point(2, 6), point(number, 2, 6, seed=1)
    J = Jacobian(
        lambda t: t.sum(1, keepdim=True).expand(len(t), 6) * 1, x, mode=mode, batching=batching
    )
    products = J.products(probes)
    torch.testing.assert_close(products, probes.sum(-1, keepdim=True).expand(number, 2, 6))
    products += 1  # raises where elements overlap
    H = hessdiag.hessian_diagonal(
        lambda t: t.sum(1) ** 2, x, max_probes=6, probes="auto", mode=mode, batching=batching
    )
    torch.testing.assert_close(H.diagonal, torch.full_like(x, 2.0))
    ones = hessdiag.hutchinson(
        lambda t: t.sum(1, keepdim=True) * torch.ones(6).double(),
        x,
        number,
        mode=mode,
        batching=batching,
    )
    assert ones.shape == x.shape


@pytest.mark.parametrize(("mode", "batching"), AUTO)
class TestShapes:
    def test_one_feature_without_an_axis(self, mode, batching):
        x, ways = point(3), {"mode": mode, "batching": batching}
        torch.testing.assert_close(hessdiag.hutchinson(torch.sin, x, 2, **ways), x.cos())
        torch.testing.assert_close(hessdiag.exact(torch.sin, x, **ways), x.cos())
        torch.testing.assert_close(hessdiag.jacobian(torch.sin, x, **ways)[:, 0, 0], x.cos())

    @pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0,), (0, 2, 4, 4)])
    def test_no_elements(self, shape, mode, batching):
        x, ways = torch.zeros(shape), {"mode": mode, "batching": batching}
        assert hessdiag.hutchinson(torch.sin, x, 3, **ways).shape == shape
        assert hessdiag.exact(torch.sin, x, **ways).shape == shape
        assert hessdiag.jacobian(torch.sin, x, **ways).shape[0] == len(x)
        assert Jacobian(torch.sin, x, **ways).products(torch.zeros(2, *shape)).shape == (2, *shape)

    def test_a_linear_function_has_the_hessian_zero(self, mode, batching):
        x, ways = point(2, 3), {"mode": mode, "batching": batching}
        for f in (lambda t: t.sum(1), lambda t: (t @ torch.ones(3).double()).sum()):
            result = hessdiag.hessian_diagonal(f, x, max_probes=2, **ways)
            assert torch.equal(result.diagonal, torch.zeros_like(x))

    @pytest.mark.parametrize(
        "f",
        [
            lambda t: (t.detach() ** 2).sum(1),
            torch.no_grad()(lambda t: (t**2).sum(1)),
            lambda t: torch.zeros(len(t)).double(),
        ],
    )
    def test_a_detached_function_has_none(self, f, mode, batching):
        with pytest.raises(ValueError, match="the value of f does not depend on x"):
            hessdiag.hessian_diagonal(f, point(2, 3), max_probes=2, mode=mode, batching=batching)


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize(("mode", "batching"), WAYS)
def test_a_rectangular_jacobian_has_products(mode, batching, number):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 10)).double()
    x = point(3, 2, 2)

    def score_fn(z):
        return net(z.flatten(1)).reshape(len(z), 5, 2)

    J = Jacobian(score_fn, x, mode=mode, batching=batching, rectangular=True)
    assert J.output.shape == (3, 5, 2)
    rows = torch.autograd.functional.jacobian(score_fn, x).reshape(3, 10, 3, 4)
    own = torch.einsum("bibj->bij", rows)
    if mode == "vjp":
        probes = point(number, 3, 5, 2, seed=1)
        expected = torch.einsum("mbi,bij->mbj", probes.flatten(2), own).reshape(number, 3, 2, 2)
    else:
        probes = point(number, 3, 2, 2, seed=1)
        expected = torch.einsum("mbj,bij->mbi", probes.flatten(2), own).reshape(number, 3, 5, 2)
    torch.testing.assert_close(J.products(probes), expected)


class TestRectangularErrors:
    @pytest.mark.parametrize(
        "take",
        [
            hessdiag.exact,
            hessdiag.jacobian,
            lambda J: hessdiag.hutchinson(J, M=2),
            lambda J: hessdiag.trace(J, max_probes=2),
            lambda J: hessdiag.estimate(J, max_probes=2),
        ],
    )
    def test_no_diagonal(self, take):
        J = Jacobian(lambda z: z[:, :2], point(3, 4), rectangular=True)
        with pytest.raises(ValueError, match="the Jacobian must be square"):
            take(J)

    def test_probes_of_the_other_side(self):
        J = Jacobian(lambda z: z[:, :2], point(3, 4), rectangular=True, mode="vjp")
        with pytest.raises(
            ValueError, match=r"probes must have shape \(m, 3, 2\).*got \(1, 3, 4\)"
        ):
            J.products(point(1, 3, 4))
        J = Jacobian(lambda z: z[:, :2], point(3, 4), rectangular=True, mode="jvp")
        with pytest.raises(
            ValueError, match=r"probes must have shape \(m, 3, 4\).*got \(1, 3, 2\)"
        ):
            J.products(point(1, 3, 2))

    def test_the_batch_is_shared(self):
        with pytest.raises(ValueError, match=r"must return shape \(3, \.\.\.\)"):
            Jacobian(lambda z: z.sum(0), point(3, 4), rectangular=True).output  # noqa: B018


class TestRemembered:
    """A network that vmap cannot batch is tried once, however its function is made."""

    def made(self):
        class NoVmap(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.evaluations = nn.Linear(5, 5).double(), 0

            def forward(self, x, t=0):
                self.evaluations += 1
                return self.layer(x) + ZeroByLoop.apply(x) + t

        return NoVmap()

    @pytest.mark.parametrize("kind", ["lambda", "nested", "partial", "method", "default"])
    def test_functions_made_anew(self, kind):
        from functools import partial

        def other(function):
            return lambda z: function(z) * 2

        x, net = point(3, 5), self.made()
        for k in range(3):
            function = {
                "lambda": lambda z, k=k: net(z, k),
                "nested": other(lambda z: net(z)),
                "partial": partial(net, t=k),
                "method": net.forward,
                "default": lambda z, net=net: net(z),
            }[kind]
            hessdiag.hutchinson(function, x, 4)
            assert net.evaluations == 2 + k

    def test_another_network_in_the_same_code_is_another_function(self):
        first, second, x = self.made(), nn.Linear(5, 5).double(), point(3, 5)
        results = [
            hessdiag.estimate(lambda z, net=net: net(z), x, max_probes=4) for net in (first, second)
        ]
        assert [result.batching for result in results] == ["loop", "vmap"]

    def test_what_was_right_with_one_number_is_looked_at_with_another(self):
        """The same code takes another branch; a wrong rule there must still be found."""

        def made(wrong):
            return lambda z: WrongUnderVmap.apply(z) if wrong else z.square()

        x = point(3, 5)
        for wrong in (0, 1):
            result = hessdiag.exact(made(wrong), x)
            torch.testing.assert_close(result, 2 * x)


def coupled(x):
    return torch.sin(x) * x.sum(dim=1, keepdim=True)


def test_integers_of_numpy_and_generators():
    assert check_positive_int("M", np.int32(3)) == 3
    assert type(as_int("M", np.uint8(3))) is int
    for wrong in (2.0, True, np.bool_(True), "3", torch.tensor(3), None):
        with pytest.raises(TypeError, match="M must be an int, got"):
            check_positive_int("M", wrong)
    x = point(2, 3)
    torch.testing.assert_close(hessdiag.hutchinson(torch.sin, x, np.int64(2)), x.cos())
    seven = hessdiag.hutchinson(coupled, x, 4, seed=7)
    assert torch.equal(hessdiag.hutchinson(coupled, x, 4, seed=np.int64(7)), seven)
    offset = hessdiag.hutchinson(coupled, x, 4, sample_offset=np.int32(2), probe_offset=np.uint8(3))
    assert torch.equal(offset, hessdiag.hutchinson(coupled, x, 4, sample_offset=2, probe_offset=3))
    generator = torch.Generator().manual_seed(3)
    first, second = (hessdiag.hutchinson(coupled, x, 4, seed=generator) for _ in range(2))
    assert not torch.equal(first, second)
    again = hessdiag.hutchinson(coupled, x, 4, seed=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    for wrong in (1.0, "1", np.bool_(True), None):
        with pytest.raises(TypeError, match=r"seed must be an int, an int64 .* or a torch\.G"):
            hessdiag.hutchinson(coupled, x, 4, seed=wrong)


def test_no_warnings_that_nobody_can_act_on():
    """In a process of its own, since PyTorch loads the rules of forward mode once."""
    code = """
import torch, hessdiag
x = torch.randn(2, 4, 8)
def attention(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)
for mode in ("vjp", "jvp"):
    hessdiag.hutchinson(attention, x, 16, mode=mode, batching="vmap")
"""
    run = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(run, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
