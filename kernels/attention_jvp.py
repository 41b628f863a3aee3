"""Scaled dot product attention and its directional derivatives, without its matrix of weights.

With S = scale q k^T + mask, P = softmax(S) over keys and o = P v, tangents dq, dk and dv give::

    dS = scale (dq k^T + q dk^T),
    do = P dv + (P * dS) v - r o,        r = sum over keys of P * dS,

the derivative of the softmax, dP = P * dS - P r, taken through o. A mask has no tangent here.

The kernel goes over the keys once, a block at a time, with the online softmax of FlashAttention
(Dao et al., 2022, algorithm 1; Dao, 2023), which never holds more than a block of S. It keeps for
each query the largest score t so far, and sums of terms scaled by exp(-t)::

    l = sum exp(S - t),      a = sum exp(S - t) v,
    c = sum exp(S - t) dS,   b = sum exp(S - t) (dS v + dv).

When a block raises t to t', the four are multiplied by exp(t - t') before its terms are added.
At the end o = a / l and do = (b - c o) / l. t needs no tangent: o does not depend on it.

A block of S and exp(S - t) serves several probes in one program, which keeps c and b for each.
Beyond inputs and outputs the kernel takes no memory. The reference holds the scores of a block of
queries at a time, at most ``TEMPORARY_BYTES`` of :mod:`hessdiag.kernels.attention_reference` for
the type of the device, or one row where that alone is more.

A query that may look at no key has o = 0 and do = 0, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels._checks import FLOAT_TYPES
from hessdiag.kernels._launch import way
from hessdiag.kernels.attention_reference import attention_jvp_reference, num_probes_of
from hessdiag.kernels.attention_triton import attention_jvp_triton

_attention_jvp = torch.library.custom_op(
    "hessdiag::attention_jvp", attention_jvp_reference, mutates_args=()
)
_attention_jvp.register_kernel("cuda")(attention_jvp_triton)


@_attention_jvp.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(num_probes_of(*rest[:3]), *out.shape)


@_attention_jvp.register_vmap
def _(
    info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int]]:
    """Take what is batched as further probes where only tangents are, else as further samples."""
    size: int = info.batch_size
    points, changes, mask, rest = arguments[:3], arguments[3:6], arguments[6], arguments[7:]
    dims_of_points, dims_of_changes, dim_of_mask = in_dims[:3], in_dims[3:6], in_dims[6]

    def folded(tensor: Tensor | None, dim: int | None, place: int) -> Tensor | None:
        """Return a tensor with what is batched in front of dimension ``place``, and part of it."""
        return (
            None
            if tensor is None
            else _in_front(tensor, dim, place, size).flatten(place, place + 1)
        )

    if all(dim is None for dim in (*dims_of_points, dim_of_mask)):
        batched = [folded(*change, 0) for change in zip(changes, dims_of_changes, strict=True)]
        out, tangent = _attention_jvp(*points, *batched, mask, *rest)
        return (out, tangent.unflatten(0, (size, len(tangent) // size))), (None, 0)

    # Sample b takes mask b modulo their number: one that is not batched stays as it is.
    if dim_of_mask is not None:
        mask = mask.movedim(dim_of_mask, 0)
        batch = _in_front(points[0], dims_of_points[0], 0, size).shape[1]
        repeats = batch // mask.shape[1]
        mask = mask.unsqueeze(1).expand(size, repeats, *mask.shape[1:]).flatten(0, 2)
    out, tangent = _attention_jvp(
        *(folded(*point, 0) for point in zip(points, dims_of_points, strict=True)),
        *(folded(*change, 1) for change in zip(changes, dims_of_changes, strict=True)),
        mask,
        *rest,
    )
    batch = len(out) // size
    return (out.unflatten(0, (size, batch)), tangent.unflatten(1, (size, batch))), (0, 1)


def _in_front(tensor: Tensor, dim: int | None, place: int, size: int) -> Tensor:
    """Return a tensor with its batched dimension at ``place``; one without is expanded."""
    if dim is not None:
        return tensor.movedim(dim, place)
    shape = tensor.shape
    return tensor.unsqueeze(place).expand(*shape[:place], size, *shape[place:])


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tangent: Tensor | None = None,
    key_tangent: Tensor | None = None,
    value_tangent: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return attention and its derivative in the direction of tangents, without a matrix of scores.

    The first is :func:`torch.nn.functional.scaled_dot_product_attention` of the same arguments,
    softmax(scale q k^T + mask) v, the second its derivative; formulas and sources are at the top of
    this module. Sums are in float32 for the types below it, and in the type of ``query`` else.
    Memory beyond inputs and outputs does not grow with L x S.

    Args:
        query: Shape (B, H, L, E), in any of float32, float64, bfloat16 and float16.
        key: Shape (B, H, S, E), or (B, H', S, E) with ``enable_gqa``, H' a divisor of H.
        value: Shape (B, H, S, Ev), or (B, H', S, Ev).
        query_tangent: Change of ``query``: in its shape, or with a probe dimension in front,
            (M, B, H, L, E), for M directions at once. None for zero.
        key_tangent: Change of ``key``; all tangents have M, or none has.
        value_tangent: Change of ``value``.
        attn_mask: Broadcast to (B, H, L, S), in any strides: boolean, where True takes part, or
            floating-point, added to the scores. It is taken as constant. A query that may look at
            no key has zero for both results.
        dropout_p: Must be 0.
        is_causal: Query i looks at keys 0 to i, also where L and S differ.
        scale: Factor of q k^T, 1 / sqrt(E) if None.
        enable_gqa: Several heads of queries may share one of keys.

    Returns:
        o of shape (B, H, L, Ev) and do of that shape, or (M, B, H, L, Ev), in the type of
        ``query``.

    Raises:
        TypeError: If a tensor is of no type above or differs from ``query`` in it, takes part in
            forward-mode differentiation, or is a mask of integers.
        ValueError: If shapes or devices do not fit, a mask requires gradients, or ``dropout_p`` is
            not 0.

    Example:
        >>> import torch
        >>> from hessdiag.kernels import attention_jvp
        >>> q, k, v = torch.eye(2).expand(3, 1, 1, 2, 2)
        >>> _, tangent = attention_jvp(q, k, v, value_tangent=torch.ones(1, 1, 2, 2))
        >>> tangent    # weights sum to 1
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    tangents = {
        "query_tangent": (query_tangent, query),
        "key_tangent": (key_tangent, key),
        "value_tangent": (value_tangent, value),
    }
    _check_points(query, key, value, enable_gqa)
    has_probes = _check_tangents(tangents)
    if dropout_p != 0.0:
        raise ValueError(
            f"dropout_p must be 0, got {dropout_p}: the op draws no random numbers; put the module "
            "in eval mode"
        )
    mask = None if attn_mask is None else _full_mask(attn_mask, query, key)
    dq, dk, dv = (
        change if change is None or has_probes else change[None] for change, _ in tangents.values()
    )
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    tensors = (query, key, value, dq, dk, dv, mask)
    compute = way(_attention_jvp, attention_jvp_triton, attention_jvp_reference, *tensors)
    out, tangent = compute(*tensors, is_causal, float(scale))
    return out, tangent if has_probes else tangent[0]


def _check_points(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, H, L, E), got {tuple(tensor.shape)}")
    heads, key_heads = query.shape[1], key.shape[1]
    if not (
        key.shape[:3] == value.shape[:3]
        and len(key) == len(query)
        and key.shape[-1] == query.shape[-1]
    ):
        raise ValueError(
            "query, key and value must have shapes (B, H, L, E), (B, H, S, E) and (B, H, S, Ev), "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if heads != key_heads and not (enable_gqa and key_heads > 0 and heads % key_heads == 0):
        raise ValueError(
            "key and value must have as many heads as query, or with enable_gqa=True a divisor of "
            f"them, got {key_heads} for {heads}"
        )


def _check_tangents(tangents: dict[str, tuple[Tensor | None, Tensor]]) -> bool:
    """Return whether the tangents have a probe dimension, which all must have, or none."""
    numbers: dict[str, int | None] = {}
    for name, (tangent, point) in tangents.items():
        if tangent is None:
            continue
        _check_tensor(name, tangent, point)
        if tangent.shape == point.shape:
            numbers[name] = None
        elif tangent.shape[1:] == point.shape:
            numbers[name] = len(tangent)
        else:
            raise ValueError(
                f"{name} must have shape {tuple(point.shape)}, or (M, *{tuple(point.shape)}), got "
                f"{tuple(tangent.shape)}"
            )
    if len(set(numbers.values())) > 1:
        raise ValueError(
            "all tangents must have the same number M of probes, or none a probe dimension, got "
            + ", ".join(f"{name}: {number}" for name, number in numbers.items())
        )
    return any(number is not None for number in numbers.values())


def _check_tensor(name: str, tensor: object, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {tensor.dtype}"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be of {like.dtype} as query is, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    _check_no_tangent(name, tensor)


def _check_no_tangent(name: str, tensor: Tensor) -> None:
    while torch._C._functorch.is_batchedtensor(tensor):  # unpack_dual has no rule for vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} carries a tangent of forward-mode differentiation, for which this op has no "
            "rule; pass its tangent as an argument"
        )


def _full_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as (B or 1, H, L, S), expanded and not copied."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, *FLOAT_TYPES):
        raise TypeError(f"attn_mask must be boolean or floating-point, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on {query.device}, got {attn_mask.device}")
    _check_no_tangent("attn_mask", attn_mask)
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask must not require gradients; pass attn_mask.detach()")
    sizes = (*query.shape[:3], key.shape[2])
    shape = tuple(attn_mask.shape)
    if len(shape) > 4 or any(
        size not in (1, full) for size, full in zip(shape[::-1], sizes[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask must broadcast to {sizes}, got {shape}")
    shape = (1,) * (4 - len(shape)) + shape
    return attn_mask.reshape(shape).expand(shape[0], *sizes[1:])
