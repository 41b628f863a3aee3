"""Gradients that ``score_fn`` takes inside of itself, and that must stay differentiable.

This one does not::

    def score_fn(x):
        x = x.requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]    # lacks create_graph=True

``torch.autograd.grad`` without ``create_graph=True`` returns a constant, and with it on
``x.detach()`` a function of another tensor than x. Either would be left out of every product.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hessdiag.compat import NotDifferentiableError, backward_nodes, inside_transform

# What torch.autograd.grad, torch.autograd.backward and Tensor.backward all call.
_ENGINE = "_engine_run_backward"
_REMEDY = (
    "score_fn takes a gradient by torch.autograd that {what}, which would be left out of the "
    "Jacobian; write torch.autograd.grad(..., create_graph=True) with respect to x itself, or use "
    "torch.func.grad"
)


class ConstantGradientError(NotDifferentiableError):
    """``score_fn`` holds a gradient that is a constant for automatic differentiation.

    Example:
        >>> import torch, hessdiag
        >>> score_fn = lambda x: torch.autograd.grad(x.pow(4).sum(), x)[0]    # no create_graph
        >>> try:
        ...     hessdiag.exact(score_fn, torch.ones(1, 2))
        ... except hessdiag.ConstantGradientError as error:
        ...     print(str(error)[:25])
        score_fn takes a gradient
    """


class _Watch:
    """Replaces what all of torch.autograd's gradients go through, while anyone watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._original: Callable[..., Any] | None = None
        self._here = threading.local()

    @contextmanager
    def watching(self, leaf: Tensor | None) -> Iterator[None]:
        with self._lock:
            if self._number == 0:
                self._original = getattr(torch.autograd, _ENGINE)
                setattr(torch.autograd, _ENGINE, self._run)
            self._number += 1
        before = getattr(self._here, "check", None)
        self._here.check = lambda *run: _check_gradient(leaf, *run)
        try:
            yield
        finally:
            self._here.check = before
            with self._lock:
                self._number -= 1
                if self._number == 0:
                    setattr(torch.autograd, _ENGINE, self._original)

    def _run(self, *run: Any, **named: Any) -> Any:
        check = getattr(self._here, "check", None)
        if check is not None:
            check(*run)
        assert self._original is not None
        return self._original(*run, **named)


def _check_gradient(
    leaf: Tensor | None,
    outputs: Sequence[Any],
    gradients: Any,
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    *rest: Any,
) -> None:
    # torch.compile takes gradients too while it traces, of subclasses of tensors.
    plain = [output for output in outputs if type(output) is Tensor]
    if plain and not create_graph:
        raise ConstantGradientError(_REMEDY.format(what="has no create_graph=True"))
    # Those of torch.func end at copies of its own, and are differentiable.
    if leaf is None or inside_transform():
        return
    if not any(getattr(given, "shape", None) == leaf.shape for given in inputs):
        return
    nodes = [node for output in plain for node in backward_nodes(output)]
    if plain and not any(getattr(node, "variable", None) is leaf for node in nodes):
        raise ConstantGradientError(_REMEDY.format(what="is with respect to a copy of x"))


_WATCH = _Watch()


def gradients_checked(leaf: Tensor | None = None) -> AbstractContextManager[None]:
    """Return a context that raises where a gradient is taken without ``create_graph=True``.

    It holds for this thread alone.

    Args:
        leaf: A tensor that gradients with respect to tensors of its shape must depend on.

    Raises:
        ConstantGradientError: Inside, where one does not, or is without ``create_graph=True``.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> with gradients_checked():
        ...     torch.autograd.grad(x.square(), x)    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        hessdiag.inner_gradients.ConstantGradientError: score_fn takes a gradient ...
    """
    return _WATCH.watching(leaf)
