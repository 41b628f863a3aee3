"""The operator: one evaluation for all that is done with it, and what a function could not do."""

import pytest
import torch
from torch import nn
from zero_by_loop import ZeroByLoop

import hessdiag


class Counted(nn.Module):
    """A network without the rules of vmap, if asked, that counts its evaluations."""

    def __init__(self, vmap=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 5)).double()
        self.vmap, self.evaluations = vmap, 0

    def forward(self, x):
        self.evaluations += 1
        hidden = self.layers(x)
        return hidden if self.vmap else hidden + ZeroByLoop.apply(x)


def point(batch=3):
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(1)).double()


ESTIMATORS = {
    "hutchinson": lambda J: hessdiag.hutchinson(J, M=4),
    "estimate": lambda J: hessdiag.estimate(J, max_probes=4).diagonal,
    "trace": lambda J: hessdiag.trace(J, max_probes=4).trace,
    "exact": hessdiag.exact,
    "jacobian": hessdiag.jacobian,
    "block_diagonal": lambda J: (
        hessdiag.block_diagonal(J, partition=torch.tensor([0, 0, 1, 1, 1])).blocks
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_every_estimator_and_the_output_share_one_evaluation(name, batching):
    function, x = Counted(), point()
    J = hessdiag.Jacobian(function, x, mode="vjp", batching=batching)
    result = ESTIMATORS[name](J)
    assert function.evaluations == 1
    torch.testing.assert_close(J.output, function.layers(x), rtol=1e-12, atol=1e-12)
    assert not J.output.requires_grad
    assert function.evaluations == 1
    ESTIMATORS[name](J)
    assert function.evaluations == 1
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
def test_forward_mode_gives_the_output_too(batching):
    function, x = Counted(), point()
    J = hessdiag.Jacobian(function, x, mode="jvp", batching=batching)
    torch.testing.assert_close(J.output, function.layers(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hessdiag.exact(J), hessdiag.exact(function, x))


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_operator_gives_what_function_and_point_give(name, mode):
    function, x = Counted(), point()
    J = hessdiag.Jacobian(function, x, mode=mode)
    calls = {
        "hutchinson": lambda: hessdiag.hutchinson(function, x, 4, mode=mode),
        "estimate": lambda: hessdiag.estimate(function, x, max_probes=4, mode=mode).diagonal,
        "trace": lambda: hessdiag.trace(function, x, max_probes=4, mode=mode).trace,
        "exact": lambda: hessdiag.exact(function, x, mode=mode),
        "jacobian": lambda: hessdiag.jacobian(function, x, mode=mode),
        "block_diagonal": lambda: (
            hessdiag.block_diagonal(
                function, x, partition=torch.tensor([0, 0, 1, 1, 1]), mode=mode
            ).blocks
        ),
    }
    torch.testing.assert_close(ESTIMATORS[name](J), calls[name](), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_further_outputs_come_from_the_same_evaluation(mode, batching):
    function, x = Counted(), point()

    def both(z):
        return function(z), {"squares": z.square()}

    J = hessdiag.Jacobian(both, x, mode=mode, batching=batching, has_aux=True)
    torch.testing.assert_close(hessdiag.exact(J), hessdiag.exact(function.layers, x))
    assert torch.equal(J.aux["squares"], x.square())
    assert not J.aux["squares"].requires_grad
    if mode == "vjp":
        assert function.evaluations == 1


def test_what_a_function_could_not_do_is_remembered():
    function, x = Counted(vmap=False), point()
    first = hessdiag.estimate(function, x, max_probes=2)
    assert function.evaluations == 2  # vmap, which fails, and the loop
    assert (first.batching, first.mode) == ("loop", "vjp")
    again = hessdiag.estimate(function, x + 1, max_probes=2)
    assert function.evaluations == 3
    assert again.note == first.note != ""
    stranger = Counted(vmap=False)
    hessdiag.estimate(stranger, x, max_probes=2)
    assert stranger.evaluations == 2
    with pytest.raises(ValueError, match="batching='vmap'"):
        hessdiag.estimate(function, x, max_probes=2, batching="vmap")


def test_functions_that_are_made_anew_are_remembered_by_what_stands_for_them():
    function, x = Counted(vmap=False), point()
    for evaluations in (2, 3):
        J = hessdiag.Jacobian(lambda z: 2 * function(z), x, remember=function)
        hessdiag.hutchinson(J, M=2)
        assert function.evaluations == evaluations


def test_the_ways_of_evaluation_hold_for_every_estimator():
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    x, basis = torch.zeros(1, 6).double(), hessdiag.dct(1)
    F = basis.analyse(torch.eye(6).double()).T
    in_basis = F @ A @ F.T
    J = hessdiag.Jacobian(lambda z: z @ A.T, x, basis=basis)
    torch.testing.assert_close(hessdiag.exact(J)[0], in_basis.diagonal())
    torch.testing.assert_close(hessdiag.jacobian(J)[0], in_basis)
    torch.testing.assert_close(
        hessdiag.trace(J, max_probes=6, probes="auto").trace[0], A.diagonal().sum()
    )
    A, x = A.float(), x.float()
    low = hessdiag.trace(lambda z: z @ A.T, x, max_probes=2, autocast=torch.bfloat16).trace
    full = hessdiag.trace(lambda z: z @ A.T, x, max_probes=2).trace
    assert 0 < (low - full).abs().max() < 0.1


def test_bases_share_the_evaluation():
    function, x = Counted(), point()
    J = hessdiag.Jacobian(function, x)
    hessdiag.exact(J.in_basis(hessdiag.dct(1)))
    hessdiag.exact(J)
    assert J.output.shape == x.shape
    assert function.evaluations == 1


def test_the_transpose_is_that_of_the_other_mode():
    function, x = Counted(), point()
    J = hessdiag.Jacobian(function, x, mode="vjp")
    identity = torch.eye(5).double()[:, None].expand(5, 3, 5)
    rows, columns = J.products(identity), J.in_mode("jvp").products(identity)
    torch.testing.assert_close(rows, columns.permute(2, 1, 0))


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_dropout_is_one_function_for_output_and_products(mode):
    layers = nn.Linear(5, 64, bias=False), nn.Dropout(0.5), nn.Linear(64, 5, bias=False)
    x = point(1)
    J = hessdiag.Jacobian(nn.Sequential(*layers).double(), x, mode=mode, batching="loop")
    # Without biases the network is linear: its output is J x, if the masks are the same.
    torch.testing.assert_close(J.output[0], hessdiag.jacobian(J)[0] @ x[0])
    # The caller's random numbers go on as if there had been the first evaluation alone.
    torch.rand(3)
    before = torch.get_rng_state()
    J.products(x[None])
    assert torch.equal(torch.get_rng_state(), before)


class TestErrors:
    def test_a_function_needs_its_point(self):
        with pytest.raises(TypeError, match="x must be given with a function"):
            hessdiag.exact(torch.sin)

    def test_an_operator_holds_its_own(self):
        J = hessdiag.Jacobian(torch.sin, point())
        with pytest.raises(ValueError, match=r"x, mode must be left out with a hessdiag\.Jacobian"):
            hessdiag.exact(J, point(), mode="vjp")

    def test_the_number_of_probes_is_no_guess(self):
        with pytest.raises(TypeError, match="M must be an int, got None"):
            hessdiag.hutchinson(torch.sin, point())

    def test_further_outputs_are_asked_for(self):
        with pytest.raises(TypeError, match=r"score_fn must return \(output, further tensors\)"):
            hessdiag.Jacobian(torch.sin, point(), has_aux=True).output  # noqa: B018

    def test_unknown_ways(self):
        with pytest.raises(ValueError, match="mode must be one of auto, vjp, jvp, got 'reverse'"):
            hessdiag.Jacobian(torch.sin, point(), mode="reverse")
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            hessdiag.exact(torch.sin, point(), colour="red")


@pytest.mark.parametrize("estimator", [hessdiag.estimate, hessdiag.trace])
def test_a_function_asked_for_as_rectangular_has_no_diagonal(estimator):
    with pytest.raises(ValueError, match="rectangular=True has products alone"):
        estimator(lambda x: x[:, :2], torch.zeros(1, 3), max_probes=2, rectangular=True)


def test_products_are_those_at_x_as_it_was_evaluated():
    x = torch.linspace(0.0, 1.0, 6).reshape(2, 3)
    for batching in ("loop", "vmap"):
        point = x.clone()
        J = hessdiag.Jacobian(lambda z: z.mul_(2.0).sin(), point, mode="vjp", batching=batching)
        torch.testing.assert_close(J.output, (2 * x).sin())
        assert torch.equal(point, x)
        point.add_(1.0)
        product = J.products(torch.ones(1, 2, 3))[0]
        torch.testing.assert_close(product, 2 * (2 * x).cos())
