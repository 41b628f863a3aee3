"""Rademacher probes: signs that are a pure function of (seed, sample, probe, feature).

One Philox call makes the signs of 8 features x 16 probes (see :mod:`hessdiag.kernels.philox`), so
a sign costs an eighth of a word instead of a word, and the kernel is bound by its one write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.kernels import philox
from hessdiag.kernels._triton import tl, triton

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GROUPS_PER_PROGRAM = 128


@triton.jit(do_not_specialize=["probe_offset", "sample_offset"])
def _rademacher_kernel(
    seed_ptr,
    out_ptr,
    num_probes,
    batch,
    features,
    groups_per_sample,
    probe_offset,
    sample_offset,
    GROUPS: tl.constexpr,
):
    # Program (i, j) writes up to 16 probes of the j-th tile for GROUPS groups of 8 features.
    seed = tl.load(seed_ptr)
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    sample = index // groups_per_sample
    group = index % groups_per_sample
    tile = probe_offset.to(tl.int64) // 16 + tl.program_id(1)

    zero = group * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        group.to(tl.uint32),
        (sample + sample_offset).to(tl.uint32),
        (zero + tile).to(tl.uint32),
        zero.to(tl.uint32),
    )
    feature_in_group = tl.arange(0, 8)
    feature = group[:, None] * 8 + feature_in_group[None, :]
    inside = (sample[:, None] < batch) & (feature < features)
    within_probe = sample[:, None] * features + feature
    for probe_in_tile in tl.static_range(16):
        if probe_in_tile < 4:
            word = w0
        elif probe_in_tile < 8:
            word = w1
        elif probe_in_tile < 12:
            word = w2
        else:
            word = w3
        # As a block, since the interpreter turns a block of booleans & a scalar into int32.
        row = zero[:, None] + (tile * 16 + probe_in_tile - probe_offset)
        byte = word >> (8 * (probe_in_tile % 4))
        bit = (byte[:, None] >> feature_in_group[None, :].to(tl.uint32)) & 1
        sign = bit.to(tl.float32) * 2.0 - 1.0
        tl.store(
            out_ptr + row * batch * features + within_probe,
            sign.to(out_ptr.dtype.element_ty),
            mask=inside & (row >= 0) & (row < num_probes),
        )


def rademacher_reference(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the signs in PyTorch; the arguments are those of :func:`rademacher_triton`."""
    num_probes, batch, *sample_shape = shape
    features = math.prod(sample_shape)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=seed.device)
    bits = philox.sign_bits(seed, probe_offset, num_probes, sample_offset, batch, features)
    return (bits * 2 - 1).to(dtype).reshape(shape).contiguous()


def rademacher_triton(
    seed: Tensor,
    shape: Sequence[int],
    probe_offset: int,
    sample_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the signs with the Triton kernel, on the device of ``seed``."""
    num_probes, batch, *sample_shape = shape
    features = math.prod(sample_shape)
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    if out.numel() == 0:
        return out
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_SIGN_TILE)
    tile_width = philox.PROBES_PER_SIGN_TILE
    num_tiles = (probe_offset + num_probes - 1) // tile_width - probe_offset // tile_width + 1
    grid = (triton.cdiv(batch * groups_per_sample, _GROUPS_PER_PROGRAM), num_tiles)
    _rademacher_kernel[grid](
        seed,
        out,
        num_probes,
        batch,
        features,
        groups_per_sample,
        probe_offset,
        sample_offset,
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
    seed: int | Tensor,
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
        seed: An integer in [0, 2**64), or an int64 tensor with one element.
        probe_offset: Number of the first probe; probe numbers must stay below 2**32.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        dtype: A floating-point type; every one of them holds the signs exactly.
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
    shape = [int(size) for size in shape]
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (M, B, ...) with sizes of at least 0, got {tuple(shape)}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    philox.check_counter("probe_offset", probe_offset, shape[0])
    philox.check_counter("sample_offset", sample_offset, shape[1])
    philox.check_counter("the flat feature index", 0, math.prod(shape[2:]))
    result: Tensor = _rademacher(
        philox.seed_tensor(seed, device), shape, probe_offset, sample_offset, dtype
    )
    return result
