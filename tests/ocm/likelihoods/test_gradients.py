"""Gradients of a log-likelihood through all of its steps, by central differences."""

import pytest
import torch
from torch import nn

import ocm
from ocm.likelihoods.settings import LikelihoodSettings

ARCHITECTURE = ocm.Architecture("Small", None, lambda network, x, time, labels: network(x, time))
STEP = 1e-5
SHAPE = (3, 1, 2)


class Small(nn.Module):
    """Two layers that are told the time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return nn.Parameter(0.7 * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.first, self.second = random(7, 5), random(5, 6)

    def forward(self, x, time):
        told = torch.cat([x.flatten(1), time[:, None].to(x) / 1000], dim=1)
        return (torch.tanh(told @ self.first) @ self.second).reshape(x.shape)


def denoiser():
    return ocm.Denoiser(Small(), ocm.flow(), "flow_prediction", ARCHITECTURE)


def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)


def differences(value, tensor):
    """Central differences of a number by the entries of a tensor, changed in place."""
    found = torch.zeros_like(tensor)
    with torch.no_grad():
        for i in range(tensor.numel()):
            own = tensor.view(-1)[i].item()
            ends = []
            for step in (STEP, -STEP):
                tensor.view(-1)[i] = own + step
                ends.append(value())
            tensor.view(-1)[i] = own
            found.view(-1)[i] = (ends[0] - ends[1]) / (2 * STEP)
    return found


CHOICES = [
    ("rk4", "exact", 6, True),
    ("rk4", "rademacher", 2, True),
    ("heun", "exact", 6, True),
    ("heun", "rademacher", 2, True),
    ("heun", "rademacher", 2, False),
    ("heun", "coloring", 4, True),
]


def settings_of(solver, probes, max_probes, new_probes):
    return LikelihoodSettings(
        solver, 2, probes=probes, max_probes=max_probes, new_probes=new_probes
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_to_the_data_and_to_the_network(choice):
    """Of weights that differ by sample, so that no sample's is taken for another's."""
    model, x, settings = denoiser(), samples(), settings_of(*choice)
    weights = torch.tensor([1.0, -0.4], dtype=torch.float64)
    options = {"seed": 3, "first_timestep": 300}

    def value():
        return (weights * ocm.log_likelihood(model, x, settings, **options).value).sum()

    plain = value()
    assert not plain.requires_grad
    x.requires_grad_()
    found = ocm.log_likelihood(model, x, settings, **options, differentiable=True)
    torch.testing.assert_close((weights * found.value).sum(), plain)
    assert not found.stderr.requires_grad
    assert not found.log_prior.requires_grad
    leaves = [x, model.backbone.first, model.backbone.second]
    gradients = torch.autograd.grad((weights * found.value).sum(), leaves)
    for leaf, gradient in zip([x.detach(), *leaves[1:]], gradients, strict=True):
        part = leaf if leaf.numel() < 15 else leaf[:2]
        expected = differences(value, part)
        gradient = gradient[: len(part)]
        scale = expected.abs().max().item()
        assert scale > 1e-2
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(("probes", "max_probes"), [("exact", 6), ("rademacher", 2)])
@pytest.mark.parametrize(("solver", "tolerance"), [("dopri5", 1e-6), ("bosh3", 1e-4)])
def test_adaptive_steps_have_the_gradients_of_fixed_ones(solver, tolerance, probes, max_probes):
    """Those are of many steps, and of the same probes. No gradient goes through a step's length."""
    model, x = denoiser(), samples().requires_grad_()
    leaves = [x, model.backbone.first, model.backbone.second]
    common = {"probes": probes, "max_probes": max_probes, "new_probes": False}
    gradients = []
    for settings in (
        LikelihoodSettings(solver, tolerance=tolerance, **common),
        LikelihoodSettings("rk4", 32, **common),
    ):
        found = ocm.log_likelihood(
            model, x, settings, first_timestep=300, seed=3, differentiable=True
        )
        gradients.append(torch.autograd.grad(found.value[0] - 0.4 * found.value[1], leaves))
    for adaptive, fixed in zip(*gradients, strict=True):
        scale = fixed.abs().max().item()
        torch.testing.assert_close(adaptive, fixed, rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize("importance_weighted", [False, True])
def test_gradients_of_a_bound(importance_weighted):
    """For training by the likelihood of images, over several draws."""
    model, x = denoiser(), ocm.quantise(samples().clamp(-1, 1), 9)
    settings = LikelihoodSettings(
        "heun", 2, max_probes=6, num_draws=3, importance_weighted=importance_weighted
    )
    options = {"levels": 9, "first_timestep": 100}

    def value():
        return ocm.log_likelihood(model, x, settings, **options).value.sum()

    found = ocm.log_likelihood(model, x, settings, **options, differentiable=True)
    assert not found.stderr.requires_grad
    (gradient,) = torch.autograd.grad(found.value.sum(), model.backbone.first)
    expected = differences(value, model.backbone.first.detach()[:2])
    torch.testing.assert_close(gradient[:2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["heun", "bosh3"])
def test_no_graph_unless_asked_for(solver):
    """Whatever requires gradients; and none is left behind in the network."""
    model, x = denoiser(), samples().requires_grad_()
    settings = LikelihoodSettings(solver, 2, tolerance=1e-2, max_probes=6)
    found = ocm.log_likelihood(model, x, settings)
    for part in (found.value, found.log_prior, found.probe_stderr, found.degrees):
        assert not part.requires_grad
    assert all(weight.grad is None for weight in model.backbone.parameters())
