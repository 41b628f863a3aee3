"""Rademacher probes: signs that are a pure function of (seed, sample, probe, feature).

One Philox call makes the signs of 8 features x 16 probes (see :mod:`hessdiag.kernels.philox`), so
a sign costs an eighth of a word instead of a word, and the kernel is bound by its one write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.kernels import philox, philox_cpu
from hessdiag.kernels._checks import FLOAT_TYPES, check_shape
from hessdiag.kernels._triton import on_device_of, tl, triton

_GROUPS_PER_PROGRAM = 256


@triton.jit(do_not_specialize=["probe_offset", "sample_offset"])
def _rademacher_kernel(
    seed_ptr,
    out_ptr,
    num_probes,
    num_groups,
    groups_per_sample,
    features,
    row_length,
    probe_offset,
    sample_offset,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Program (i, j) writes up to 16 probes of the j-th tile for GROUPS groups of 8 features.
    index, sample, group = philox.locate_groups(groups_per_sample, GROUPS, WIDE)
    # An offset below 2**31 comes as int32, in which its sum with a number of probes may overflow.
    probe_offset = probe_offset.to(tl.int64)
    tile = probe_offset // 16 + tl.program_id(1)
    words = philox.sign_words(tl.load(seed_ptr), group, sample + sample_offset, tile)

    offset, inside = philox.group_offsets(index, sample, group, num_groups, features, 8, ALIGNED)
    for probe_in_tile in tl.static_range(16):
        word = words[probe_in_tile // 4]
        row = (tile * 16 + probe_in_tile - probe_offset).to(tl.int64)
        # As a block, since the interpreter turns a block of booleans & a scalar into int32.
        rows = tl.zeros_like(index) + row
        wanted = (rows >= 0) & (rows < num_probes)
        out_row = out_ptr + row * row_length
        negative = philox.is_negative(word, probe_in_tile % 4)
        if out_ptr.dtype.element_ty == tl.float32:
            sign = ((negative << 31) | 0x3F800000).to(tl.float32, bitcast=True)
        else:
            sign = (1.0 - 2.0 * negative.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_row + offset, sign, mask=inside & wanted[:, None])


def rademacher_reference(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the signs in PyTorch.

    The arguments are those of :func:`rademacher_triton`.
    """
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=seed.device)
    num_probes, batch, *sample_shape = shape
    features = math.prod(sample_shape)
    signs = philox.signs(seed, probe_offset, num_probes, sample_offset, batch, features, dtype)
    return signs.reshape(shape)


def rademacher_triton(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the signs with the Triton kernel.

    Args:
        seed: 0-dimensional int64 tensor, on the device of the result.
        shape: (M, B, ...).
        probe_offset: Number of the first probe.
        sample_offset: Number of the first sample.
        dtype: A floating-point type.
    """
    num_probes, batch, *sample_shape = shape
    features = math.prod(sample_shape)
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    if out.numel() == 0:
        return out
    tile_width = philox.PROBES_PER_SIGN_TILE
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_SIGN_TILE)
    num_groups = batch * groups_per_sample
    num_tiles = (probe_offset + num_probes - 1) // tile_width - probe_offset // tile_width + 1
    grid = (triton.cdiv(num_groups, _GROUPS_PER_PROGRAM), num_tiles)
    with on_device_of(seed):
        _rademacher_kernel[grid](
            seed,
            out,
            num_probes,
            num_groups,
            groups_per_sample,
            features,
            batch * features,
            probe_offset,
            sample_offset,
            ALIGNED=features % philox.FEATURES_PER_SIGN_TILE == 0,
            WIDE=philox.needs_wide_index(num_groups, _GROUPS_PER_PROGRAM),
            GROUPS=_GROUPS_PER_PROGRAM,
        )
    return out


@torch.library.custom_op("hessdiag::rademacher", mutates_args=())
def _rademacher(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return rademacher_reference(seed, shape, probe_offset, sample_offset, dtype)


_rademacher.register_kernel("cuda")(rademacher_triton)


@_rademacher.register_fake
def _(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=seed.device)


def rademacher(
    shape: Sequence[int],
    seed: philox.Seed,
    *,
    probe_offset: int = 0,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return Rademacher probes: independent signs, +1 or -1 with probability 1/2 each.

    Entry (m, b, d) is a pure function of (seed, sample_offset + b, probe_offset + m, d), with d
    the flat index of the remaining dimensions: a batch can be made whole or in parts, a set of
    probes at once or in chunks, on any device, and the signs are the same bit for bit.

    Args:
        shape: (M, B, ...): M probes for each of B samples; both may be zero.
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        probe_offset: Number of the first probe; probe numbers must stay below 2**32.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        dtype: float32, float64, bfloat16 or float16; each holds the signs exactly.
        device: Where the probes are made: by the Triton kernel on CUDA, else by the reference.

    Raises:
        TypeError: If ``dtype`` is no floating-point type, or an argument is not an integer.
        ValueError: If the shape has fewer than two dimensions or a negative one, or a seed or
            counter value does not fit.

    Example:
        >>> whole = rademacher((4, 6, 3), seed=0)
        >>> half = rademacher((4, 3, 3), seed=0, sample_offset=3)
        >>> torch.equal(whole[:, 3:], half)
        True
    """
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOAT_TYPES))}, got {dtype}")
    shape = check_shape(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (M, B, ...) with sizes of at least 0, got {tuple(shape)}")
    probe_offset = philox.check_counter("probe_offset", probe_offset, shape[0])
    sample_offset = philox.check_counter("sample_offset", sample_offset, shape[1])
    philox.check_counter("the flat feature index", 0, math.prod(shape[2:]))
    number = philox.seed_number(seed, device)
    if number is not None and math.prod(shape) > 0:
        features = math.prod(shape[2:])
        signs = philox_cpu.signs(
            number, probe_offset, shape[0], sample_offset, shape[1], features, dtype
        )
        return philox_cpu.as_tensor(signs.reshape(shape), dtype)
    result: Tensor = _rademacher(
        philox.seed_tensor(seed, device), shape, probe_offset, sample_offset, dtype
    )
    return result
