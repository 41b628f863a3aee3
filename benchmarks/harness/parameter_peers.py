"""Diagonals over a network's parameters by other libraries, all as flat vectors, of mean losses.

Installed as ``benchmarks/peers.txt`` says; each raises ImportError where it is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessdiag.compat import forward_mode_operators

Diagonals = dict[str, Callable[[], Tensor]]

_LARGEST_JACOBIAN = 2**25


@dataclass(frozen=True)
class Problem:
    """A network, the mean loss that it is trained by, and a batch.

    Attributes:
        name: What tables call it.
        module: The network.
        criterion: ``nn.CrossEntropyLoss`` or ``nn.MSELoss``, with the mean.
        inputs: A batch of them.
        targets: Their targets.
    """

    name: str
    module: nn.Module
    criterion: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.module.parameters())

    def outputs(self, parameters: dict[str, Tensor]) -> Tensor:
        """Return the outputs of the batch."""
        return torch.func.functional_call(self.module, parameters, (self.inputs,))

    def loss(self, outputs: Tensor) -> Tensor:
        """Return the loss of the batch."""
        return self.criterion(outputs, self.targets)

    def total(self, parameters: dict[str, Tensor]) -> Tensor:
        """Return the loss of the batch, a function of parameters."""
        return self.loss(self.outputs(parameters))


def flat(parts: object) -> Tensor:
    """Return the tensors of a tree as one vector."""
    return torch.cat([leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(parts)])


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_()


# Hessian


def curvlinops_hessian(problem: Problem, M: int) -> Diagonals:
    """Hutchinson of curvlinops on its Hessian."""
    import curvlinops

    return {"curvlinops": lambda: _curvlinops(curvlinops.HessianLinearOperator, problem, M)}


def _curvlinops(kind: Callable[..., object], problem: Problem, M: int) -> Tensor:
    import curvlinops

    module = _copy(problem.module)
    data = [(problem.inputs, problem.targets)]
    with forward_mode_operators():
        operator = kind(
            module, problem.criterion, list(module.parameters()), data, check_deterministic=False
        )
        return flat(curvlinops.hutchinson_diag(operator, M))


def skerch_hessian(problem: Problem, M: int) -> Diagonals:
    """Hutchinson of skerch on products by double backward, with one graph for all."""
    from skerch.algorithms import hutch

    leaves = [p.requires_grad_() for p in problem.parameters.values()]
    names = list(problem.parameters)

    class Hessian:
        def __init__(self) -> None:
            self.shape = (problem.size, problem.size)
            with forward_mode_operators(), torch.enable_grad():
                value = problem.total(dict(zip(names, leaves, strict=True)))
                self.gradient = torch.autograd.grad(value, leaves, create_graph=True)

        def __rmatmul__(self, rows: Tensor) -> Tensor:
            sizes = [leaf.numel() for leaf in leaves]
            products = []
            for row in rows.reshape(-1, problem.size):
                parts = [
                    part.reshape(leaf.shape)
                    for part, leaf in zip(row.split(sizes), leaves, strict=True)
                ]
                products.append(
                    flat(torch.autograd.grad(self.gradient, leaves, parts, retain_graph=True))
                )
            return torch.stack(products).reshape(rows.shape)

    def diagonal() -> Tensor:
        x = problem.inputs
        dtype = leaves[0].dtype
        result = hutch(Hessian(), x.device, dtype, M, meas_blocksize=1, return_diag=True)
        return result["diag"] if isinstance(result, dict) else result[1]

    return {"skerch": diagonal}


# Gauss-Newton and Fisher


def backpack_diagonals(problem: Problem, samples: int) -> Diagonals:
    """The exact diagonal of BackPACK, that by Monte Carlo, and the sum of squared gradients."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagGGNMC, SumGradSquared

    module, criterion = extend(_copy(problem.module)), extend(copy.deepcopy(problem.criterion))

    def run(extension: object, name: str) -> Tensor:
        for p in module.parameters():
            p.grad = None
        with backpack(extension):
            criterion(module(problem.inputs), problem.targets).backward()
        return flat([getattr(p, name) for p in module.parameters()])

    # Its gradients of single samples are those of their part in the mean.
    scale = len(problem.inputs)
    return {
        "BackPACK, exact": lambda: run(DiagGGNExact(), "diag_ggn_exact"),
        f"BackPACK, {samples} samples": lambda: run(DiagGGNMC(samples), "diag_ggn_mc"),
        "BackPACK, empirical Fisher": lambda: scale * run(SumGradSquared(), "sum_grad_squared"),
    }


def curvlinops_gauss_newton(problem: Problem, M: int) -> Diagonals:
    """Hutchinson of curvlinops on its Gauss-Newton matrix."""
    import curvlinops

    return {
        f"curvlinops, {M} probes": lambda: _curvlinops(curvlinops.GGNLinearOperator, problem, M)
    }


def laplace_diagonals(problem: Problem, samples: int) -> Diagonals:
    """The diagonals that laplace-torch takes for posteriors."""
    from laplace.curvature import BackPackEF, BackPackGGN, CurvlinopsGGN

    classes = isinstance(problem.criterion, nn.CrossEntropyLoss)
    likelihood = "classification" if classes else "regression"
    # Of a sum over samples; for regression of half the squared error, summed over outputs.
    scale = 1.0 / len(problem.inputs)
    if not classes:
        scale *= 2.0 / problem.targets[0].numel()

    def run(backend: Callable[..., object], **options: object) -> Tensor:
        curvature = backend(_copy(problem.module), likelihood, **options)
        return scale * flat(curvature.diag(problem.inputs, problem.targets)[1])

    found: Diagonals = {
        "laplace-torch, BackPackGGN": lambda: run(BackPackGGN),
        "laplace-torch, BackPackEF, empirical Fisher": lambda: run(BackPackEF),
    }
    with torch.no_grad():
        outputs = problem.module(problem.inputs).numel()
    # It makes the whole Jacobian of a batch.
    if outputs * problem.size <= _LARGEST_JACOBIAN:
        found["laplace-torch, CurvlinopsGGN"] = lambda: run(CurvlinopsGGN)
    return found
