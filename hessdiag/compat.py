"""Mends and guards for operators that PyTorch differentiates wrongly or not at all.

Each says which versions it is for; ``tests/hessdiag/test_compat.py`` fails when one can go.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hessdiag.attention import attention, multi_head_attention

TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


class NotDifferentiableError(ValueError):
    """The derivative of ``score_fn`` at x cannot be had in the chosen mode; the message says why.

    Example:
        >>> import torch, hessdiag
        >>> try:
        ...     hessdiag.exact(lambda x: x.detach().sin(), torch.zeros(1, 2))
        ... except hessdiag.NotDifferentiableError as error:
        ...     print(str(error)[:42])
        the output of score_fn does not depend on
    """


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
        "Can't call numpy|Cannot access data pointer|can't be converted to NumPy",
        "score_fn computes outside of PyTorch, in NumPy say, where no derivative can follow",
    ),
    (
        "requires_grad_\\(\\).* inside of a function being transformed|"
        "does not require grad and does not have a grad_fn",
        "score_fn takes a gradient by torch.autograd.grad, which only mode='vjp' with "
        "batching='loop' can follow; take it by torch.func.grad for every other way",
    ),
    (
        "Cannot access storage of TensorWrapper",
        "score_fn holds a module that fully_shard has spread, whose weights torch.func can gather "
        "from PyTorch 2.13 on; before, use mode='vjp' with batching='loop' or 'fold'",
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
    if "torch._dynamo" not in sys.modules:  # nothing has been handed to torch.compile
        yield
        return
    from torch._functorch import config

    before, config.donated_buffer = config.donated_buffer, False  # patch costs a class each time
    try:
        yield
    finally:
        config.donated_buffer = before


def has_tangent(tensor: torch.Tensor) -> bool:
    """Say whether forward-mode differentiation runs through ``tensor``."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


class WrongUnderVmapError(ValueError):
    """PyTorch's batched derivative of ``score_fn`` is not its derivative."""


def refuse_wrong_derivatives(output: torch.Tensor, *, batched: bool) -> None:
    """Raise if a backward pass from ``output`` would be wrong without a word.

    For every version so far:

    - ``torch.cdist``: vmap of its derivative mixes up the batched dimension.
    - ``torch.as_strided_scatter``: its derivative looks at the storage of the gradient, and so
      depends on what the gradient is a view of.
    - ``max_unpool``: where pooling windows overlap and an index occurs twice, both of its inputs
      get a gradient, and only one of them was written.

    Args:
        output: Where the backward pass starts.
        batched: Whether it runs under vmap.

    Raises:
        NotDifferentiableError: If every backward pass would.
        WrongUnderVmapError: If a batched one would.
    """
    for node in backward_nodes(output):
        name = node.name()
        if not name.startswith(_WRONG_DERIVATIVES):
            continue
        if name == "AsStridedScatterBackward0":
            raise NotDifferentiableError(_SCATTER)
        if name.startswith("MaxUnpool") and _any_twice(node._saved_indices, int(name[9])):
            raise NotDifferentiableError(
                "PyTorch's backward pass of max_unpool with an index that occurs twice is wrong; "
                "use mode='jvp'"
            )
        if batched and name == "CdistBackward0":
            raise WrongUnderVmapError("PyTorch's vmap of the derivative of torch.cdist is wrong")


_WRONG_DERIVATIVES = ("AsStridedScatter", "MaxUnpool", "Cdist")
_SCATTER = "PyTorch's derivative of torch.as_strided_scatter is wrong; write it by other operators"


def _any_twice(indices: torch.Tensor, dimensions: int) -> bool:
    ordered = indices.flatten(-dimensions).sort(dim=-1).values
    return bool((ordered[..., 1:] == ordered[..., :-1]).any())


