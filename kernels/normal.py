"""Standard normals that are a pure function of (seed, stream, sample, step, feature).

The map from counters to normals is that of :mod:`hessdiag.kernels.philox`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.kernels import philox
from hessdiag.kernels._checks import check_shape, is_eager_cpu
from hessdiag.kernels._triton import on_device_of, tl, triton

_GROUPS_PER_PROGRAM = 256


@triton.jit(do_not_specialize=["step", "sample_offset"])
def _normal_kernel(
    seed_ptr,
    out_ptr,
    num_groups,
    groups_per_sample,
    features,
    step,
    sample_offset,
    STREAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    index, sample, group = philox.locate_groups(groups_per_sample, GROUPS, WIDE)
    z = philox.normal_groups(tl.load(seed_ptr), group, sample + sample_offset, step, STREAM)
    offset, inside = philox.group_offsets(index, sample, group, num_groups, features, 4, ALIGNED)
    tl.store(out_ptr + offset, z, mask=inside)


def normal_reference(
    seed: Tensor, shape: Sequence[int], stream: int, step: int, sample_offset: int
) -> Tensor:
    """Compute the normals in PyTorch; the arguments are those of :func:`normal_triton`."""
    batch, *sample_shape = shape
    features = math.prod(sample_shape)
    if math.prod(shape) == 0:
        return torch.empty(shape, device=seed.device)
    z = philox.standard_normals(seed, stream, step, 1, sample_offset, batch, features)
    return z.reshape(shape).contiguous()


def normal_triton(
    seed: Tensor, shape: Sequence[int], stream: int, step: int, sample_offset: int
) -> Tensor:
    """Compute the normals with the Triton kernel, on the device of ``seed``."""
    batch, *sample_shape = shape
    features = math.prod(sample_shape)
    out = torch.empty(shape, device=seed.device)
    if out.numel() == 0:
        return out
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_NORMAL_GROUP)
    num_groups = batch * groups_per_sample
    with on_device_of(seed):
        _normal_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)](
            seed,
            out,
            num_groups,
            groups_per_sample,
            features,
            step,
            sample_offset,
            STREAM=stream,
            ALIGNED=features % philox.FEATURES_PER_NORMAL_GROUP == 0,
            WIDE=philox.needs_wide_index(num_groups, _GROUPS_PER_PROGRAM),
            GROUPS=_GROUPS_PER_PROGRAM,
        )
    return out


@torch.library.custom_op("hessdiag::normal", mutates_args=())
def _normal(
    seed: Tensor, shape: Sequence[int], stream: int, step: int, sample_offset: int
) -> Tensor:
    return normal_reference(seed, shape, stream, step, sample_offset)


_normal.register_kernel("cuda")(normal_triton)


@_normal.register_fake
def _(seed: Tensor, shape: Sequence[int], stream: int, step: int, sample_offset: int) -> Tensor:
    return torch.empty(shape, device=seed.device)


def normal(
    shape: Sequence[int],
    seed: philox.Seed,
    *,
    step: int = 0,
    stream: int = philox.STREAM_SAMPLERS,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normals z in float32.

    Entry (b, d) is a pure function of (seed, stream, sample_offset + b, step, d), with d the flat
    index of the remaining dimensions, so that sample i gets the same noise in any batch and on
    any device (to a few units in the last place between devices).

    Args:
        shape: (B, ...): B samples, which may be zero.
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        step: Which draw of a sample's noise this is, for example the timestep; below 2**32.
        stream: 2, the samplers' stream, or 1, the probes'.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        device: Where the normals are made: by the Triton kernel on CUDA, else by the reference.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If the shape is empty, the stream is neither 1 nor 2, or a seed or counter
            value does not fit.

    Example:
        >>> whole = normal((6, 3), seed=0, step=5)
        >>> half = normal((3, 3), seed=0, step=5, sample_offset=3)
        >>> torch.equal(whole[3:], half)
        True
    """
    shape = check_shape(shape)
    if len(shape) < 1 or min(shape) < 0:
        raise ValueError(f"shape must be (B, ...) with sizes of at least 0, got {tuple(shape)}")
    if stream not in (philox.STREAM_PROBES, philox.STREAM_SAMPLERS):
        raise ValueError(f"stream must be 1 (probes) or 2 (samplers), got {stream}")
    philox.check_counter("step", step)
    sample_offset = philox.check_counter("sample_offset", sample_offset, shape[0])
    philox.check_counter("the flat feature index", 0, math.prod(shape[1:]))
    seed = philox.seed_tensor(seed, device)
    # A small call takes less time than the way through the dispatcher.
    compute = normal_reference if is_eager_cpu(seed) else _normal
    result: Tensor = compute(seed, shape, stream, step, sample_offset)
    return result
