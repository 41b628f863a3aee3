"""The Hessian diagonal of a function, estimated and exact: ``python examples/hessian_diagonal.py``.

A batch of points is handled at once, and nothing of size D x D is ever made.
"""

import torch

import hessdiag


def energy(x: torch.Tensor) -> torch.Tensor:
    """Return the Rosenbrock function of each row of x, shape (B,)."""
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(dim=1)


# The Hessian of energy is the Jacobian of its gradient.
gradient = torch.func.grad(lambda x: energy(x).sum())

x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
exact = hessdiag.exact(gradient, x)  # 1000 products
for M in (1, 10, 100):
    estimate = hessdiag.hutchinson(gradient, x, M)  # M products
    error = (estimate - exact).norm() / exact.norm()
    print(f"M = {M:3d}   relative error {error:.4f}")
