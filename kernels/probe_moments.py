"""Running moments of v * (J v) over probes, with the signs v made again inside the kernel.

For y_m = v_m * (J v_m) the running mean and sum of squared deviations follow Welford's recurrence
(Chan, Golub and LeVeque, 1983), one probe after the other:

    delta = y_m - mean,    mean += delta / m,    deviations += delta (y_m - mean).

So the products are read once, the probes never, and the result does not depend on how the probes
are split over calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hessdiag.kernels import philox
from hessdiag.kernels._checks import check_tensor
from hessdiag.kernels._triton import on_device_of, tl, triton

_GROUPS_PER_PROGRAM = 128


class Moments(NamedTuple):
    """Moments of v * (J v) over the probes seen so far.

    Attributes:
        num_probes: How many.
        mean: Shape (B, ...): the estimate of diag(J).
        squared_deviations: Shape (B, ...): the sum over probes of (y - mean)^2; divided by
            ``num_probes - 1`` it estimates the variance of one probe.
    """

    num_probes: int
    mean: Tensor
    squared_deviations: Tensor


@triton.jit(do_not_specialize=["count", "probe_offset", "sample_offset", "num_probes"])
def _probe_moments_kernel(
    seed_ptr,
    products_ptr,
    mean_ptr,
    deviations_ptr,
    mean_out_ptr,
    deviations_out_ptr,
    num_probes,
    num_groups,
    groups_per_sample,
    features,
    row_length,
    count,
    probe_offset,
    sample_offset,
    CONTINUED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    index, sample, group = philox.locate_groups(groups_per_sample, GROUPS, WIDE)
    offset, inside = philox.group_offsets(index, sample, group, num_groups, features, 8, ALIGNED)
    dtype: tl.constexpr = mean_out_ptr.dtype.element_ty
    if CONTINUED:
        mean = tl.load(mean_ptr + offset, mask=inside)
        deviations = tl.load(deviations_ptr + offset, mask=inside)
    else:
        mean = tl.zeros([GROUPS, 8], dtype)
        deviations = tl.zeros([GROUPS, 8], dtype)

    seed = tl.load(seed_ptr)
    # An offset below 2**31 comes as int32, in which its sum with a number of probes may overflow.
    probe_offset = probe_offset.to(tl.int64)
    first_tile = probe_offset // 16
    last_tile = (probe_offset + num_probes - 1) // 16
    for tile in range(first_tile, last_tile + 1):
        words = philox.sign_words(seed, group, sample + sample_offset, tile)
        for probe_in_tile in tl.static_range(16):
            row = (tile * 16 + probe_in_tile - probe_offset).to(tl.int64)
            # As a block, since the interpreter turns a block of booleans & a scalar into int32.
            rows = tl.zeros_like(index)[:, None] + row
            wanted = inside & (rows >= 0) & (rows < num_probes)
            product = tl.load(products_ptr + row * row_length + offset, mask=wanted, other=0.0)
            negative = philox.is_negative(words[probe_in_tile // 4], probe_in_tile % 4)
            y = tl.where(negative != 0, -product.to(dtype), product.to(dtype))
            delta = tl.where(wanted, y - mean, 0.0)
            weight = 1.0 / tl.maximum(count + row + 1, 1).to(dtype)
            mean += delta * weight
            deviations += delta * (y - mean)
    tl.store(mean_out_ptr + offset, mean, mask=inside)
    tl.store(deviations_out_ptr + offset, deviations, mask=inside)


def probe_moments_reference(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Compute the moments in PyTorch; the arguments are those of :func:`probe_moments_triton`."""
    dtype = _accumulator_dtype(products)
    num_probes, batch, *_ = products.shape
    bits = philox.sign_bits(
        seed, probe_offset, num_probes, sample_offset, batch, products[0, 0].numel()
    )
    signs = (2 * bits - 1).to(dtype).reshape(products.shape)
    mean = torch.zeros_like(signs[0]) if mean is None else mean.clone()
    deviations = torch.zeros_like(signs[0]) if deviations is None else deviations.clone()
    for sign, product in zip(signs, products, strict=True):
        count += 1
        y = sign * product.to(dtype)
        delta = y - mean
        mean += delta / count
        deviations += delta * (y - mean)
    return mean, deviations


