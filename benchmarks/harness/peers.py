"""Diagonal estimators of other libraries, on one image, which is what they take.

They are installed without their dependencies (``benchmarks/peers.txt``): some name torchvision,
whose wheels load only beside the build of PyTorch they were made for, and none needs it here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hessdiag.compat import forward_mode_operators

ScoreFunction = Callable[[Tensor], Tensor]


def curvlinops_diagonals(
    score_fn: ScoreFunction, x: Tensor, M: int
) -> dict[str, Callable[[], Tensor]]:
    """Hutchinson and XDiag of curvlinops, with the image in the place of its parameters."""
    try:
        import curvlinops
    except ImportError:
        return {}

    class AtImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Parameter(x.clone())

        def forward(self, _: Tensor) -> Tensor:
            return score_fn(self.image).flatten(1)

    def operator() -> object:
        module, nothing = AtImage(), x.new_zeros(1, 1)
        return curvlinops.JacobianLinearOperator(
            module, [module.image], [(nothing, nothing)], check_deterministic=False
        )

    def run(estimator: Callable[[object, int], Tensor]) -> Tensor:
        # Without these its forward mode fails in group_norm and attention.
        with forward_mode_operators():
            return estimator(operator(), M)

    return {
        "curvlinops.hutchinson_diag": lambda: run(curvlinops.hutchinson_diag),
        "curvlinops.xdiag": lambda: run(curvlinops.xdiag),
    }


def skerch_diagonals(score_fn: ScoreFunction, x: Tensor, M: int) -> dict[str, Callable[[], Tensor]]:
    """Hutchinson of skerch, on products by reverse mode with one graph for all."""
    try:
        from skerch.algorithms import hutch
    except ImportError:
        return {}

    class Jacobian:
        """What skerch calls a linear operator: a shape, and rows times the matrix."""

        def __init__(self) -> None:
            self.shape = (x.numel(), x.numel())
            self.leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                self.output = score_fn(self.leaf)

        def __rmatmul__(self, rows: Tensor) -> Tensor:
            products = [
                torch.autograd.grad(self.output, self.leaf, v, retain_graph=True)[0].flatten()
                for v in rows.reshape(-1, *x.shape)
            ]
            return torch.stack(products).reshape(rows.shape)

    def diagonal() -> Tensor:
        result = hutch(Jacobian(), x.device, x.dtype, M, meas_blocksize=M, return_diag=True)
        return result["diag"] if isinstance(result, dict) else result[1]

    return {"skerch.algorithms.hutch": diagonal}
