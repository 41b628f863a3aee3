"""Attention in forward mode: by an op that keeps no matrix of scores, or by PyTorch's own rule.

PyTorch has no forward-mode rule for its flash and memory-efficient backends in any version so far.
Its mathematical backend has one, which holds several tensors of L x S for each head and tangent.
:func:`hessdiag.kernels.attention_jvp` takes the place of that where it can:

- for one level of forward mode, inside of any number of vmaps (probes, samples), on plain tensors
  of 2 to 4 dimensions, of one floating-point type that autocast leaves alone, on a CPU or a CUDA
  device that runs Triton;
- where nothing else differentiates through it: no ``torch.func.grad``, no second level, no graph;
- without dropout, and with a mask that has no tangent and requires no gradient;
- in eager mode: what is compiled or traced holds operators of PyTorch alone;
- on a CPU for scores that are large, where it is the faster one.

Everything else takes the mathematical backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.kernels import attention_jvp

# Bytes of the scores of all heads and tangents from which on the op is not the slower one on a CPU
# (benchmark suite attention): below, what it costs to call it shows.
_SMALL_SCORES = 2**22
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Triton and the shared memory of a tile ask for an A100 or later.
_LEAST_CAPABILITY = (8, 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` does, with its tangent.

    The arguments are those of that function.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 8)
        >>> _, tangent = torch.func.jvp(lambda q: attention(q, k, v), (q,), (q,))
        >>> tangent.shape
        torch.Size([1, 2, 4, 8])
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    attended = _by_op(*arguments)
    return _mathematical(*arguments) if attended is None else attended


def _by_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return attention with its tangent by the op, or None where that cannot be or is slower."""
    points, mask = (query, key, value), attn_mask
    if not (
        _is_eager()
        and dropout_p == 0.0
        and not (is_causal and mask is not None)
        and _one_level_of_forward_mode()
        and _fits(points, mask, enable_gqa)
    ):
        return None
    duals = [forward_ad.unpack_dual(point) for point in points]
    tangents = [dual.tangent for dual in duals]
    given = next((tangent for tangent in tangents if tangent is not None), None)
    if (
        given is None
        or not _constant(mask)
        or _has_graph([*points, *tangents, mask])
        or not takes_op(query, key, given)
    ):
        return None
    # (L, E) has no heads, (H, L, E) no samples; a head is a sample there.
    if mask is not None and query.dim() == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    out, change = attention_jvp(
        *(_with_four_dims(dual.primal) for dual in duals),
        *(None if tangent is None else _with_four_dims(tangent) for tangent in tangents),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    shape = (*query.shape[:-1], value.shape[-1])
    attended: Tensor = forward_ad.make_dual(out.reshape(shape), change.reshape(shape))
    return attended


def _mathematical(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # The public function does this before it calls a backend.
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    attended: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return attended


def multi_head_attention(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call ``multi_head_attention_forward`` with :func:`attention` inside of it.

    It is Python code, within which a mode of torch functions is not heeded.
    """
    # The switch is that of the whole process, but only one thread at a time is in forward mode.
    with sdpa_kernel(SDPBackend.MATH):
        if not _is_eager():
            return func(*args, **kwargs)
        with _op_in_place():
            return func(*args, **kwargs)


@contextmanager
def _op_in_place() -> Iterator[None]:
    """Let this thread meet the op, where it can be taken, in PyTorch's Python code."""
    original, here = functional.scaled_dot_product_attention, threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        attended = _by_op(*args, **kwargs) if threading.get_ident() == here else None
        return original(*args, **kwargs) if attended is None else attended

    functional.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _is_eager() -> bool:
    """Say whether nobody compiles or traces what is called here."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _one_level_of_forward_mode() -> bool:
    """Say whether forward mode is the innermost transform, and vmap the only other one."""
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return True
    *outer, innermost = (interpreter.key() for interpreter in stack)
    kinds = torch._C._functorch.TransformType
    return innermost == kinds.Jvp and all(kind == kinds.Vmap for kind in outer)


def _fits(points: tuple[Tensor, ...], mask: Tensor | None, enable_gqa: bool) -> bool:
    """Say whether the op takes tensors of these types and shapes."""
    query, key, value = points
    tensors = points if mask is None else (*points, mask)
    if any(type(t) is not Tensor or t.layout != torch.strided for t in tensors):
        return False
    dims, device = query.dim(), query.device
    if not (2 <= dims <= 4 and dims == key.dim() == value.dim()):
        return False
    if device.type == "cuda":
        if not _runs_triton(device.index):
            return False
    elif device.type != "cpu":
        return False
    if mask is not None and not (mask.dim() <= dims and _mask_fits(mask, query, key)):
        return False
    heads = -3 if dims == 4 else -2
    return (
        query.dtype in _TYPES
        and not _is_cast(query)
        and all(t.dtype == query.dtype and t.device == device for t in points)
        and query.shape[-1] == key.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
        and query.shape[:heads] == key.shape[:heads]
        and (
            dims < 4
            or query.shape[1] == key.shape[1]
            or (enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0)
        )
    )


def _is_cast(query: Tensor) -> bool:
    """Say whether autocast would compute attention in another type."""
    kind = query.device.type
    return torch.is_autocast_enabled(kind) and query.dtype != torch.get_autocast_dtype(kind)


def _mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    sizes = (*query.shape[:-1], key.shape[-2])
    return (
        (mask.dtype == torch.bool or mask.is_floating_point())
        and mask.device == query.device
        and all(
            size in (1, full) for size, full in zip(mask.shape[::-1], sizes[::-1], strict=False)
        )
    )


def _runs_triton(index: int) -> bool:
    from hessdiag.kernels._triton import triton

    return (
        hasattr(triton, "JITFunction")
        and torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY
    )


def _constant(mask: Tensor | None) -> bool:
    return mask is None or forward_ad.unpack_dual(mask).tangent is None


def _has_graph(tensors: list[Tensor | None]) -> bool:
    """Say whether autograd records what is done with one of the tensors, beneath any transform."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and _innermost(tensor).requires_grad for tensor in tensors)


def takes_op(query: Tensor, key: Tensor, tangent: Tensor) -> bool:
    """Say whether the op is not the slower way: always on a GPU, by the size of scores on a CPU.

    Args:
        query: Shape (..., L, E).
        key: Shape (..., S, E).
        tangent: Of one of the arguments; its samples, heads and probes are counted, those of vmap
            included.

    Example:
        >>> few, many = torch.zeros(1, 1, 64, 8), torch.zeros(1, 4, 1024, 8)
        >>> takes_op(few, few, few), takes_op(many, many, many)
        (False, True)
    """
    if query.device.type != "cpu":
        return True
    rows = _innermost(tangent).numel() // max(1, tangent.shape[-1] * tangent.shape[-2])
    return rows * query.shape[-2] * key.shape[-2] * query.itemsize >= _SMALL_SCORES


def _innermost(tensor: Tensor) -> Tensor:
    """Return the tensor that is inside the wrappers of torch.func."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _with_four_dims(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4:
        return tensor
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor[None, None]
