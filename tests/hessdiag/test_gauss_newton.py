"""Gauss-Newton diagonals by products with the matrix, against the matrix."""

import pytest
import torch
from small_classifier import flat, small_classifier
from torch import nn
from torch.nn import functional

import hessdiag


@pytest.fixture(scope="module")
def problem():
    return small_classifier()


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_against_the_matrix(problem, mode):
    G = problem.gauss_newton()
    exact = hessdiag.gauss_newton_diagonal(
        problem.model, problem.loss, problem.parameters, max_probes=len(G), probes="auto", mode=mode
    )
    torch.testing.assert_close(flat(exact.diagonal), G.diagonal())
    assert exact.mode == mode
    rough = hessdiag.gauss_newton_diagonal(
        problem.model, problem.loss, problem.parameters, max_probes=3000, rtol=0.1, mode=mode
    )
    assert 16 <= rough.num_probes < 3000
    assert (flat(rough.diagonal) - G.diagonal()).norm() < 0.2 * G.diagonal().norm()


LOSSES = {
    "mse": lambda o, y: functional.mse_loss(o, functional.one_hot(y, 3).to(o)),
    "smooth l1": lambda o, y: functional.smooth_l1_loss(o, functional.one_hot(y, 3).to(o)),
    "binary": lambda o, y: functional.binary_cross_entropy_with_logits(
        o, functional.one_hot(y, 3).to(o)
    ),
    "nll": lambda o, y: functional.nll_loss(o.log_softmax(1), y),
    "poisson": lambda o, y: functional.poisson_nll_loss(o, functional.one_hot(y, 3).to(o)),
    "soft margin": lambda o, y: functional.soft_margin_loss(o, functional.one_hot(y, 3).to(o)),
    "coupled": lambda o, y: o.prod(dim=1).sum() + o.sum().square(),
    "linear": lambda o, y: o.sum(),
}


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(problem, name, mode):
    def loss(outputs):
        return LOSSES[name](outputs, problem.targets)

    result = hessdiag.gauss_newton_diagonal(
        problem.model, loss, problem.parameters, max_probes=43, probes="auto", mode=mode
    )
    if name == "linear":
        expected = torch.zeros(43, dtype=torch.float64)
    else:
        expected = problem.gauss_newton(loss).diagonal()
    torch.testing.assert_close(flat(result.diagonal), expected)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_dropout_is_the_same_in_the_jacobian_and_its_transpose(mode):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    y = torch.randn(8, 2, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def model(p):
        return torch.func.functional_call(module, p, (x,))

    torch.manual_seed(1)
    result = hessdiag.gauss_newton_diagonal(
        model,
        lambda o: functional.mse_loss(o, y, reduction="sum"),
        parameters,
        max_probes=44,
        probes="auto",
        mode=mode,
    )
    torch.manual_seed(1)
    J = torch.func.jacrev(model)(parameters)
    for name in parameters:
        expected = 2 * J[name].square().sum((0, 1))
        torch.testing.assert_close(result.diagonal[name], expected.detach())
    torch.testing.assert_close(flat(result.stderr), torch.zeros(44, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["auto", "vjp", "jvp"])
def test_attention(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double()
    x, y = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    parameters = {"self_attn.in_proj_bias": layer.self_attn.in_proj_bias.detach()}

    def model(p):
        return torch.func.functional_call(layer, p, (x,))

    result = hessdiag.gauss_newton_diagonal(
        model,
        lambda o: functional.mse_loss(o, y),
        parameters,
        max_probes=24,
        probes="auto",
        mode=mode,
    )
    J = torch.func.jacrev(model)(parameters)["self_attn.in_proj_bias"]
    expected = 2 / y.numel() * J.square().sum((0, 1, 2))
    torch.testing.assert_close(flat(result.diagonal), expected.detach())


def test_what_does_not_depend_on_the_parameters_says_so(problem):
    with pytest.raises(ValueError, match="model has no backward graph to parameters"):
        hessdiag.gauss_newton_diagonal(
            lambda p: problem.model(problem.parameters).detach(),
            problem.loss,
            problem.parameters,
            max_probes=1,
        )
    with pytest.raises(TypeError, match=r"model must return a torch\.Tensor, got tuple"):
        hessdiag.gauss_newton_diagonal(
            lambda p: (problem.model(p),), problem.loss, problem.parameters, max_probes=1
        )
    with pytest.raises(ValueError, match="loss has no backward graph"):
        hessdiag.gauss_newton_diagonal(
            problem.model, lambda o: torch.tensor(0.0), problem.parameters, max_probes=1
        )


def test_a_loss_without_second_derivatives_says_so(problem):
    with pytest.raises(ValueError, match="an operator of score_fn has no rule for this mode"):
        hessdiag.gauss_newton_diagonal(
            problem.model,
            lambda o: functional.multi_margin_loss(o, problem.targets, p=2),
            problem.parameters,
            max_probes=1,
        )
