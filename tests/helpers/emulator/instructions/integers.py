"""Instructions on integers, bits and predicates."""

from __future__ import annotations

import re

import numpy as np

from emulator.instructions.rules import Operation, Rules
from emulator.values import SIGNED, UNSIGNED, Array, encode, width

rules: Rules[Operation] = Rules()

_INT = "([us])(16|32|64)"


def _unsigned(bits: int) -> str:
    return f"u{bits}"


def _numpy(type_: str) -> type:
    return (SIGNED if type_[0] == "s" else UNSIGNED)[width(type_)]


@rules(rf"(add|sub)\.{_INT}")
def _add(match: re.Match[str]) -> Operation:
    type_ = _unsigned(int(match[3]))
    compute = np.add if match[1] == "add" else np.subtract
    return Operation((type_, type_), (type_,), compute)


@rules(r"(add|sub)\.sat\.s32")
def _add_saturated(match: re.Match[str]) -> Operation:
    sign = 1 if match[1] == "add" else -1

    def compute(a: Array, b: Array) -> Array:
        return np.clip(a.astype(np.int64) + sign * b.astype(np.int64), -(2**31), 2**31 - 1)

    return Operation(("s32", "s32"), ("s32",), compute)


def high_half(a: Array, b: Array) -> Array:
    """Return the high 64 bits of the products of 64-bit integers, signed or not."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low = (x & mask) * (y & mask)
    middle_1 = (x >> half) * (y & mask) + (low >> half)
    middle_2 = (x & mask) * (y >> half) + (middle_1 & mask)
    high = (x >> half) * (y >> half) + (middle_1 >> half) + (middle_2 >> half)
    if a.dtype == np.int64:
        # As unsigned numbers negative ones are too large by 2**64.
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high


def _product(part: str, type_: str) -> tuple[str, object]:
    """Return the type of a product and the function that computes it."""
    bits = width(type_)
    if part == "lo":
        # The low half is the same for signed numbers.
        return _unsigned(bits), lambda a, b: encode(a, _unsigned(bits)) * encode(b, _unsigned(bits))
    if part == "hi" and bits == 64:
        return type_, high_half
    wide = _numpy(f"{type_[0]}{2 * bits}")

    def full(a: Array, b: Array) -> Array:
        product = a.astype(wide) * b.astype(wide)
        return product if part == "wide" else product >> product.dtype.type(bits)

    return (f"{type_[0]}{2 * bits}" if part == "wide" else type_), full


@rules(rf"mul\.(lo|hi|wide)\.{_INT}")
def _multiply(match: re.Match[str]) -> Operation | None:
    part, type_ = match[1], match[2] + match[3]
    if part == "wide" and match[3] == "64":
        return None
    result, compute = _product(part, type_)
    return Operation((type_, type_), (result,), compute)


@rules(rf"mad\.(lo|hi|wide)\.{_INT}")
def _multiply_add(match: re.Match[str]) -> Operation | None:
    part, type_ = match[1], match[2] + match[3]
    if part == "wide" and match[3] == "64":
        return None
    result, product = _product(part, type_)
    unsigned = _unsigned(width(result))

    def compute(a: Array, b: Array, c: Array) -> Array:
        return encode(product(a, b), unsigned) + c

    return Operation((type_, type_, unsigned), (unsigned,), compute)


@rules(rf"(div|rem)\.{_INT}")
def _divide(match: re.Match[str]) -> Operation:
    type_ = match[2] + match[3]

    def quotient(a: Array, b: Array) -> Array:
        # What division by zero gives is up to the machine; this one sets all bits.
        one = b.dtype.type(1)
        divisor = np.where(b == 0, one, b)
        toward_zero = a // divisor
        if type_[0] == "s":
            inexact = toward_zero * divisor != a
            toward_zero = toward_zero + (inexact & ((a < 0) != (divisor < 0)))
        return np.where(b == 0, ~np.zeros_like(b), toward_zero)

    def remainder(a: Array, b: Array) -> Array:
        return np.where(b == 0, a, a - quotient(a, b) * b)

    return Operation((type_, type_), (type_,), quotient if match[1] == "div" else remainder)


@rules(rf"(min|max)\.{_INT}")
def _extremum(match: re.Match[str]) -> Operation:
    type_ = match[2] + match[3]
    compute = np.minimum if match[1] == "min" else np.maximum
    return Operation((type_, type_), (type_,), compute)


@rules(r"(neg|abs)\.(s16|s32|s64)")
def _negate(match: re.Match[str]) -> Operation:
    compute = np.negative if match[1] == "neg" else np.abs
    return Operation((match[2],), (match[2],), compute)


@rules(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _logic(match: re.Match[str]) -> Operation:
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[match[1]]
    return Operation((match[2], match[2]), (match[2],), compute)


@rules(r"not\.(pred|b16|b32|b64)")
def _not(match: re.Match[str]) -> Operation:
    return Operation((match[1],), (match[1],), np.invert)


@rules(r"(shl|shr)\.([bus])(16|32|64)")
def _shift(match: re.Match[str]) -> Operation | None:
    name, bits = match[1], int(match[3])
    if name == "shl" and match[2] != "b":
        return None
    type_ = match[2] + match[3]

    def compute(a: Array, amount: Array) -> Array:
        # Shifts by more than the width are by the width.
        count = np.minimum(amount, np.uint32(bits - 1)).astype(a.dtype)
        shifted = a << count if name == "shl" else a >> count
        if type_[0] == "s":
            return shifted
        return np.where(amount >= bits, a.dtype.type(0), shifted)

    return Operation((type_, "u32"), (type_,), compute)


@rules(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def _funnel_shift(match: re.Match[str]) -> Operation:
    left, wrap = match[1] == "l", match[2] == "wrap"

    def compute(a: Array, b: Array, amount: Array) -> Array:
        count = amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        count = count.astype(np.uint64)
        return (both << count) >> np.uint64(32) if left else both >> count

    return Operation(("b32", "b32", "u32"), ("b32",), compute)


@rules(r"bfe\.([us])(32|64)")
def _extract_field(match: re.Match[str]) -> Operation:
    type_, bits = match[1] + match[2], int(match[2])
    word = UNSIGNED[bits]

    def compute(a: Array, position: Array, length: Array) -> Array:
        position, length = position & np.uint32(255), length & np.uint32(255)
        raw = encode(a, _unsigned(bits))
        low = np.minimum(position, np.uint32(bits - 1)).astype(word)
        field = np.where(position < bits, raw >> low, word(0))
        kept = _ones(length, bits)
        field = field & kept
        if match[1] == "u":
            return field
        # The sign is the last bit of the field, or of the number where the field goes beyond it.
        last = np.minimum(position.astype(np.int64) + length - 1, bits - 1)
        sign = (raw >> np.maximum(last, 0).astype(word)) & word(1)
        return np.where((length > 0) & (sign == 1), _extend(field, position, length, bits), field)

    return Operation((type_, "u32", "u32"), (_unsigned(bits),), compute)


def _ones(length: Array, bits: int) -> Array:
    """Return words whose last ``length`` bits are set."""
    word = UNSIGNED[bits]
    count = np.minimum(length, np.uint32(bits - 1)).astype(word)
    return np.where(length >= bits, ~word(0), (word(1) << count) - word(1))


def _extend(field: Array, position: Array, length: Array, bits: int) -> Array:
    """Set the bits above a field, which ends at the end of the word at the latest."""
    inside = np.clip(bits - position.astype(np.int64), 0, bits)
    return field | ~_ones(np.minimum(length, inside).astype(np.uint32), bits)


@rules(r"bfi\.b(32|64)")
def _insert_field(match: re.Match[str]) -> Operation:
    bits, type_ = int(match[1]), f"b{match[1]}"
    word = UNSIGNED[bits]

    def compute(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = position & np.uint32(255), length & np.uint32(255)
        low = np.minimum(position, np.uint32(bits - 1)).astype(word)
        mask = np.where(position < bits, _ones(length, bits) << low, word(0))
        return (b & ~mask) | ((a << low) & mask)

    return Operation((type_, type_, "u32", "u32"), (type_,), compute)


@rules(r"bfind(\.shiftamt)?\.u32")
def _find_first(match: re.Match[str]) -> Operation:
    def compute(a: Array) -> Array:
        # The exponent of a float64 is the number of the highest bit.
        highest = np.frexp(a.astype(np.float64))[1] - 1
        found = 31 - highest if match[1] else highest
        return np.where(a == 0, np.int64(-1), found)

    return Operation(("u32",), ("u32",), compute)


@rules(r"(clz|popc|brev)\.b(32|64)")
def _count(match: re.Match[str]) -> Operation:
    name, bits = match[1], int(match[2])

    def compute(a: Array) -> Array:
        as_bytes = np.ascontiguousarray(a.astype(a.dtype.newbyteorder(">"))).view(np.uint8)
        each = np.unpackbits(as_bytes.reshape(*a.shape, bits // 8), axis=-1)
        if name == "popc":
            return each.sum(axis=-1)
        if name == "clz":
            return np.where(each.any(axis=-1), each.argmax(axis=-1), bits)
        packed = np.packbits(each[..., ::-1], axis=-1)
        return np.ascontiguousarray(packed).view(a.dtype.newbyteorder(">"))[..., 0].astype(a.dtype)

    result = f"b{bits}" if name == "brev" else "u32"
    return Operation((f"b{bits}",), (result,), compute)


@rules(r"prmt\.b32")
def _permute_bytes(_: re.Match[str]) -> Operation:
    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        result = np.uint32(0)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            place = ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = ((both >> place) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
            byte = np.where(choice >= 8, sign, byte)
            result = result | (byte << np.uint32(8 * i))
        return result

    return Operation(("b32", "b32", "b32"), ("b32",), compute)


@rules(r"lop3\.b32")
def _logic_of_three(_: re.Match[str]) -> Operation:
    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        # Bit 4 a + 2 b + c of the table is the result for these bits.
        result = np.uint32(0)
        for i in range(8):
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            wanted = (table >> np.uint32(i)) & np.uint32(1)
            result = result | np.where(wanted == 1, term, np.uint32(0))
        return result

    return Operation(("b32", "b32", "b32", "u32"), ("b32",), compute)


@rules(r"selp\.(?:[busf](16|32|64))")
def _select(match: re.Match[str]) -> Operation:
    type_ = f"b{match[1]}"

    def compute(a: Array, b: Array, predicate: Array) -> Array:
        return np.where(predicate, a, b)

    return Operation((type_, type_, "pred"), (type_,), compute)


_INTEGER_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "lo": np.less,
    "le": np.less_equal,
    "ls": np.less_equal,
    "gt": np.greater,
    "hi": np.greater,
    "ge": np.greater_equal,
    "hs": np.greater_equal,
}


def combine(compare: object, how: str | None, source: str) -> Operation:
    """Return a comparison, or one whose result and its opposite are joined with a predicate."""
    if how is None:
        return Operation((source, source), ("pred", "pred"), lambda a, b: _pair(compare(a, b)))
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[how]

    def compute(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        first, second = _pair(compare(a, b))
        return join(first, c), join(second, c)

    return Operation((source, source, "pred"), ("pred", "pred"), compute)


def _pair(result: Array) -> tuple[Array, Array]:
    return result, np.logical_not(result)


@rules(r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)(?:\.(and|or|xor))?\.([bus])(16|32|64)")
def _compare(match: re.Match[str]) -> Operation | None:
    name, how, kind = match[1], match[2], match[3]
    unsigned_only, signs_only = name in ("lo", "ls", "hi", "hs"), name in ("lt", "le", "gt", "ge")
    if (kind == "b" and (unsigned_only or signs_only)) or (kind == "s" and unsigned_only):
        return None
    return combine(_INTEGER_COMPARISONS[name], how, kind + match[4])
