"""Bits as numbers and numbers as bits, with one rounding.

Registers hold unsigned integers (Booleans for predicates). An instruction reads them in a type:
integers of that type, float32 or float64 for floating point; 16-bit types become float32, which
holds them exactly. What it computes may be more precise than its type, and is rounded once, to
nearest and ties to even: ``float64`` results that are exact, or rounded to odd.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

UNSIGNED: dict[int, type] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}  # as instructions make it


@cache
def width(type_: str) -> int:
    """Return how many bits a value of a type has."""
    if type_ == "pred":
        return 1
    match = re.fullmatch(r"(?:[busf]|bf|tf)(\d+)(x2)?", type_)
    if match is None:
        raise ValueError(f"unknown type .{type_}")
    return int(match.group(1)) * (2 if match.group(2) else 1)


def is_float(type_: str) -> bool:
    """Say whether values of a type are floating-point numbers."""
    return type_ in ("f16", "bf16", "f32", "f64")


def decode(bits: Array, type_: str) -> Array:
    """Return the numbers that bits of a type stand for."""
    if type_ == "f32":
        return bits.view(np.float32)
    if type_ == "f64":
        return bits.view(np.float64)
    if type_ == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type_[0] == "s":
        return bits.view(SIGNED[width(type_)])
    return bits


def encode(values: Array, type_: str) -> Array:
    """Return the bits of numbers, rounded once to the type if they are more precise."""
    if type_ == "pred":
        return np.asarray(values, dtype=np.bool_)
    if type_ == "bf16":
        bits = _to_bfloat16(values)
    elif is_float(type_):
        bits = values.astype(FLOAT[width(type_)]).view(UNSIGNED[width(type_)])
    else:
        # Both to the integers of the same width and to narrower ones the low bits are kept.
        return values.astype(UNSIGNED[width(type_)])
    if type_ in NAN:
        nan = np.isnan(values)
        if nan.any():
            bits = np.where(nan, bits.dtype.type(NAN[type_]), bits)
    return bits


def pack(low: Array, high: Array) -> Array:
    """Return 32 bits of two halves."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def halves(bits: Array) -> tuple[Array, Array]:
    """Return the low and the high 16 bits."""
    return bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def flush(values: Array) -> Array:
    """Return float32 values with subnormal numbers as zeros of the same sign (``.ftz``)."""
    small = np.abs(values) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), values), values)


def step_to_odd(rounded: Array, error: Array) -> Array:
    """Round to odd what was rounded to nearest, in float32 or float64.

    A number rounded to odd keeps its last bit set where it is not exact, so that rounding it once
    more, to at least two bits less, gives what rounding the exact number would have
    (Boldo & Melquiond: *Emulation of FMA and correctly rounded sums*, 2008).

    Args:
        rounded: Numbers rounded to nearest.
        error: The exact numbers minus ``rounded``; only the sign is used.
    """
    integer = {4: np.int32, 8: np.int64}[rounded.dtype.itemsize]
    bits = rounded.view(integer)
    inexact = np.isfinite(rounded) & (error != 0) & (bits & integer(1) == 0)
    # Away from zero the pattern of bits grows by one, in either sign.
    away = np.where((error > 0) == (rounded > 0), integer(1), integer(-1))
    # A rounded zero has an exact number on the side of its error.
    least = np.finfo(rounded.dtype).smallest_subnormal
    smallest = np.where(error > 0, least, -least).astype(rounded.dtype)
    stepped = np.where(rounded == 0, smallest.view(integer), bits + away)
    return np.where(inexact, stepped, bits).view(rounded.dtype)


def add_to_odd(a: Array, b: Array) -> Array:
    """Return the sum of float64 numbers, rounded to odd."""
    total = a + b
    # The error of a sum is exact (Knuth).
    part = total - a
    error = (a - (total - part)) + (b - part)
    return step_to_odd(total, np.where(np.isnan(error), 0.0, error))


def integers_to_odd(values: Array) -> Array:
    """Return 64-bit integers as float64, rounded to odd."""
    rounded = values.astype(np.float64)
    magnitude = np.where(values < 0, -values, values).astype(np.uint64)
    is_large = magnitude > np.uint64(2**53)
    sticky = (magnitude >> np.uint64(11)) | ((magnitude & np.uint64(2047)) != 0)
    large = np.copysign(sticky.astype(np.float64) * 2048.0, rounded)
    return np.where(is_large, large, rounded)


def _to_bfloat16(values: Array) -> Array:
    if values.dtype == np.float64:
        single = values.astype(np.float32)
        values = step_to_odd(single, values - single)
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
