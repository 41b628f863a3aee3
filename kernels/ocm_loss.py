"""The regression of a covariance head on v * (J v), with the signs v made again in the kernel.

With the target y = (1/M) sum_m v_m * (J v_m) of each element, and per sample a weight w, a scale
a and a shift b::

    loss = mean w (h - a y - b)^2,      d loss / d h = (2 / n) w (h - a y - b),

n the number of elements. Forward and backward read h and the products once each, the probes never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels import _tuning, philox, philox_triton
from hessdiag.kernels._checks import check_tensor, rows_per_sample
from hessdiag.kernels._launch import launch
from hessdiag.kernels._layout import Layout, as_int32, layout
from hessdiag.kernels._triton import tl, triton

_NUMBERS = [
    "num_probes",
    "first_tile",
    "first_probe",
    "num_tiles",
    "batch",
    "groups_per_sample",
    "multiplier",
    "shift",
    "features",
    "sample_offset",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _ocm_loss_kernel(
    seed_ptr,
    rows_ptr,
    head_ptr,
    products_ptr,
    upstream_ptr,
    out_ptr,
    num_probes,
    first_tile,
    first_probe,
    num_tiles,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    sample_offset,
    weight,
    scale,
    offset_of_target,
    factor,
    BACKWARD: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ONE_PROBE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Forward: out[program] = its share of the loss. Backward: out = the gradient for the head.
    sample, group, offset, room = philox_triton.locate(
        tl.program_id(0),
        batch,
        groups_per_sample,
        multiplier,
        shift,
        features,
        8,
        ALIGNED,
        WIDE,
        GROUPS,
    )
    # What is read is asked for before the random words are made, which then cost no time to wait.
    head = philox_triton.load(head_ptr, offset, room, 8, ALIGNED, HALVES)
    seed, number = tl.load(seed_ptr), sample + sample_offset.to(tl.uint32)
    if ONE_PROBE:
        product = philox_triton.load(products_ptr, offset, room, 8, ALIGNED, HALVES)
        words = philox_triton.sign_words(seed, group, number, first_tile)
        total = _signed(product, words, first_probe, HALVES)
    else:
        if HALVES == 2:
            total = tl.zeros([GROUPS, 4, 2], tl.float32)
        else:
            total = tl.zeros([GROUPS, 8], tl.float32)
        length = philox_triton.row_length(batch, groups_per_sample, features, 8, ALIGNED)
        for tile in range(0, num_tiles):
            words = philox_triton.sign_words(seed, group, number, first_tile + tile)
            row = tl.cast(tile, tl.int64) * 16 - first_probe
            rows_left = philox_triton.whole_number(num_probes) - row
            place = products_ptr + row * length
            first = tl.maximum(-row, 0).to(tl.int32)
            for probe in range(first, tl.minimum(rows_left, 16).to(tl.int32)):
                product = philox_triton.load(
                    place + probe * length, offset, room, 8, ALIGNED, HALVES
                )
                total += _signed(product, words, probe, HALVES)

    if PER_SAMPLE:
        row_ptr = rows_ptr + sample.to(tl.int64)[:, None] * 3
        weight = tl.load(row_ptr, mask=room > 0)
        # The argument is one over the number of probes here.
        scale = scale * tl.load(row_ptr + 1, mask=room > 0)
        offset_of_target = tl.load(row_ptr + 2, mask=room > 0)
        if HALVES == 2:
            weight = weight[:, :, None]
            scale = scale[:, :, None]
            offset_of_target = offset_of_target[:, :, None]
    residual = head.to(tl.float32) - scale * total - offset_of_target
    if BACKWARD:
        gradient = tl.load(upstream_ptr) * factor * weight * residual
        philox_triton.store(out_ptr, gradient, offset, room, 8, ALIGNED, HALVES)
    else:
        square = residual * residual
        if PER_SAMPLE:
            square = weight * square
        else:
            factor = factor * weight
        if HALVES == 2:
            feature = tl.arange(0, 4)[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]
            exists = philox_triton.exists_at(room[:, :, None], feature, ALIGNED)
        else:
            exists = philox_triton.exists_at(room, tl.arange(0, 8)[None, :], ALIGNED)
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(exists, square, 0.0)) * factor)


@triton.jit
def _signed(product, words, probe, HALVES: tl.constexpr):
    """Return v * (J v) of one probe, in float32."""
    signs = philox_triton.sign_bits(philox_triton.byte_of_probe(words, probe), HALVES)
    return philox_triton.flip(product.to(tl.float32), signs)


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
    shares = torch.empty(_layout(head).num_programs, device=head.device)
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


def _layout(head: Tensor) -> Layout:
    groups = _tuning.OCM_LOSS[head.dtype.itemsize].groups
    return layout(len(head), head[0].numel(), philox.FEATURES_PER_SIGN_TILE, groups)


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
    backward, num_probes = upstream is not None, len(products)
    lay, tiles = _layout(head), philox.SignTiles.of(probe_offset, num_probes)
    weight, scale, shift = numbers if rows is None else (1.0, 1.0, 0.0)
    size = head.dtype.itemsize
    launch(
        _ocm_loss_kernel,
        (lay.num_programs, 1, 1),
        (
            seed,
            seed if rows is None else rows,
            head,
            products,
            seed if upstream is None else upstream,
            out,
        ),
        (
            as_int32(num_probes),
            tiles.first,
            tiles.first_probe,
            tiles.num_tiles,
            *lay.numbers,
            as_int32(sample_offset),
            weight,
            scale / num_probes,
            shift,
            (2.0 if backward else 1.0) / head.numel(),
        ),
        (
            backward,
            rows is not None,
            num_probes == 1,
            lay.aligned,
            lay.wide,
            1 if size == 2 else 2,
            _tuning.OCM_LOSS[size].groups,
        ),
        _tuning.OCM_LOSS[size].warps,
    )


_ocm_loss = torch.library.custom_op("hessdiag::ocm_loss", ocm_loss_reference, mutates_args=())
_ocm_loss_backward = torch.library.custom_op(
    "hessdiag::ocm_loss_backward", ocm_loss_backward_reference, mutates_args=()
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
        >>> import torch
        >>> from hessdiag.kernels import ocm_loss
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
