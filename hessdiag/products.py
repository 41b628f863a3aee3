"""Products with the Jacobian of a batched function, a block of probes at a time.

For ``score_fn: (B, ...) -> (B, ...)`` that acts on each sample alone, the Jacobian at x is one
matrix J per sample. Reverse mode gives ``J^T v``, forward mode ``J v``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.checks import check_output
from hessdiag.compat import forward_mode_operators

ScoreFunction = Callable[[Tensor], Tensor]
Products = Callable[[Tensor], Tensor]
Mode = Literal["auto", "vjp", "jvp"]


class NotDifferentiableError(ValueError):
    """``score_fn`` returned a tensor through which the chosen mode cannot reach x."""


def jacobian_products(score_fn: ScoreFunction, x: Tensor, mode: Mode) -> Products:
    """Return a function from probes v, of shape (m, B, ...), to products of the same shape.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken, of shape (B, ...).
        mode: "vjp" evaluates ``score_fn`` once, here, and each product ``J^T v`` is one backward
            pass to x alone. "jvp" gives ``J v`` by ``torch.func.jvp``, with one evaluation of
            ``score_fn`` for each block of probes. "auto" is "vjp", or "jvp" with a warning where
            the output of ``score_fn`` has no backward graph, for example under ``torch.no_grad``.

    Raises:
        TypeError: If ``score_fn`` returns no tensor or another dtype than that of x.
        ValueError: If it returns another shape, does not depend on x, or ``mode`` is unknown.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> products = jacobian_products(lambda x: x @ A.T, torch.zeros(1, 2), "jvp")
        >>> products(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[[1., 3.]],
        <BLANKLINE>
                [[2., 4.]]])
    """
    if mode == "vjp":
        return _reverse_products(score_fn, x)
    if mode == "jvp":
        return _forward_products(score_fn, x)
    if mode != "auto":
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    try:
        return _reverse_products(score_fn, x)
    except NotDifferentiableError as error:
        warnings.warn(f"mode='auto' takes forward mode ('jvp'): {error}", UserWarning, stacklevel=3)
        return _forward_products(score_fn, x)


def _reverse_products(score_fn: ScoreFunction, x: Tensor) -> Products:
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor made in inference mode cannot take part in autograd; its clone can.
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        output = score_fn(leaf)
    check_output(output, x)
    if not output.requires_grad:
        raise NotDifferentiableError(
            "the output of score_fn has no backward graph to x; is it computed under "
            "torch.no_grad() or detached?"
        )

    def products(probes: Tensor) -> Tensor:
        return torch.stack([backward(probe) for probe in probes])

    def backward(probe: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(output, leaf, probe, retain_graph=True, allow_unused=True)
        if product is None:
            raise NotDifferentiableError(
                "the output of score_fn does not depend on x; is x detached inside score_fn?"
            )
        return product

    return products


def _forward_products(score_fn: ScoreFunction, x: Tensor) -> Products:
    x = x.detach()

    def checked(point: Tensor) -> Tensor:
        output = score_fn(point)
        check_output(output, x)
        # torch.func.jvp would call a missing tangent zero.
        if torch.autograd.forward_ad.unpack_dual(output).tangent is None:
            raise NotDifferentiableError(
                "the output of score_fn does not depend on x; is x detached inside score_fn?"
            )
        return output

    def product(probe: Tensor) -> Tensor:
        result: Tensor = torch.func.jvp(checked, (x,), (probe,))[1]
        return result

    def products(probes: Tensor) -> Tensor:
        # Parameters that require gradients would record a backward graph for nothing.
        with forward_mode_operators(), torch.no_grad():
            if len(probes) == 1:
                return product(probes[0])[None]
            # The same random numbers for every probe: dropout stays one fixed function.
            return torch.func.vmap(product, randomness="same")(probes)

    return products
