"""Products with the Jacobian of a batched function, a block of probes at a time.

For ``score_fn: (B, ...) -> (B, ...)`` that acts on each sample alone, the Jacobian at x is one
matrix J per sample. Reverse mode gives ``J^T v``, forward mode ``J v``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.checks import check_output
from hessdiag.compat import NotDifferentiableError, forward_mode_operators, has_tangent

ScoreFunction = Callable[[Tensor], Tensor]
Products = Callable[[Tensor], Tensor]
Mode = Literal["auto", "vjp", "jvp"]


def jacobian_products(score_fn: ScoreFunction, x: Tensor, mode: Mode) -> Products:
    """Return a function from probes v, of shape (m, B, ...), to products of the same shape.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken, of shape (B, ...).
        mode: "vjp" evaluates ``score_fn`` once, here, and each product ``J^T v`` is one backward
            pass to x alone. "jvp" gives ``J v`` by ``torch.func.jvp``, with one evaluation of
            ``score_fn`` for each block of probes. "auto" is "vjp", or "jvp" with a warning where
            ``score_fn`` has no backward graph (under ``torch.no_grad``) or no backward rule.

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
    return _auto_products(score_fn, x)


def _auto_products(score_fn: ScoreFunction, x: Tensor) -> Products:
    """Reverse mode, until it turns out that ``score_fn`` has no backward graph or rule."""

    def forward(reason: object) -> Products:
        warnings.warn(
            f"mode='auto' takes forward mode ('jvp'): {reason}", UserWarning, stacklevel=5
        )
        return _forward_products(score_fn, x)

    try:
        chosen = _reverse_products(score_fn, x)
    except NotDifferentiableError as error:
        return forward(error)

    def products(probes: Tensor) -> Tensor:
        nonlocal chosen
        try:
            return chosen(probes)
        except RuntimeError as error:
            # What autograd raises for a missing backward rule has no type of its own; any other
            # error, running out of memory for one, is the caller's to see.
            if not re.search("not implemented|must implement", str(error)):
                raise
            chosen = forward(error)
            return chosen(probes)

    return products


def _reverse_products(score_fn: ScoreFunction, x: Tensor) -> Products:
    with torch.inference_mode(False), torch.enable_grad():
        # A clone: autograd refuses tensors made in inference mode, and score_fn may write into it.
        leaf = x.detach().clone().requires_grad_()
        output = score_fn(leaf.clone())
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
    random_state: list[Tensor] = []

    def checked(point: Tensor) -> Tensor:
        output = score_fn(point)
        check_output(output, x)
        # torch.func.jvp would call a missing tangent zero.
        if not has_tangent(output):
            raise NotDifferentiableError(
                "the output of score_fn does not depend on x; is x detached inside score_fn?"
            )
        return output

    def product(probe: Tensor) -> Tensor:
        # Clones, since score_fn may write into its argument, and so into the tangent.
        result: Tensor = torch.func.jvp(checked, (x.clone(),), (probe.clone(),))[1]
        return result

    def products(probes: Tensor) -> Tensor:
        # Parameters that require gradients would record a backward graph for nothing.
        with forward_mode_operators(), torch.no_grad(), _same_random_numbers(random_state, x):
            if len(probes) == 1:
                return product(probes[0])[None]
            return torch.func.vmap(product, randomness="same")(probes)

    return products


@contextmanager
def _same_random_numbers(state: list[Tensor], x: Tensor) -> Iterator[None]:
    """Let every block of probes see the random numbers of the first: dropout is one function."""
    generators = [torch.default_generator]
    if x.is_cuda:
        generators.append(torch.cuda.default_generators[x.device.index])
    if not state:
        state.extend(generator.get_state() for generator in generators)
        yield
        return
    now = [generator.get_state() for generator in generators]
    try:
        for generator, first in zip(generators, state, strict=True):
            generator.set_state(first)
        yield
    finally:
        for generator, current in zip(generators, now, strict=True):
            generator.set_state(current)
