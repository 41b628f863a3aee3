"""``cvt`` and its many roundings."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from emulator.instructions.rules import Operation, Rules
from emulator.values import (
    SIGNED,
    UNSIGNED,
    Array,
    decode,
    encode,
    flush,
    integers_to_odd,
    pack,
    width,
)

rules: Rules[Operation] = Rules()

_TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_INTEGER = r"[us](?:8|16|32|64)"
_FLOAT = r"f16|bf16|f32|f64"


@rules(rf"cvt(\.sat)?\.({_INTEGER})\.({_INTEGER})")
def _integers(match: re.Match[str]) -> Operation:
    saturate, result, source = match.groups()

    def compute(a: Array) -> Array:
        return _saturated(a, result) if saturate else a

    return Operation((source,), (result,), compute)


def _limits(type_: str) -> tuple[int, int]:
    info = np.iinfo((SIGNED if type_[0] == "s" else UNSIGNED)[width(type_)])
    return int(info.min), int(info.max)


def _saturated(a: Array, type_: str) -> Array:
    (low, high), (least, most) = (
        _limits(type_),
        _limits(f"{a.dtype.kind.replace('i', 's')}{a.itemsize * 8}"),
    )
    return np.clip(a, max(low, least), min(high, most))


@rules(rf"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?(?:\.sat)?\.({_INTEGER})\.({_FLOAT})")
def _float_to_integer(match: re.Match[str]) -> Operation:
    rounding, ftz, result, source = match.groups()
    low, high = _limits(result)
    bits = width(result)
    numpy_type = (SIGNED if result[0] == "s" else UNSIGNED)[bits]
    # What the manual says of NaN.
    of_nan = 0 if source != "f64" and bits != 64 else 1 << (bits - 1)

    def compute(a: Array) -> Array:
        a = flush(a) if ftz and source == "f32" else a
        rounded = _TO_INTEGER[rounding](a.astype(np.float64))
        below, above, nan = rounded <= low, rounded >= high, np.isnan(rounded)
        inside = np.where(below | above | nan, 0, rounded).astype(numpy_type)
        number = np.where(below, numpy_type(low), np.where(above, numpy_type(high), inside))
        return np.where(nan, np.array(of_nan, np.uint64).astype(numpy_type), number)

    return Operation((source,), (result,), compute)


@rules(rf"cvt\.(rn|rz|rm|rp)\.({_FLOAT})\.({_INTEGER})")
def _integer_to_float(match: re.Match[str]) -> Operation:
    rounding, result, source = match.groups()
    bits = width(source)

    def compute(a: Array) -> Array:
        if rounding == "rn":
            if result == "f64":
                return a.astype(np.float64)
            return integers_to_odd(a) if bits == 64 else a.astype(np.float64)
        exact = a.astype(np.float64) if bits < 64 else integers_to_odd(a)
        if result == "f64" and bits < 64:
            return exact
        return _directed(exact, result, rounding)

    return Operation((source,), (result,), compute)


def _directed(exact: Array, type_: str, rounding: str) -> Array:
    """Round float64 numbers toward zero (rz), down (rm) or up (rp)."""
    if type_ == "f64":
        raise ValueError("float64 is not rounded from float64")
    nearest = encode(exact, type_)
    value = decode(nearest, type_).astype(np.float64)
    too_high, too_low = value > exact, value < exact
    if rounding == "rz":
        too_high, too_low = too_high & (exact > 0), too_low & (exact < 0)
    elif rounding == "rm":
        too_low = np.zeros_like(too_low)
    else:
        too_high = np.zeros_like(too_high)
    # A step in the order of numbers is one of the bits, of which those of negative ones run down.
    one = nearest.dtype.type(1)
    magnitude_down = (too_high & (value > 0)) | (too_low & (value < 0))
    magnitude_up = (too_high & (value < 0)) | (too_low & (value > 0))
    bits = np.where(magnitude_down, nearest - one, np.where(magnitude_up, nearest + one, nearest))
    smallest = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149}[type_]
    from_zero = np.where(too_high, -smallest, smallest)
    bits = np.where((value == 0) & (too_high | too_low), encode(from_zero, type_), bits)
    return decode(bits, type_)


@rules(rf"cvt(?:\.(rn|rz|rm|rp|rni|rzi|rmi|rpi))?(\.ftz)?(\.sat)?\.({_FLOAT})\.({_FLOAT})")
def _float_to_float(match: re.Match[str]) -> Operation | None:
    rounding, ftz, saturate, result, source = match.groups()
    if rounding in ("rz", "rm", "rp") and result == "f64":
        return None

    def compute(a: Array) -> Array:
        a = flush(a) if ftz and source == "f32" else a
        if rounding in _TO_INTEGER:
            a = _TO_INTEGER[rounding](a)
        elif rounding in ("rz", "rm", "rp"):
            a = _directed(a.astype(np.float64), result, rounding)
        if saturate:
            a = np.where(a > 0, np.minimum(a, 1), 0).astype(a.dtype)
        if ftz and result == "f32":
            a = flush(decode(encode(a, "f32"), "f32"))
        return a

    return Operation((source,), (result,), compute)


@rules(r"cvt\.(rn|rz)(\.relu)?\.(f16x2|bf16x2)\.f32")
def _pair(match: re.Match[str]) -> Operation:
    rounding, relu, result = match.groups()
    element = result.removesuffix("x2")

    def half(a: Array) -> Array:
        if relu:
            a = np.where(a <= 0, np.float32(0), a)
        if rounding == "rz":
            a = _directed(a.astype(np.float64), element, rounding)
        return encode(a, element)

    # The first operand becomes the upper half.
    return Operation(("f32", "f32"), ("b32",), lambda high, low: pack(half(low), half(high)))


@rules(r"cvt\.(rna|rn|rz)\.tf32\.f32")
def _tf32(match: re.Match[str]) -> Operation:
    def compute(bits: Array) -> Array:
        unit = np.uint32(1 << 13)
        half = np.uint32(1 << 12)
        if match[1] == "rz":
            rounded = bits
        elif match[1] == "rna":
            rounded = bits + half
        else:
            rounded = bits + (half - np.uint32(1)) + ((bits >> np.uint32(13)) & np.uint32(1))
        finite = (bits & np.uint32(0x7F800000)) != 0x7F800000
        nan = ~finite & ((bits & np.uint32(0x7FFFFF)) != 0)
        kept = np.where(finite, rounded, bits) & ~(unit - np.uint32(1))
        return np.where(nan, np.uint32(0x7FFFFFFF), kept)

    return Operation(("b32",), ("b32",), compute)
