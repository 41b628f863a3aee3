"""A classifier of 43 parameters in float64, its data, and its matrices from their definitions."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Problem:
    module: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self):
        return dict(self.module.named_parameters())

    def model(self, p):
        return torch.func.functional_call(self.module, p, (self.inputs,))

    def loss(self, outputs):
        return functional.cross_entropy(outputs, self.targets)

    def restore(self, vector):
        parts = vector.split([p.numel() for p in self.module.parameters()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        return {name: part.reshape(p.shape) for (name, p), part in pairs}

    def hessian(self):
        return torch.func.hessian(lambda v: self.loss(self.model(self.restore(v))))(self.vector)

    def gauss_newton(self, loss=None):
        loss, shape = loss or self.loss, self.model(self.parameters).shape
        J = torch.func.jacrev(lambda v: self.model(self.restore(v)).flatten())(self.vector)
        outputs = self.model(self.parameters).detach().flatten()
        # Reverse mode twice, since not every loss has a rule for forward mode.
        L = torch.func.jacrev(torch.func.jacrev(lambda z: loss(z.reshape(shape))))(outputs)
        return (J.T @ L @ J).detach()

    @property
    def vector(self):
        return flat(self.parameters)


def flat(tree):
    return torch.cat([leaf.detach().flatten() for leaf in tree.values()])


def small_classifier(samples=20):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = torch.randn(samples, 4, dtype=torch.float64)
    return Problem(module, inputs, torch.randint(3, (samples,)))