def probe_moments_triton(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Compute the moments with the Triton kernel.

    Args:
        products: Shape (M, B, ...), contiguous, like all tensors here.
        seed: 0-dimensional int64 tensor.
        mean: State of the probes before, or None.
        deviations: State of the probes before, or None.
        count: Number of the probes before.
        probe_offset: Number of the first probe here.
        sample_offset: Number of the first sample.
    """
    num_probes, batch, *sample_shape = products.shape
    features = products[0, 0].numel()
    dtype = _accumulator_dtype(products)
    mean_out = torch.empty((batch, *sample_shape), dtype=dtype, device=products.device)
    deviations_out = torch.empty_like(mean_out)
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_SIGN_TILE)
    num_groups = batch * groups_per_sample
    with on_device_of(seed):
        _probe_moments_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)](
            seed,
            products,
            mean_out if mean is None else mean,
            deviations_out if deviations is None else deviations,
            mean_out,
            deviations_out,
            num_probes,
            num_groups,
            groups_per_sample,
            features,
            batch * features,
            count,
            probe_offset,
            sample_offset,
            CONTINUED=mean is not None,
            ALIGNED=features % philox.FEATURES_PER_SIGN_TILE == 0,
            WIDE=philox.needs_wide_index(num_groups, _GROUPS_PER_PROGRAM),
            GROUPS=_GROUPS_PER_PROGRAM,
        )
    return mean_out, deviations_out


@torch.library.custom_op("hessdiag::probe_moments", mutates_args=())
def _probe_moments(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    return probe_moments_reference(
        products, seed, mean, deviations, count, probe_offset, sample_offset
    )


_probe_moments.register_kernel("cuda")(probe_moments_triton)


@_probe_moments.register_fake
def _(products: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape, dtype = products.shape[1:], _accumulator_dtype(products)
    return (
        torch.empty(shape, dtype=dtype, device=products.device),
        torch.empty(shape, dtype=dtype, device=products.device),
    )


def probe_moments(
    products: Tensor,
    seed: int | Tensor,
    *,
    state: Moments | None = None,
    probe_offset: int = 0,
    sample_offset: int = 0,
) -> Moments:
    """Return the mean and the sum of squared deviations of v * (J v) over probes.

    The signs v are those of :func:`hessdiag.kernels.rademacher` for the same seed and offsets.

    Args:
        products: J v for each probe, shape (M, B, ...), in any of float32, float64, bfloat16 and
            float16. The moments are kept in float32, or float64 for float64.
        seed: Seed of the probes.
        state: Moments of earlier probes to go on from.
        probe_offset: Number of the first probe of ``products``.
        sample_offset: Number of the first sample.

    Returns:
        The moments over the probes of ``state`` and ``products``, as new tensors.

    Raises:
        TypeError: If ``products`` is of no type above, or takes part in forward-mode
            differentiation, for which the op has no rule.
        ValueError: If ``products`` has fewer than two dimensions, or the state does not fit.

    Example:
        >>> from hessdiag.kernels import rademacher
        >>> probes = rademacher((4, 1, 3), seed=0)
        >>> moments = probe_moments(2.0 * probes, seed=0)    # J = 2 I
        >>> moments.num_probes, moments.mean, moments.squared_deviations
        (4, tensor([[2., 2., 2.]]), tensor([[0., 0., 0.]]))
    """
    check_tensor("products", products)
    if products.dim() < 2:
        raise ValueError(f"products must have shape (M, B, ...), got {tuple(products.shape)}")
    num_probes, batch, *_ = products.shape
    philox.check_counter("probe_offset", probe_offset, num_probes)
    philox.check_counter("sample_offset", sample_offset, batch)
    dtype = _accumulator_dtype(products)
    if state is not None:
        for name, tensor in zip(("mean", "squared_deviations"), state[1:], strict=True):
            check_tensor(f"state.{name}", tensor, products.device)
            if tensor.shape != products.shape[1:] or tensor.dtype != dtype:
                raise ValueError(
                    f"state.{name} must have shape {tuple(products.shape[1:])} and dtype {dtype}, "
                    f"got {tuple(tensor.shape)} and {tensor.dtype}"
                )
    if products.numel() == 0:
        zeros = torch.zeros(products.shape[1:], dtype=dtype, device=products.device)
        return state or Moments(num_probes, zeros, zeros.clone())
    mean, deviations = _probe_moments(
        products.contiguous(),
        philox.seed_tensor(seed, products.device),
        None if state is None else state.mean.contiguous(),
        None if state is None else state.squared_deviations.contiguous(),
        0 if state is None else state.num_probes,
        probe_offset,
        sample_offset,
    )
    return Moments(num_probes + (0 if state is None else state.num_probes), mean, deviations)


def _accumulator_dtype(products: Tensor) -> torch.dtype:
    return torch.promote_types(products.dtype, torch.float32)
