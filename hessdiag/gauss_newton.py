"""The diagonal of the Gauss-Newton matrix of a loss over parameters, by products with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hessdiag.choosing import ProbeName
from hessdiag.compat import forward_mode_operators
from hessdiag.curvature import LossCurvature
from hessdiag.estimate import tolerance_of
from hessdiag.kernels.philox import Seed
from hessdiag.parameter_vectors import Leaves, ParameterTree, Tree
from hessdiag.parameters import (
    FirstThatWorks,
    ParameterDiagonal,
    RandomNumbers,
    TreeMode,
    TreeProduct,
    check_depends,
    estimate_over_parameters,
    twice_differentiable,
)
from hessdiag.probes import ProbeDesign


def gauss_newton_diagonal(
    model: Callable[[Tree], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: Tree,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    stderr: bool = True,
    mode: TreeMode = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    seed: Seed = 0,
    probe_offset: int = 0,
) -> ParameterDiagonal:
    """Estimate the diagonal of the Gauss-Newton matrix of loss(model(parameters)).

    The matrix is G = J^T H J, with J the Jacobian of the outputs and H the Hessian of the loss in
    them (Schraudolph, 2002); for the losses of exponential families it is the Fisher matrix. The
    estimate is the mean of v * (G v), with variance (1/M) sum_{j != i} G_ij^2 for M Rademacher
    probes, and may be negative. It asks nothing of the model. Where the model acts on each sample
    alone, :func:`hessdiag.gauss_newton_over_data` is exact, or far more accurate, in fewer passes.

    Args:
        model: Maps parameters to outputs, of any shape. If it draws random numbers, as dropout
            does, they are the same in J, in its transpose and for every probe.
        loss: Maps outputs to a number.
        parameters: As in :func:`hessdiag.parameter_hessian_diagonal`.
        max_probes: Most probes.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`, over all parameters.
        atol: As in :func:`hessdiag.estimate`.
        stderr: As in :func:`hessdiag.parameter_hessian_diagonal`.
        mode: "vjp" takes J v as the derivative of J^T u in u, so that one evaluation of the model
            serves all products; "jvp" takes it in forward mode, an evaluation for each; "auto" the
            first that the model has rules for.
        chunk_size: As in :func:`hessdiag.parameter_hessian_diagonal`.
        seed: Seed of the probes.
        probe_offset: Number of the first probe.

    Returns:
        A :class:`ParameterDiagonal`; ``diagonal`` and ``stderr`` are trees like the parameters.

    Raises:
        TypeError: As :func:`hessdiag.parameter_hessian_diagonal`.
        ValueError: As :func:`hessdiag.parameter_hessian_diagonal`.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0]])
        >>> model, loss = lambda w: A @ w, lambda y: y.pow(2).sum() / 2
        >>> options = {"max_probes": 2, "probes": "auto"}
        >>> hessdiag.gauss_newton_diagonal(model, loss, torch.zeros(2), **options).diagonal
        tensor([1., 4.])
    """
    tree = ParameterTree.of(parameters)

    def outputs_of(leaves: Leaves) -> Tensor:
        outputs = model(tree.restore(leaves))
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model must return a torch.Tensor, got {type(outputs).__name__}")
        if outputs.is_complex():
            raise TypeError(f"model must return real numbers, got {outputs.dtype}")
        return outputs

    products = FirstThatWorks(
        mode,
        {
            "vjp": lambda: _by_reverse_mode(outputs_of, loss, tree),
            "jvp": lambda: _by_forward_mode(outputs_of, loss, tree),
        },
    )
    return estimate_over_parameters(
        products,
        tree,
        max_probes=max_probes,
        probes=probes,
        tolerance=tolerance_of(rtol, atol),
        stderr=stderr,
        chunk_size=chunk_size,
        seed=seed,
        probe_offset=probe_offset,
    )


def _by_reverse_mode(
    outputs_of: Callable[[Leaves], Tensor], loss: Callable[[Tensor], Tensor], tree: ParameterTree
) -> TreeProduct:
    with twice_differentiable():
        leaves = tree.requiring_grad()
        outputs = outputs_of(leaves)
        check_depends("model", outputs)
        # J^T u is linear in u: its derivative in u along v is J v, at any u.
        u = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(outputs, leaves, u, create_graph=True, allow_unused=True)
    curvature = LossCurvature(loss, outputs)
    used = [i for i, t in enumerate(transposed) if t is not None and t.requires_grad]
    columns = [transposed[i] for i in used]

    def product(probe: Leaves) -> Leaves:
        (change,) = torch.autograd.grad(columns, u, [probe[i] for i in used], retain_graph=True)
        found = torch.autograd.grad(
            outputs, leaves, curvature(change), retain_graph=True, allow_unused=True
        )
        return tree.zeros_for_missing(found)

    return product


def _by_forward_mode(
    outputs_of: Callable[[Leaves], Tensor], loss: Callable[[Tensor], Tensor], tree: ParameterTree
) -> TreeProduct:
    random_numbers = RandomNumbers(tree.device)
    with torch.inference_mode(False), torch.enable_grad(), random_numbers.same():
        leaves = tree.requiring_grad()
        outputs = outputs_of(leaves)
    check_depends("model", outputs)
    curvature = LossCurvature(loss, outputs)

    def product(probe: Leaves) -> Leaves:
        with forward_mode_operators(), torch.no_grad(), random_numbers.same():
            change = torch.func.jvp(outputs_of, (tree.leaves,), (probe,))[1]
        found = torch.autograd.grad(
            outputs, leaves, curvature(change), retain_graph=True, allow_unused=True
        )
        return tree.zeros_for_missing(found)

    return product
