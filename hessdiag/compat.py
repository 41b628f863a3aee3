"""Mends and guards for operators that PyTorch cannot differentiate in forward mode.

Each says which versions it is for; ``tests/hessdiag/test_compat.py`` fails when one can go.
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


# What PyTorch raises where a derivative cannot be had has no type of its own: a part of the
# message, and what to do about it.
_ADVICE = (
    (
        "mutate a captured Tensor|inplace arithmetic|vmap: .* is not possible because there exists",
        "score_fn writes into a tensor of its own, as BatchNorm in training mode does with its "
        "running statistics; put the module in eval mode, or use mode='vjp' with batching='loop'",
    ),
    (
        "use_reentrant=True",
        "score_fn uses reentrant checkpointing; give torch.utils.checkpoint use_reentrant=False",
    ),
    (
        "must override the setup_context",
        "score_fn holds a torch.autograd.Function that torch.func cannot follow (reentrant "
        "checkpointing is one); use mode='vjp', or use_reentrant=False when checkpointing",
    ),
    (
        "donated buffers",
        "score_fn was compiled to free what a second backward pass needs; set "
        "torch._functorch.config.donated_buffer = False before its first call, or use mode='jvp'",
    ),
    (
        "modified by an inplace operation",
        "score_fn overwrites a tensor that its own derivative needs; make that operation "
        "out of place, or use mode='jvp'",
    ),
    (
        "(?<!Batching rule )not implemented|must implement|Trying to use forward AD",
        "an operator of score_fn has no rule for this mode; use the other one",
    ),
)


def explained(error: Exception, mode: str, batching: str) -> NotDifferentiableError | None:
    """Return what an error says about ``mode`` and ``batching``, or None if it says nothing.

    An error of the plain loops that is not known here is the function's own.
    """
    if isinstance(error, (torch.OutOfMemoryError, NotDifferentiableError)):
        return None
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for pattern, advice in _ADVICE:
        if re.search(pattern, str(error)):
            return NotDifferentiableError(
                f"no derivative by mode='{mode}', batching='{batching}': {advice} "
                f"(PyTorch: {first_line})"
            )
    if batching == "vmap":
        return NotDifferentiableError(
            f"no derivative by mode='{mode}', batching='vmap': {first_line}; use batching='loop'"
        )
    return None


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """Compile what is compiled here so that its graph can be gone through more than once.

    For every version since 2.6: ``torch.compile`` otherwise lets a backward pass overwrite the
    activations, and a second one raises. To be set while the function is compiled, never during
    the backward pass, where it would switch off that check and nothing else.
    """
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


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
    backends in any version so far, and one in the mathematical backend. Inference mode is left: in
    torch 2.11 no operator passes a tangent on there.

    Example:
        >>> with forward_mode_operators():
        ...     pass
    """
    group_norm = ContiguousGroupNorm() if TORCH_VERSION < (2, 15) else nullcontext()
    # Leaving inference mode alone would switch gradients on.
    grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
    with (
        torch.inference_mode(False),
        grad_mode,
        sdpa_kernel(SDPBackend.MATH),
        RefuseCustomOperators(),
        group_norm,
    ):
        yield
