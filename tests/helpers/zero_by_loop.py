"""A function that products can only be taken of in a loop."""

import torch


class ZeroByLoop(torch.autograd.Function):
    """Zero, by a rule that torch.func cannot follow."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)
