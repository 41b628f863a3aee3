"""The regression of a covariance head on v * (J v), with the signs v made again in the kernel.

With the target y = (1/M) sum_m v_m * (J v_m) of each element, and per sample a weight w, a scale
a and a shift b,

    loss = mean w (h - a y - b)^2,      d loss / d h = (2 / n) w (h - a y - b),

n the number of elements. Forward and backward read h and the products once each, the probes never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels import philox
from hessdiag.kernels._checks import check_tensor, rows_per_sample
from hessdiag.kernels._triton import on_device_of, tl, triton

_GROUPS_PER_PROGRAM = 128


@triton.jit
def _residual(
    seed,
    rows_ptr,
    head_ptr,
    products_ptr,
    index,
    sample,
    group,
    offset,
    inside,
    num_probes,
    num_groups,
    row_length,
    probe_offset,
    sample_offset,
    weight,
    scale,
    shift,
    PER_SAMPLE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return h - a y - b and the weight w, as [G, 8] blocks; the residual is 0 outside."""
    head = tl.load(head_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([GROUPS, 8], tl.float32)
    # An offset below 2**31 comes as int32, in which its sum with a number of probes may overflow.
    probe_offset = probe_offset.to(tl.int64)
    for m in range(0, num_probes):
        probe = probe_offset + m
        tile = probe // 16
        w0, w1, w2, w3 = philox.sign_words(seed, group, sample + sample_offset, tile)
        # Four probes share a word, and each has a byte of it.
        place = (probe - tile * 16).to(tl.int32)
        low = tl.where(place < 4, w0, w1)
        high = tl.where(place < 12, w2, w3)
        word = tl.where(place < 8, low, high) >> (8 * (place % 4)).to(tl.uint32)
        negative = philox.is_negative(word, 0)
        row = products_ptr + (tl.zeros_like(probe) + m).to(tl.int64) * row_length
        product = tl.load(row + offset, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(negative != 0, -product, product)
    if PER_SAMPLE:
        exists = (index < num_groups)[:, None]
        row = rows_ptr + sample.to(tl.int64)[:, None] * 3
        weight = tl.load(row + 0, mask=exists, other=0.0)
        scale = tl.load(row + 1, mask=exists, other=0.0)
        shift = tl.load(row + 2, mask=exists, other=0.0)
    residual = head - scale * (total / num_probes) - shift
    return tl.where(inside, residual, 0.0), weight


@triton.jit(do_not_specialize=["num_probes", "probe_offset", "sample_offset"])
def _ocm_loss_kernel(
    seed_ptr,
    rows_ptr,
    head_ptr,
    products_ptr,
    upstream_ptr,
    out_ptr,
    num_probes,
    num_groups,
    groups_per_sample,
    features,
    row_length,
    probe_offset,
    sample_offset,
    weight,
    scale,
    shift,
    factor,
    BACKWARD: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Forward: out[program] = its share of the loss. Backward: out = the gradient for the head.
    index, sample, group = philox.locate_groups(groups_per_sample, GROUPS, WIDE)
    offset, inside = philox.group_offsets(index, sample, group, num_groups, features, 8, ALIGNED)
    residual, weight = _residual(
        tl.load(seed_ptr),
        rows_ptr,
        head_ptr,
        products_ptr,
        index,
        sample,
        group,
        offset,
        inside,
        num_probes,
        num_groups,
        row_length,
        probe_offset,
        sample_offset,
        weight,
        scale,
        shift,
        PER_SAMPLE,
        GROUPS,
    )
    if BACKWARD:
        gradient = tl.load(upstream_ptr) * factor * weight * residual
        tl.store(out_ptr + offset, gradient.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        share = tl.sum(tl.sum(weight * residual * residual, axis=1), axis=0)
        tl.store(out_ptr + tl.program_id(0), share * factor)


def _residual_reference(
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor | float]:
    dtype = torch.promote_types(head.dtype, torch.float32)
    num_probes, batch, *_ = products.shape
    features = head[0].numel()
    signs = philox.signs(seed, probe_offset, num_probes, sample_offset, batch, features, dtype)
    signs = signs.reshape(products.shape)
    weight, scale, shift = (
        numbers
        if rows is None
        else (column.to(dtype).reshape(-1, *[1] * (head.dim() - 1)) for column in rows.unbind(1))
    )
    target = (signs * products.to(dtype)).mean(dim=0)
    return head.to(dtype) - scale * target - shift, weight


def ocm_loss_reference(
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    """Compute the loss in PyTorch; the arguments are those of :func:`ocm_loss_triton`."""
    residual, weight = _residual_reference(
        head, products, rows, numbers, seed, probe_offset, sample_offset
    )
    return (weight * residual.square()).mean()


def ocm_loss_backward_reference(
    upstream: Tensor,
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    """Compute the head's gradient in PyTorch."""
    residual, weight = _residual_reference(
        head, products, rows, numbers, seed, probe_offset, sample_offset
    )
    return (upstream * (2.0 / head.numel()) * weight * residual).to(head.dtype)


def ocm_loss_triton(
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    """Compute the loss with the Triton kernel and one sum of its programs' shares.

    Args:
        head: h, shape (B, ...), contiguous, like all tensors here; float64 takes the reference.
        products: Shape (M, B, ...).
        rows: Weight, scale and shift of each sample, float32 of shape (B, 3), or None.
        numbers: The three for all samples, read where ``rows`` is None.
        seed: 0-dimensional int64 tensor.
        probe_offset: Number of the first probe.
        sample_offset: Number of the first sample.
    """
    if head.dtype == torch.float64:
        return ocm_loss_reference(head, products, rows, numbers, seed, probe_offset, sample_offset)
    num_programs = triton.cdiv(_num_groups(head), _GROUPS_PER_PROGRAM)
    shares = torch.empty(num_programs, device=head.device)
    _launch(seed, rows, head, products, None, shares, numbers, probe_offset, sample_offset)
    return shares.sum()


def ocm_loss_backward_triton(
    upstream: Tensor,
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    """Compute the head's gradient with the Triton kernel."""
    if head.dtype == torch.float64:
        return ocm_loss_backward_reference(
            upstream, head, products, rows, numbers, seed, probe_offset, sample_offset
        )
    gradient = torch.empty_like(head)
    _launch(seed, rows, head, products, upstream, gradient, numbers, probe_offset, sample_offset)
    return gradient


def _num_groups(head: Tensor) -> int:
    groups: int = len(head) * triton.cdiv(head[0].numel(), philox.FEATURES_PER_SIGN_TILE)
    return groups


def _launch(
    seed: Tensor,
    rows: Tensor | None,
    head: Tensor,
    products: Tensor,
    upstream: Tensor | None,
    out: Tensor,
    numbers: Sequence[float],
    probe_offset: int,
    sample_offset: int,
) -> None:
    features, num_groups = head[0].numel(), _num_groups(head)
    backward = upstream is not None
    with on_device_of(seed):
        _ocm_loss_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)](
            seed,
            seed if rows is None else rows,
            head,
            products,
            upstream if backward else seed,
            out,
            len(products),
            num_groups,
            triton.cdiv(features, philox.FEATURES_PER_SIGN_TILE),
            features,
            head.numel(),
            probe_offset,
            sample_offset,
            *numbers,
            (2.0 if backward else 1.0) / head.numel(),
            BACKWARD=backward,
            PER_SAMPLE=rows is not None,
            ALIGNED=features % philox.FEATURES_PER_SIGN_TILE == 0,
            WIDE=philox.needs_wide_index(num_groups, _GROUPS_PER_PROGRAM),
            GROUPS=_GROUPS_PER_PROGRAM,
        )


@torch.library.custom_op("hessdiag::ocm_loss", mutates_args=())
def _ocm_loss(
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    return ocm_loss_reference(head, products, rows, numbers, seed, probe_offset, sample_offset)


@torch.library.custom_op("hessdiag::ocm_loss_backward", mutates_args=())
def _ocm_loss_backward(
    upstream: Tensor,
    head: Tensor,
    products: Tensor,
    rows: Tensor | None,
    numbers: Sequence[float],
    seed: Tensor,
    probe_offset: int,
    sample_offset: int,
) -> Tensor:
    return ocm_loss_backward_reference(
        upstream, head, products, rows, numbers, seed, probe_offset, sample_offset
    )


_ocm_loss.register_kernel("cuda")(ocm_loss_triton)
_ocm_loss_backward.register_kernel("cuda")(ocm_loss_backward_triton)


@_ocm_loss.register_fake
def _(head: Tensor, *_: object) -> Tensor:
    return head.new_empty((), dtype=torch.promote_types(head.dtype, torch.float32))


@_ocm_loss_backward.register_fake
def _(upstream: Tensor, head: Tensor, *_: object) -> Tensor:
    return torch.empty_like(head)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    head, products, rows, ctx.numbers, seed, ctx.probe_offset, ctx.sample_offset = inputs
    ctx.save_for_backward(head, products, rows, seed)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    head, products, rows, seed = ctx.saved_tensors
    gradient = _ocm_loss_backward(
        upstream, head, products, rows, ctx.numbers, seed, ctx.probe_offset, ctx.sample_offset
    )
    return gradient, None, None, None, None, None, None


_ocm_loss.register_autograd(_backward, setup_context=_save_for_backward)


def ocm_loss(
    head: Tensor,
    products: Tensor,
    seed: philox.Seed,
    *,
    weight: float | Tensor = 1.0,
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    probe_offset: int = 0,
    sample_offset: int = 0,
) -> Tensor:
    """Return the regression loss of a head on v * (J v), differentiable for the head.

    loss = mean w (h - a y - b)^2 with y = (1/M) sum_m v_m * (J v_m), the signs v those of
    :func:`hessdiag.kernels.rademacher` for the same seed and offsets. Averaging over probes keeps
    the gradient unbiased for every M (Optimal Covariance Matching, Ou et al., ICLR 2025).

    Args:
        head: h, shape (B, ...), float32, bfloat16 or float16, computed in float32; or float64,
            which takes the reference on every device.
        products: J v for each probe, shape (M, B, ...) and the dtype of ``head``; constants of
            the loss, through which no gradient flows.
        seed: Seed of the probes.
        weight: w, a number or a tensor of shape (B,).
        scale: a, a number or a tensor of shape (B,).
        shift: b, a number or a tensor of shape (B,).
        probe_offset: Number of the first probe.
        sample_offset: Number of the first sample.

    Returns:
        0-dimensional, float32, or float64 for float64.

    Raises:
        TypeError: If a tensor is of no type above, or takes part in forward-mode
            differentiation, for which the op has no rule.
        ValueError: If shapes or devices do not fit, there is nothing to average, or ``products``
            requires a gradient.

    Example:
        >>> from hessdiag.kernels import rademacher
        >>> probes = rademacher((1, 2, 3), seed=0)
        >>> ocm_loss(torch.ones(2, 3), 3.0 * probes, seed=0)    # (1 - 3)^2
        tensor(4.)
    """
    check_tensor("head", head)
    check_tensor("products", products, head.device)
    if products.shape[1:] != head.shape or products.dtype != head.dtype or products.dim() < 2:
        raise ValueError(
            f"products must have shape (M, *{tuple(head.shape)}) and the dtype of head, "
            f"{head.dtype}, got {tuple(products.shape)} and {products.dtype}"
        )
    if products.numel() == 0:
        raise ValueError(f"products must not be empty, got shape {tuple(products.shape)}")
    if products.requires_grad:
        raise ValueError("products must not require a gradient; pass products.detach()")
    probe_offset = philox.check_counter("probe_offset", probe_offset, len(products))
    sample_offset = philox.check_counter("sample_offset", sample_offset, len(head))
    rows, numbers = rows_per_sample({"weight": weight, "scale": scale, "shift": shift}, head)
    result: Tensor = _ocm_loss(
        head.contiguous(),
        products.contiguous(),
        rows,
        numbers,
        philox.seed_tensor(seed, head.device),
        probe_offset,
        sample_offset,
    )
    return result