def backward_nodes(output: torch.Tensor) -> list[Any]:
    """Return every node of the backward graph of ``output`` once.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> [node.name() for node in backward_nodes(x.sin())]
        ['SinBackward0', 'torch::autograd::AccumulateGrad']
    """
    if output.grad_fn is None:
        return []
    nodes, seen = [output.grad_fn], {output.grad_fn}
    for node in nodes:  # which grows
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def inside_transform() -> bool:
    """Say whether a transform of torch.func is under way.

    Example:
        >>> inside_transform()
        False
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


class ForwardModeOperators(TorchFunctionMode):
    """Calls operators in a way that forward mode can follow, or says which cannot be followed.

    - A custom operator of ``torch.library`` has no forward-mode rule in any version so far, and
      what it returns carries no tangent, which reads as a derivative of zero: it is refused.
    - ``scaled_dot_product_attention`` has no forward-mode rule in its flash and memory-efficient
      backends in any version so far: :mod:`hessdiag.attention` says what is called.
    - ``as_strided_scatter``, whose rule is wrong in any version so far, is refused.
    - ``group_norm`` is given a contiguous input, and so a contiguous tangent. For torch below
      2.15, where the forward-mode rule of ``native_group_norm`` calls ``view`` on a tangent that
      takes the layout of the input, channels_last for example.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or what stands for it."""
        kwargs = kwargs or {}
        if func in _FORWARD_MENDS:
            return _FORWARD_MENDS[func](func, args, kwargs)
        if isinstance(func, torch._ops.OpOverload) and func.namespace not in ("aten", "prims"):
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and has_tangent(value):
                    raise NotDifferentiableError(
                        f"the custom operator {func} has no forward-mode derivative; use mode='vjp'"
                    )
        return func(*args, **kwargs)


Mend = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _contiguous_input(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if TORCH_VERSION >= (2, 15):
        return func(*args, **kwargs)
    name = "input"
    if args:
        args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
    elif name in kwargs:
        kwargs = {**kwargs, name: kwargs[name].clone(memory_format=torch.contiguous_format)}
    return func(*args, **kwargs)


def _refuse_scatter(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise NotDifferentiableError(_SCATTER)


_FORWARD_MENDS: dict[Any, Mend] = {
    functional.scaled_dot_product_attention: lambda _, args, kwargs: attention(*args, **kwargs),
    functional.multi_head_attention_forward: multi_head_attention,
    functional.group_norm: _contiguous_input,
    torch.group_norm: _contiguous_input,
    torch.as_strided_scatter: _refuse_scatter,
    torch.Tensor.as_strided_scatter: _refuse_scatter,
}


_FALLBACK_SWITCH = "_set_vmap_fallback_warning_enabled"
_warn_of_fallback: Callable[[bool], None] = getattr(torch._C._functorch, _FALLBACK_SWITCH)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Leave out the warning that an operator is batched by a loop inside of PyTorch.

    Which operators are is nothing that a caller can change. PyTorch does not tell whether the
    warning is on; it is by default, and so afterwards.
    """
    _warn_of_fallback(False)
    try:
        yield
    finally:
        _warn_of_fallback(True)


@functools.cache
def _load_forward_rules() -> None:
    """Load what PyTorch loads at its first dual number, without the warnings of that code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        with torch.autograd.forward_ad.dual_level():
            torch.autograd.forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


# PyTorch counts the levels of forward mode for the whole process: two threads in forward mode
# would meet in one level.
_FORWARD_MODE = threading.RLock()


@contextmanager
def forward_mode_operators() -> Iterator[None]:
    """Make attention and group normalisation differentiable in forward mode, or say what is not.

    One thread at a time is inside, the others wait. Inference mode is left: in torch 2.11 no
    operator passes a tangent on there.

    Example:
        >>> with forward_mode_operators():
        ...     pass
    """
    # Leaving inference mode alone would switch gradients on.
    recording = torch.is_grad_enabled()
    with (
        _FORWARD_MODE,
        torch.inference_mode(False),
        torch.set_grad_enabled(recording),
        ForwardModeOperators(),
    ):
        _load_forward_rules()
        yield
