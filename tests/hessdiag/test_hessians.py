"""Hessian and Gauss-Newton diagonals against the matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import hessdiag


def test_of_a_function_of_each_sample():
    x = torch.randn(3, 5, dtype=torch.float64)

    def f(x):
        return x.prod(dim=1) + x.pow(4).sum(dim=1)

    for function in (f, lambda x: f(x).sum()):
        for mode in ("vjp", "jvp"):
            result = hessdiag.hessian_diagonal(function, x, max_probes=5, probes="auto", mode=mode)
            torch.testing.assert_close(result.diagonal, 12 * x**2)


def test_of_an_energy_network_against_the_hessian():
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    result = hessdiag.hessian_diagonal(lambda x: energy(x)[:, 0], x, max_probes=4000)
    for sample in range(2):
        H = torch.func.hessian(lambda z: energy(z)[0])(x[sample])
        difference = (result.diagonal[sample] - H.diagonal()).abs()
        assert (difference < 4.5 * result.stderr[sample]).all()


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x, ValueError, r"f must return one number for each sample, shape \(2,\)"),
        (lambda x: 3.0, TypeError, "f must return a torch.Tensor, got float"),
    ],
)
def test_errors_of_f(f, error, message):
    with pytest.raises(error, match=message):
        hessdiag.hessian_diagonal(f, torch.zeros(2, 3), max_probes=1)


class TestParameters:
    @pytest.fixture
    def problem(self):
        """A classifier, its data, and the exact Hessian and Gauss-Newton matrices."""
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        inputs = torch.randn(20, 4, dtype=torch.float64)
        targets = torch.randint(3, (20,))
        parameters = dict(module.named_parameters())
        vector = nn.utils.parameters_to_vector(module.parameters()).detach()

        def restore(v):
            parts = v.split([p.numel() for p in parameters.values()])
            pairs = zip(parameters.items(), parts, strict=True)
            return {name: part.reshape(p.shape) for (name, p), part in pairs}

        def model(p):
            return torch.func.functional_call(module, p, (inputs,))

        def loss(outputs):
            return functional.cross_entropy(outputs, targets)

        H = torch.func.hessian(lambda v: loss(model(restore(v))))(vector)
        J = torch.func.jacrev(lambda v: model(restore(v)).flatten())(vector)
        L = torch.func.hessian(lambda z: loss(z.reshape(20, 3)))(model(parameters).flatten())
        return model, loss, parameters, H.detach(), (J.T @ L @ J).detach()

    def flat(self, tree):
        return torch.cat([leaf.flatten() for leaf in tree.values()])

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_hessian(self, problem, mode):
        model, loss, parameters, H, _ = problem

        def total(p):
            return loss(model(p))

        exact = hessdiag.parameter_hessian_diagonal(
            total, parameters, max_probes=len(H), probes="auto", mode=mode
        )
        assert {name: p.shape for name, p in exact.diagonal.items()} == {
            name: p.shape for name, p in parameters.items()
        }
        torch.testing.assert_close(self.flat(exact.diagonal), H.diagonal())
        M = 200
        rough = hessdiag.parameter_hessian_diagonal(total, parameters, max_probes=M, mode=mode)
        assert (rough.num_probes, rough.mode) == (M, mode)
        error = (H.square().sum(1) - H.diagonal().square()).div(M).sqrt()
        assert ((self.flat(rough.diagonal) - H.diagonal()).abs() < 5 * error).all()
        assert ((self.flat(rough.stderr) / error - 1).abs() < 0.4).all()
        assert all(p.grad is None for p in parameters.values())

    def test_gauss_newton(self, problem):
        model, loss, parameters, _, G = problem
        exact = hessdiag.gauss_newton_diagonal(
            model, loss, parameters, max_probes=len(G), probes="auto"
        )
        torch.testing.assert_close(self.flat(exact.diagonal), G.diagonal())
        rough = hessdiag.gauss_newton_diagonal(model, loss, parameters, max_probes=3000, rtol=0.1)
        assert 16 <= rough.num_probes < 3000
        error = (self.flat(rough.diagonal) - G.diagonal()).norm()
        assert error < 0.2 * G.diagonal().norm()

    def test_attention_takes_forward_over_reverse(self):
        """Fused attention has no second backward pass: auto says so and goes forward."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        x = torch.randn(2, 3, 8)

        def loss(p):
            return torch.func.functional_call(layer, p, (x,)).square().mean()

        parameters = {"linear1.bias": layer.linear1.bias.detach()}
        n = layer.linear1.bias.numel()
        result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=n, probes="auto")
        H = torch.func.hessian(lambda b: loss({"linear1.bias": b}))(parameters["linear1.bias"])
        torch.testing.assert_close(
            result.diagonal["linear1.bias"], H.detach().diagonal(), rtol=1e-3, atol=1e-5
        )

    @pytest.mark.parametrize(
        ("parameters", "loss", "error", "message"),
        [
            ({}, torch.sum, ValueError, "parameters must hold at least one tensor"),
            ({"a": 3.0}, torch.sum, TypeError, "parameters must hold tensors only, got float"),
            (
                [torch.zeros(1), torch.zeros(1).double()],
                torch.sum,
                TypeError,
                r"parameters must be of one type on one device, got torch.float32 on cpu, torch.f",
            ),
            (torch.zeros(2), torch.sin, ValueError, r"loss must return a 0-dim.*, got \(2,\)"),
        ],
    )
    def test_errors(self, parameters, loss, error, message):
        with pytest.raises(error, match=message):
            hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=1)
