"""Mends and guards for operators that PyTorch cannot differentiate in forward mode.

Each says which versions it is for; ``tests/test_compat.py`` fails when one can go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


class NotDifferentiableError(ValueError):
    """The derivative of ``score_fn`` at x cannot be had in the chosen mode."""


class RefuseCustomOperators(TorchFunctionMode):
    """Raise where an operator of ``torch.library`` would lose a tangent.

    For every version so far: a custom operator has no forward-mode rule, and what it returns
    carries no tangent, which reads as a derivative of zero.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` unless it is a custom operator on a dual tensor."""
        if isinstance(func, torch._ops.OpOverload) and func.namespace not in ("aten", "prims"):
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, torch.Tensor) and has_tangent(value):
                    raise NotDifferentiableError(
                        f"the custom operator {func} has no forward-mode derivative; use mode='vjp'"
                    )
        return func(*args, **(kwargs or {}))


def has_tangent(tensor: torch.Tensor) -> bool:
    """Say whether forward-mode differentiation runs through ``tensor``."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


class ContiguousGroupNorm(TorchFunctionMode):
    """Hand ``group_norm`` a contiguous input, and so a contiguous tangent.

    For torch below 2.15, where the forward-mode rule of ``native_group_norm`` calls ``view`` on a
    tangent that takes the layout of the input, channels_last for example.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, with a contiguous copy of the input where it is a group norm."""
        if func in (functional.group_norm, torch.group_norm):
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def forward_mode_operators() -> Iterator[None]:
    """Make attention and group normalisation differentiable in forward mode, or say what is not.

    ``scaled_dot_product_attention`` has no forward-mode rule in its flash and memory-efficient
    backends in any version so far, and one in the mathematical backend.

    Example:
        >>> with forward_mode_operators():
        ...     pass
    """
    group_norm = ContiguousGroupNorm() if TORCH_VERSION < (2, 15) else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), RefuseCustomOperators(), group_norm:
        yield
