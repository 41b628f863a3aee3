"""Standard normals that are a pure function of (seed, stream, sample, step, feature).

The map from counters to normals is that of :mod:`hessdiag.kernels.philox`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.kernels import _tuning, philox, philox_triton
from hessdiag.kernels._checks import check_shape
from hessdiag.kernels._launch import launch, way
from hessdiag.kernels._layout import as_int32, layout, rows_of_grid
from hessdiag.kernels._triton import tl, triton

_NUMBERS = [
    "num_steps",
    "first_step",
    "batch",
    "groups_per_sample",
    "multiplier",
    "shift",
    "features",
    "sample_offset",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _normal_kernel(
    seed_ptr,
    out_ptr,
    num_steps,
    first_step,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    sample_offset,
    STREAM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Program (i, j, k) writes the normals of one step for GROUPS groups of 4 features.
    sample, group, offset, room = philox_triton.locate(
        tl.program_id(0),
        batch,
        groups_per_sample,
        multiplier,
        shift,
        features,
        4,
        ALIGNED,
        WIDE,
        GROUPS,
    )
    step = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sample += sample_offset.to(tl.uint32)
    z = philox_triton.normal_groups(
        tl.load(seed_ptr), group, sample, (first_step + step).to(tl.uint32), STREAM
    )
    length = philox_triton.row_length(batch, groups_per_sample, features, 4, ALIGNED)
    step = step.to(tl.uint32).to(tl.int64)
    if step < philox_triton.whole_number(num_steps):
        place = out_ptr + step * length
        philox_triton.store(place, z, offset, room, 4, ALIGNED, 1)


def normal_reference(
    seed: Tensor, shape: Sequence[int], stream: int, first_step: int, sample_offset: int
) -> Tensor:
    """Compute the normals in PyTorch; the arguments are those of :func:`normal_triton`."""
    num_steps, batch, *sample_shape = shape
    if math.prod(shape) == 0:
        return torch.empty(shape, device=seed.device)
    features = math.prod(sample_shape)
    z = philox.standard_normals(seed, stream, first_step, num_steps, sample_offset, batch, features)
    return z.reshape(shape).contiguous()


def normal_triton(
    seed: Tensor, shape: Sequence[int], stream: int, first_step: int, sample_offset: int
) -> Tensor:
    """Compute the normals with the Triton kernel, on the device of ``seed``.

    Args:
        seed: 0-dimensional int64 tensor, on the device of the result.
        shape: (S, B, ...), for S steps.
        stream: 1 or 2.
        first_step: Number of the first step.
        sample_offset: Number of the first sample.
    """
    num_steps, batch, *sample_shape = shape
    out = torch.empty(shape, device=seed.device)
    if out.numel() == 0:
        return out
    groups, warps = _tuning.NORMAL[4]
    lay = layout(batch, math.prod(sample_shape), philox.FEATURES_PER_NORMAL_GROUP, groups)
    launch(
        _normal_kernel,
        (lay.num_programs, *rows_of_grid(num_steps)),
        (seed, out),
        (as_int32(num_steps), as_int32(first_step), *lay.numbers, as_int32(sample_offset)),
        (stream, lay.aligned, lay.wide, groups),
        warps,
    )
    return out


_normal = torch.library.custom_op("hessdiag::normal", normal_reference, mutates_args=())
_normal.register_kernel("cuda")(normal_triton)


@_normal.register_fake
def _(
    seed: Tensor, shape: Sequence[int], stream: int, first_step: int, sample_offset: int
) -> Tensor:
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
        >>> import torch
        >>> from hessdiag.kernels import normal
        >>> whole = normal((6, 3), seed=0, step=5)
        >>> half = normal((3, 3), seed=0, step=5, sample_offset=3)
        >>> torch.equal(whole[3:], half)
        True
    """
    shape = check_shape(shape)
    if len(shape) < 1 or min(shape) < 0:
        raise ValueError(f"shape must be (B, ...) with sizes of at least 0, got {tuple(shape)}")
    number = philox.integer_of(stream)
    if number not in (philox.STREAM_PROBES, philox.STREAM_SAMPLERS):
        raise ValueError(f"stream must be 1 (probes) or 2 (samplers), got {stream!r}")
    step = philox.check_counter("step", step)
    return _normals([1, *shape], seed, number, step, sample_offset, device)[0]


def normal_probes(
    shape: Sequence[int],
    seed: philox.Seed,
    *,
    probe_offset: int = 0,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal probes in float32, in one launch on CUDA.

    Entry (m, b, d) is what :func:`normal` gives for stream 1 and step probe_offset + m.

    Args:
        shape: (M, B, ...): M probes for each of B samples; both may be zero.
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        probe_offset: Number of the first probe; probe numbers must stay below 2**32.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        device: Where the probes are made: by the Triton kernel on CUDA, else by the reference.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If the shape has fewer than two dimensions or a negative one, or a seed or
            counter value does not fit.

    Example:
        >>> import torch
        >>> from hessdiag.kernels import normal, normal_probes
        >>> probes = normal_probes((4, 6, 3), seed=0)
        >>> torch.equal(probes[2], normal((6, 3), seed=0, step=2, stream=1))
        True
    """
    shape = check_shape(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (M, B, ...) with sizes of at least 0, got {tuple(shape)}")
    probe_offset = philox.check_counter("probe_offset", probe_offset, shape[0])
    return _normals(shape, seed, philox.STREAM_PROBES, probe_offset, sample_offset, device)


def _normals(
    shape: list[int],
    seed: philox.Seed,
    stream: int,
    first_step: int,
    sample_offset: int,
    device: torch.device | str,
) -> Tensor:
    sample_offset = philox.check_counter("sample_offset", sample_offset, shape[1])
    philox.check_counter("the flat feature index", 0, math.prod(shape[2:]))
    seed = philox.seed_tensor(seed, device)
    compute = way(_normal, normal_triton, normal_reference, seed)
    result: Tensor = compute(seed, shape, stream, first_step, sample_offset)
    return result
