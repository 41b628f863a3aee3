"""Products with a graph: gradients through closed-over parameters and the point."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import hessdiag
from hessdiag import Jacobian

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("auto", "loop", "vmap")]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    return net, {name: value.detach().clone() for name, value in net.named_parameters()}


def point(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def loss_of_products(net, parameters, x, probes, mode, batching):
    J = Jacobian(
        lambda z: functional_call(net, parameters, (z,)),
        x,
        mode=mode,
        batching=batching,
        differentiable=True,
    )
    return J.products(probes).square().sum() + J.output.sum()


def loss_by_hand(net, parameters, x, probes, mode):
    def row_function(row):
        return functional_call(net, parameters, (row[None],))[0]

    total = functional_call(net, parameters, (x,)).sum()
    for b, row in enumerate(x):
        J = torch.func.jacrev(row_function)(row)
        total = total + (probes[:, b] @ (J if mode == "vjp" else J.T)).square().sum()
    return total


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize(("mode", "batching"), WAYS)
class TestAgainstJacobiansByHand:
    def test_by_torch_func(self, network, mode, batching, number):
        net, parameters = network
        x, probes = point(3, 5), point(number, 3, 5, seed=1)
        got = torch.func.grad(
            lambda p, z: loss_of_products(net, p, z, probes, mode, batching), (0, 1)
        )(parameters, x)
        expected = torch.func.grad(lambda p, z: loss_by_hand(net, p, z, probes, mode), (0, 1))(
            parameters, x
        )
        torch.testing.assert_close(got, expected)

    def test_by_backward(self, network, mode, batching, number):
        net, parameters = network
        x, probes = point(3, 5).requires_grad_(), point(number, 3, 5, seed=1)
        mine = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss_of_products(net, mine, x, probes, mode, batching).backward()
        expected = torch.func.grad(lambda p, z: loss_by_hand(net, p, z, probes, mode), (0, 1))(
            parameters, x.detach()
        )
        got = {name: value.grad for name, value in mine.items()}
        torch.testing.assert_close((got, x.grad), expected)

    def test_by_forward_mode(self, network, mode, batching, number):
        net, parameters = network
        x, probes, change = point(3, 5), point(number, 3, 5, seed=1), point(3, 5, seed=2)
        got, expected = (
            torch.func.jvp(function, (x,), (change,))[1]
            for function in (
                lambda z: loss_of_products(net, parameters, z, probes, mode, batching),
                lambda z: loss_by_hand(net, parameters, z, probes, mode),
            )
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("mode", "batching"), WAYS)
def test_gradcheck(mode, batching):
    probes = point(2, 2, 3, seed=1)

    def products(weight, x):
        def score_fn(z):
            return torch.tanh(z @ weight) * z

        J = Jacobian(score_fn, x, mode=mode, batching=batching, differentiable=True)
        return J.products(probes)

    weight, x = point(3, 3, seed=2).requires_grad_(), point(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(products, (weight, x))


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_a_basis_and_further_outputs_carry_gradients(mode):
    weight = point(4, 4, seed=2).requires_grad_()
    x, probes, basis = point(2, 4), point(3, 2, 4, seed=1), hessdiag.dct(1)
    J = Jacobian(
        lambda z: (z @ weight.T, weight.square().sum()),
        x,
        mode=mode,
        basis=basis,
        has_aux=True,
        differentiable=True,
    )
    (J.products(probes).sum() + J.aux).backward()
    F = basis.analyse(torch.eye(4).double()).T
    other = weight.detach().clone().requires_grad_()
    matrix = F @ other @ F.T
    expected = probes @ (matrix if mode == "vjp" else matrix.T)
    (expected.sum() + other.square().sum()).backward()
    torch.testing.assert_close(weight.grad, other.grad)


def test_a_function_that_torch_func_cannot_follow():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 3 * ctx.saved_tensors[0] ** 2

    x, probes = point(2, 3).requires_grad_(), point(4, 2, 3, seed=1)
    J = Jacobian(Cube.apply, x, differentiable=True)
    J.products(probes).sum().backward()
    torch.testing.assert_close(x.grad, probes.sum(0) * 6 * x.detach())
    assert J.batching == "loop"


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_without_it_there_is_no_gradient(network, mode):
    net, _ = network
    J = Jacobian(net, point(3, 5).requires_grad_(), mode=mode)
    assert not J.products(point(2, 3, 5)).requires_grad
    assert not J.output.requires_grad
    assert not J.differentiable
    with torch.no_grad():
        J = Jacobian(net, point(3, 5), mode=mode, differentiable=True)
        assert not J.products(point(2, 3, 5)).requires_grad


@pytest.mark.parametrize(
    "take",
    [
        lambda J: J.products(torch.ones(2, 3, 5).double()),
        lambda J: J.output,
        lambda J: hessdiag.hutchinson(J, M=2),
        lambda J: hessdiag.exact(J),
    ],
)
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_inside_a_transform_a_gradient_is_never_zero(network, take, mode):
    net, parameters = network
    made = Jacobian(net, point(3, 5), mode=mode)

    def inside(p):
        return take(Jacobian(lambda z: functional_call(net, p, (z,)), point(3, 5), mode=mode)).sum()

    with pytest.raises(TypeError, match="pass differentiable=True"):
        torch.func.grad(inside)(parameters)
    with pytest.raises(TypeError, match="pass differentiable=True"):
        torch.func.grad(lambda p: take(made).sum() * p["0.bias"].sum())(parameters)


def estimate_by_hand(net, parameters, x, M, mode):
    """The mean of v * (J v), or v * (J^T v), over the signs of the contract."""
    signs = hessdiag.kernels.rademacher((M, *x.shape), 3, dtype=x.dtype)

    def row_function(row):
        return functional_call(net, parameters, (row[None],))[0]

    matrices = torch.stack([torch.func.jacrev(row_function)(row) for row in x])
    matrices = matrices.mT if mode == "vjp" else matrices
    return (signs * torch.einsum("bij,mbj->mbi", matrices, signs)).mean(0)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("M", [1, 8])
class TestEstimates:
    def diagonal(self, net, parameters, x, M, mode):
        return hessdiag.hutchinson(
            lambda z: functional_call(net, parameters, (z,)),
            x,
            M,
            seed=3,
            mode=mode,
            differentiable=True,
        )

    def test_hutchinson_by_torch_func(self, network, mode, M):
        net, parameters = network
        weights = point(3, 5, seed=2)
        got, expected = (
            torch.func.grad(lambda p, z, f=f: (weights * f(net, p, z, M, mode)).sum(), (0, 1))(
                parameters, point(3, 5)
            )
            for f in (self.diagonal, estimate_by_hand)
        )
        torch.testing.assert_close(got, expected)

    def test_trace_by_backward(self, network, mode, M):
        net, parameters = network
        parameters = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        x = point(3, 5)
        result = hessdiag.trace(
            lambda z: functional_call(net, parameters, (z,)),
            x,
            max_probes=M,
            seed=3,
            mode=mode,
            differentiable=True,
        )
        leaves = list(parameters.values())
        got = torch.autograd.grad(result.trace.square().sum(), leaves, allow_unused=True)
        by_hand = estimate_by_hand(net, parameters, x, M, mode).sum(1)
        expected = torch.autograd.grad(by_hand.square().sum(), leaves, allow_unused=True)
        for ours, theirs in zip(got[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert not result.stderr.requires_grad


@pytest.mark.parametrize("probes", ["auto", "coloring", "orthogonal", "normal"])
def test_every_design_carries_gradients(probes):
    """J = diag(w) + couplings that do not depend on w: whatever is drawn, the gradient is one."""
    w = torch.ones(1, 6, 6, dtype=torch.float64, requires_grad=True)
    x = point(2, 1, 6, 6)
    result = hessdiag.estimate(
        lambda z: w * z + z.roll(1, 3),
        x,
        max_probes=12,
        probes=probes,
        differentiable=True,
    )
    (gradient,) = torch.autograd.grad(result.diagonal.sum(), w)
    if probes != "normal":
        torch.testing.assert_close(gradient, torch.full_like(w, 2.0))
    else:
        assert ((gradient / 2 - 1).abs() < 2).all()
        assert gradient.abs().min() > 0


class TestErrors:
    def test_what_has_no_second_derivative(self):
        with pytest.raises(ValueError, match="compile=True must be left out"):
            Jacobian(torch.sin, point(2, 3), compile=True, differentiable=True)
        with pytest.raises(ValueError, match="batching must be 'loop', 'vmap' or 'auto'"):
            Jacobian(torch.sin, point(2, 3), batching="fold", differentiable=True)
        with torch.inference_mode(), pytest.raises(ValueError, match="inference mode"):
            Jacobian(torch.sin, point(2, 3), differentiable=True)

    def test_vmap_over_x(self):
        def inside(x):
            return Jacobian(torch.sin, x, differentiable=True).products(point(1, 2, 3))

        with pytest.raises(TypeError, match=r"x must not take part in torch\.func"):
            torch.func.vmap(inside)(point(4, 2, 3))
