"""Hessian diagonals: of functions of a batch, and of losses over parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hessdiag.checks import check_batch
from hessdiag.choosing import ProbeName
from hessdiag.compat import NotDifferentiableError, forward_mode_operators
from hessdiag.estimate import (
    DiagonalEstimate,
    estimate,
    estimate_from_products,
    tolerance_of,
)
from hessdiag.jacobian import Jacobian, Ways
from hessdiag.probes import ProbeDesign
from hessdiag.streaming import Streamed

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tree = Any


def hessian_diagonal(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: int | Tensor = 0,
    sample_offset: int = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> DiagonalEstimate:
    """Estimate the diagonal of the Hessian of a scalar function, for each sample of a batch.

    It is :func:`hessdiag.estimate` of the gradient of f: reverse over reverse mode, or with
    ``mode="jvp"`` forward over reverse, which keeps fewer activations.

    Args:
        f: Maps (B, ...) to one number for each sample, shape (B,), or to their sum, shape ().
        x: Where the Hessian is taken, shape (B, ...).
        max_probes: Most probes for a sample; D of them or more with ``probes="auto"`` are exact.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`.
        atol: As in :func:`hessdiag.estimate`.
        chunk_size: Probes held in memory at a time.
        seed: Seed of the probes.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
        ways: As in :func:`hessdiag.estimate`.

    Raises:
        TypeError: As :func:`hessdiag.estimate`.
        ValueError: As :func:`hessdiag.estimate`, or if f returns another shape.

    Example:
        >>> result = hessian_diagonal(lambda x: x.pow(3).sum(dim=1), torch.ones(1, 2), max_probes=1)
        >>> result.diagonal
        tensor([[6., 6.]])
    """

    def total(point: Tensor) -> Tensor:
        value = f(point)
        if not isinstance(value, Tensor):
            raise TypeError(f"f must return a torch.Tensor, got {type(value).__name__}")
        if value.shape not in ((), (len(point),)):
            raise ValueError(
                f"f must return one number for each sample, shape ({len(point)},), or their sum, "
                f"shape (), got {tuple(value.shape)}"
            )
        if not value.requires_grad:
            raise NotDifferentiableError(
                "the value of f does not depend on x; is it computed under torch.no_grad() or "
                "detached?"
            )
        return value.sum()

    # A gradient that does not depend on x is that of a linear function.
    J = Jacobian(torch.func.grad(total), x, may_be_constant=True, **ways)
    return estimate(
        J,
        max_probes=max_probes,
        probes=probes,
        rtol=rtol,
        atol=atol,
        chunk_size=chunk_size,
        seed=seed,
        sample_offset=sample_offset,
        probe_offset=probe_offset,
    )


@dataclass(frozen=True, eq=False)
class ParameterDiagonal:
    """An estimate of the diagonal of a matrix over parameters, in their own structure.

    Attributes:
        diagonal: The estimate: a tree like the parameters.
        stderr: Its standard errors: a tree like the parameters.
        num_probes: Products taken, int64 of shape ().
        mode: "vjp", "jvp", or "jvp then vjp" for a Gauss-Newton matrix.
        note: What a reader should know of how it was done, or "".
    """

    diagonal: Tree
    stderr: Tree
    num_probes: Tensor
    mode: str
    note: str


def parameter_hessian_diagonal(
    loss: Callable[[Tree], Tensor],
    parameters: Tree,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: int | Tensor = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> ParameterDiagonal:
    """Estimate the diagonal of the Hessian of a loss over parameters.

    The parameters are one sample of all their entries, in the order of the tree.

    Args:
        loss: Maps parameters to a number, as in
            ``lambda p: criterion(torch.func.functional_call(module, p, inputs), targets)``.
        parameters: A tensor, or a tree of tensors of one floating-point type and one device, as
            ``dict(module.named_parameters())``.
        max_probes: Most probes.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`, over all parameters.
        atol: As in :func:`hessdiag.estimate`.
        chunk_size: Probes held in memory at a time.
        seed: Seed of the probes.
        probe_offset: Number of the first probe.
        ways: As in :func:`hessdiag.estimate`: mode "vjp" is reverse over reverse, "jvp" forward
            over reverse.

    Raises:
        TypeError: As :func:`hessdiag.estimate`, or if a leaf is no tensor, or types differ.
        ValueError: As :func:`hessdiag.estimate`, or if the loss is not a number.

    Example:
        >>> parameters = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> loss = lambda p: (p["w"] ** 3).sum() + p["b"] ** 2
        >>> parameter_hessian_diagonal(loss, parameters, max_probes=1).diagonal
        {'w': tensor([ 6., 12.]), 'b': tensor(2.)}
    """
    flat, restore = _flatten(parameters)

    def scalar(vector: Tensor) -> Tensor:
        return _scalar("loss", loss(restore(vector[0])))

    J = Jacobian(torch.func.grad(scalar), flat, **ways)
    streamed, notes = estimate_from_products(
        J.products,
        flat,
        max_probes=max_probes,
        probes=probes,
        tolerance=tolerance_of(rtol, atol),
        chunk_size=chunk_size,
        seed=seed,
        probe_offset=probe_offset,
    )
    return _result(streamed, restore, J.mode, J.notes + notes)


def gauss_newton_diagonal(
    model: Callable[[Tree], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: Tree,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: int | Tensor = 0,
    probe_offset: int = 0,
) -> ParameterDiagonal:
    """Estimate the diagonal of the Gauss-Newton matrix of loss(model(parameters)).

    The matrix is J^T H J, with J the Jacobian of the outputs and H the Hessian of the loss in
    them (Schraudolph, 2002); for the losses of exponential families it is the Fisher matrix. A
    product is J v in forward mode, H in forward over reverse, J^T in reverse.

    Args:
        model: Maps parameters to outputs, of any shape.
        loss: Maps outputs to a number.
        parameters: As in :func:`parameter_hessian_diagonal`.
        max_probes: Most probes.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`, over all parameters.
        atol: As in :func:`hessdiag.estimate`.
        chunk_size: Probes held in memory at a time.
        seed: Seed of the probes.
        probe_offset: Number of the first probe.

    Raises:
        TypeError: As :func:`parameter_hessian_diagonal`.
        ValueError: As :func:`parameter_hessian_diagonal`.

    Example:
        >>> A = torch.tensor([[1.0, 2.0]])
        >>> model, loss = lambda w: A @ w, lambda y: y.pow(2).sum() / 2
        >>> gauss_newton_diagonal(model, loss, torch.zeros(2), max_probes=2, probes="auto").diagonal
        tensor([1., 4.])
    """
    flat, restore = _flatten(parameters)

    def outputs_of(vector: Tensor) -> Tensor:
        return model(restore(vector[0]))

    def gradient(outputs: Tensor) -> Tensor:
        result: Tensor = torch.func.grad(lambda y: _scalar("loss", loss(y)))(outputs)
        return result

    with torch.inference_mode(False), torch.enable_grad():
        leaf = flat.clone().requires_grad_()
        outputs = outputs_of(leaf)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model must return a torch.Tensor, got {type(outputs).__name__}")
    if not outputs.requires_grad:
        raise NotDifferentiableError("the output of model has no backward graph to parameters")

    def product(probe: Tensor) -> Tensor:
        with forward_mode_operators(), torch.no_grad():
            change = torch.func.jvp(outputs_of, (flat,), (probe,))[1]
            curved = torch.func.jvp(gradient, (outputs.detach(),), (change,))[1]
        result: Tensor = torch.autograd.grad(outputs, leaf, curved, retain_graph=True)[0]
        return result

    streamed, notes = estimate_from_products(
        lambda probes: torch.stack([product(probe) for probe in probes]),
        flat,
        max_probes=max_probes,
        probes=probes,
        tolerance=tolerance_of(rtol, atol),
        chunk_size=chunk_size,
        seed=seed,
        probe_offset=probe_offset,
    )
    return _result(streamed, restore, "jvp then vjp", notes)


def _flatten(parameters: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Return the parameters as one sample, shape (1, n), and the way back from (n,)."""
    leaves, structure = pytree.tree_flatten(parameters)
    if not leaves:
        raise ValueError("parameters must hold at least one tensor, got none")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"parameters must hold tensors only, got {type(leaf).__name__}")
    kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
    if len(kinds) > 1:
        raise TypeError(f"parameters must be of one type on one device, got {', '.join(kinds)}")
    shapes, sizes = [leaf.shape for leaf in leaves], [leaf.numel() for leaf in leaves]
    flat = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])[None]
    check_batch("parameters", flat)

    def restore(vector: Tensor) -> Tree:
        parts = vector.split(sizes)
        shaped = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return pytree.tree_unflatten(shaped, structure)

    return flat, restore


def _scalar(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a 0-dimensional tensor, got {got}")
    return value


def _result(
    streamed: Streamed, restore: Callable[[Tensor], Tree], mode: str, notes: list[str]
) -> ParameterDiagonal:
    return ParameterDiagonal(
        diagonal=restore(streamed.mean[0]),
        stderr=restore(streamed.stderr[0]),
        num_probes=streamed.num_probes[0],
        mode=mode,
        note="; ".join(notes),
    )
