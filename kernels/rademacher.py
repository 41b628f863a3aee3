"""Rademacher probes: signs that are a pure function of (seed, sample, probe, feature).

One Philox call makes the signs of 8 features x 16 probes (see :mod:`hessdiag.kernels.philox`), so
a sign costs an eighth of a word instead of a word, and the kernel is bound by its one write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.kernels import _tuning, philox, philox_cpu, philox_triton
from hessdiag.kernels._checks import FLOAT_TYPES, check_shape
from hessdiag.kernels._launch import launch, way
from hessdiag.kernels._layout import as_int32, layout, rows_of_grid
from hessdiag.kernels._triton import tl, triton

_NUMBERS = [
    "num_probes",
    "first_tile",
    "first_probe",
    "batch",
    "groups_per_sample",
    "multiplier",
    "shift",
    "features",
    "sample_offset",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _rademacher_kernel(
    seed_ptr,
    out_ptr,
    num_probes,
    first_tile,
    first_probe,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    sample_offset,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # Program (i, j, k) writes the probes of one tile of 16 for GROUPS groups of 8 features.
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
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    seed, sample = tl.load(seed_ptr), sample + sample_offset.to(tl.uint32)
    words = philox_triton.sign_words(seed, group, sample, first_tile + tile)
    length = philox_triton.row_length(batch, groups_per_sample, features, 8, ALIGNED)
    # The row of the tile's first probe, which may lie before the first.
    row = tl.cast(tile, tl.int64) * 16 - first_probe
    rows_left = philox_triton.whole_number(num_probes) - row
    place = out_ptr + row * length
    if WHOLE:
        if rows_left > 0:
            for probe in tl.static_range(16):
                signs = philox_triton.sign_bits(words[probe // 4] >> (8 * (probe % 4)), 1)
                values = _signed_one(signs, out_ptr.dtype.element_ty)
                philox_triton.store(place + probe * length, values, offset, room, 8, ALIGNED, 1)
    else:
        for probe in range(
            tl.maximum(-row, 0).to(tl.int32), tl.minimum(rows_left, 16).to(tl.int32)
        ):
            signs = philox_triton.sign_bits(philox_triton.byte_of_probe(words, probe), 1)
            values = _signed_one(signs, out_ptr.dtype.element_ty)
            philox_triton.store(place + probe * length, values, offset, room, 8, ALIGNED, 1)


@triton.jit
def _signed_one(signs, dtype: tl.constexpr):
    """Return +1 or -1 in a type by its bits, from the sign bits of float32."""
    if dtype == tl.float64:
        bits = (signs.to(tl.uint64) << 32) | 0x3FF0000000000000
    elif dtype == tl.float32:
        bits = signs | 0x3F800000
    elif dtype == tl.bfloat16:
        bits = ((signs | 0x3F800000) >> 16).to(tl.uint16)
    else:
        bits = ((signs | 0x3C000000) >> 16).to(tl.uint16)
    return bits.to(dtype, bitcast=True)


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
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    if out.numel() == 0:
        return out
    groups, warps = _tuning.RADEMACHER[dtype.itemsize]
    lay = layout(batch, math.prod(sample_shape), philox.FEATURES_PER_SIGN_TILE, groups)
    tiles = philox.SignTiles.of(probe_offset, num_probes)
    launch(
        _rademacher_kernel,
        (lay.num_programs, *rows_of_grid(tiles.num_tiles)),
        (seed, out),
        (
            as_int32(num_probes),
            tiles.first,
            tiles.first_probe,
            *lay.numbers,
            as_int32(sample_offset),
        ),
        (tiles.whole, lay.aligned, lay.wide, groups),
        warps,
    )
    return out


_rademacher = torch.library.custom_op("hessdiag::rademacher", rademacher_reference, mutates_args=())
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
        >>> import torch
        >>> from hessdiag.kernels import rademacher
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
    seed = philox.seed_tensor(seed, device)
    compute = way(_rademacher, rademacher_triton, rademacher_reference, seed)
    result: Tensor = compute(seed, shape, probe_offset, sample_offset, dtype)
    return result
