"""Instructions on floating-point numbers.

float32 instructions that the PTX manual calls approximate (``.approx``, ``div.full``) are rounded
correctly, or computed in float64 and rounded: the hardware may differ by the few units in the last
place that the manual allows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from emulator.instructions.integers import combine
from emulator.instructions.rules import Operation, Rules
from emulator.values import Array, add_to_odd, decode, encode, flush, halves, pack

rules: Rules[Operation] = Rules()

_FLOAT = r"(f16x2|bf16x2|f16|bf16|f32|f64)"


def operation(
    type_: str, count: int, compute: Callable[..., Array], ftz: bool = False, saturate: bool = False
) -> Operation:
    """Return an operation on ``count`` numbers of a type, each half of a pair by itself."""
    element = type_.removesuffix("x2")

    def on_numbers(*numbers: Array) -> Array:
        if ftz and element == "f32":
            numbers = tuple(flush(number) for number in numbers)
        result = compute(*numbers)
        if saturate:
            # NaN becomes zero.
            result = np.where(result > 0, np.minimum(result, 1), 0).astype(result.dtype)
        if ftz and element == "f32":
            result = flush(decode(encode(result, "f32"), "f32"))
        return result

    if element == type_:
        return Operation((type_,) * count, (type_,), on_numbers)

    def on_pairs(*pairs: Array) -> Array:
        results = []
        for each in zip(*(halves(pair) for pair in pairs), strict=True):
            results.append(encode(on_numbers(*(decode(half, element) for half in each)), element))
        return pack(*results)

    return Operation(("b32",) * count, ("b32",), on_pairs)


def _more_precise(type_: str, compute: Callable[..., Array]) -> Callable[..., Array]:
    """Compute with 16-bit numbers in float64, of which the only rounding is that at the end.

    A sum of them may be inexact even there, but float64 has more than twice their digits, so that
    the second rounding does no harm (Figueroa: *When is double rounding innocuous?*, 1995).
    """
    if type_ in ("f32", "f64"):
        return compute
    return lambda *numbers: compute(*(number.astype(np.float64) for number in numbers))


@rules(rf"(add|sub|mul)(?:\.rn)?(\.ftz)?(\.sat)?\.{_FLOAT}")
def _arithmetic(match: re.Match[str]) -> Operation:
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[match[1]]
    type_ = match[4]
    return operation(type_, 2, _more_precise(type_, compute), bool(match[2]), bool(match[3]))


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float32 numbers, such that rounding it to float32 or less is right.

    The product is exact in float64. The sum is rounded to odd where its float32 is not clear.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    return _odd_where_it_matters(total, product, c)


def _odd_where_it_matters(total: Array, product: Array, c: Array) -> Array:
    # Only a float64 halfway between two float32 can be a tie that is none, and only subnormal
    # numbers have their ties elsewhere. A sum that is zero is exact.
    tail = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    unclear = (tail == 0x10000000) | ((np.abs(total) < 2.0**-126) & (total != 0))
    return add_to_odd(product, c) if unclear.any() else total


def _fma_short(a: Array, b: Array, c: Array) -> Array:
    return add_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def fma_double(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float64 numbers with one rounding (Boldo & Melquiond, 2008)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    split = 2.0**27 + 1
    high_a, high_b = (x * split - (x * split - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    product = a * b
    rest = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    sum_low, error_low = _two_sum(c, rest)
    sum_high, error_high = _two_sum(product, sum_low)
    result = sum_high + add_to_odd(error_low, error_high)
    # The parts of the product are exact while nothing over- or underflows.
    magnitudes = [np.abs(x) for x in (a, b, product, c)]
    fits = np.logical_and.reduce(
        [(m < 2.0**990) & ((m > 2.0**-900) | (m == 0)) for m in magnitudes]
    )
    fits &= (product != 0) | (a == 0) | (b == 0)
    # A sum of zeros has the sign that IEEE gives it.
    result = np.where(product == 0, product + c, result)
    if fits.all():
        return result
    result = result.copy()
    for i in zip(*np.nonzero(~fits), strict=True):
        result[i] = _fma_of_fractions(a[i].item(), b[i].item(), c[i].item())
    return result


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _fma_of_fractions(a: float, b: float, c: float) -> float:
    if math.isfinite(a) and math.isfinite(b) and not math.isfinite(c):
        return c  # however large the product is
    if not all(map(math.isfinite, (a, b, c))):
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return float(np.float64(a) * np.float64(b) + np.float64(c)) if c == 0 else 0.0
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


@rules(rf"fma\.rn(\.ftz)?(\.sat)?(\.relu)?\.{_FLOAT}")
def _fused(match: re.Match[str]) -> Operation:
    type_ = match[4]
    compute = {"f32": fma, "f64": fma_double}.get(type_, _fma_short)
    if match[3]:
        if type_ in ("f32", "f64"):
            return None
        return operation(type_, 3, lambda a, b, c: _relu(_fma_short(a, b, c)), bool(match[1]))
    return operation(type_, 3, compute, bool(match[1]), bool(match[2]))


def _relu(values: Array) -> Array:
    # The larger of the value and +0; NaN stays.
    return np.where(values <= 0, values.dtype.type(0), values)


@rules(rf"(min|max)(\.ftz)?(\.NaN)?\.{_FLOAT}")
def _extremum(match: re.Match[str]) -> Operation:
    smaller, keep_nan = match[1] == "min", bool(match[3])

    def compute(a: Array, b: Array) -> Array:
        either = np.isnan(a) | np.isnan(b)
        if smaller:
            # -0 is less than +0.
            first = (a < b) | ((a == b) & np.signbit(a))
        else:
            first = (a > b) | ((a == b) & ~np.signbit(a))
        number = np.where(np.isnan(b) | (first & ~np.isnan(a)), a, b)
        return np.where(either, a.dtype.type(np.nan), number) if keep_nan else number

    return operation(match[4], 2, compute, bool(match[2]))


@rules(rf"(neg|abs)(\.ftz)?\.{_FLOAT}")
def _sign(match: re.Match[str]) -> Operation:
    name, type_ = match[1], match[3]
    if match[2]:
        return operation(type_, 1, np.negative if name == "neg" else np.abs, ftz=True)
    # On bits, so that NaN changes its sign too.
    bits = 32 if type_.endswith("x2") else {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[type_]
    sign = 0x80008000 if type_.endswith("x2") else 1 << (bits - 1)

    def compute(a: Array) -> Array:
        mask = a.dtype.type(sign)
        return a ^ mask if name == "neg" else a & ~mask

    return Operation((f"b{bits}",), (f"b{bits}",), compute)


@rules(r"copysign\.(f32|f64)")
def _copy_sign(match: re.Match[str]) -> Operation:
    # The sign of the first operand goes to the second.
    return operation(match[1], 2, lambda a, b: np.copysign(b, a))


@rules(r"div\.(?:(full|approx|rn)(\.ftz)?\.f32|rn\.f64)")
def _divide(match: re.Match[str]) -> Operation:
    type_ = "f32" if match[1] else "f64"
    return operation(type_, 2, np.divide, bool(match[2]))


@rules(r"(rcp|sqrt)\.(?:approx|rn)(\.ftz)?\.f32")
def _root(match: re.Match[str]) -> Operation:
    compute = np.sqrt if match[1] == "sqrt" else np.reciprocal
    return operation("f32", 1, compute, bool(match[2]))


@rules(r"(rcp|sqrt)\.rn\.f64")
def _root_double(match: re.Match[str]) -> Operation:
    return operation("f64", 1, np.sqrt if match[1] == "sqrt" else np.reciprocal)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@rules(r"(ex2|lg2|sin|cos|rsqrt)\.approx(\.ftz)?\.f32|(tanh)\.approx\.f32")
def _function(match: re.Match[str]) -> Operation:
    function = _FUNCTIONS[match[1] or match[3]]
    # float64 leaves a second rounding, which is far below what the hardware may be off by.
    return operation("f32", 1, lambda x: function(x.astype(np.float64)), bool(match[2]))


@rules(r"(ex2|tanh)\.approx(\.ftz)?\.(f16x2|bf16x2|f16|bf16)")
def _short_function(match: re.Match[str]) -> Operation:
    function = _FUNCTIONS[match[1]]
    return operation(match[3], 1, lambda x: function(x.astype(np.float64)))


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _float_comparison(name: str) -> Callable[[Array, Array], Array]:
    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "ne":  # unlike !=, false of NaN
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name == "neu":
        return np.not_equal
    if name.endswith("u") and name != "neu":
        return lambda a, b: _COMPARISONS[name[:-1]](a, b) | unordered(a, b)
    return _COMPARISONS[name]


_NAMES = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"


@rules(rf"setp\.({_NAMES})(?:\.(and|or|xor))?(\.ftz)?\.(f16|bf16|f32|f64)")
def _compare(match: re.Match[str]) -> Operation:
    compare = _float_comparison(match[1])
    if match[3] and match[4] == "f32":
        exact = compare
        return combine(lambda a, b: exact(flush(a), flush(b)), match[2], "f32")
    return combine(compare, match[2], match[4])


@rules(r"testp\.(finite|infinite|number|notanumber|normal|subnormal)\.(f32|f64)")
def _test(match: re.Match[str]) -> Operation:
    def compute(x: Array) -> Array:
        smallest = np.finfo(x.dtype).smallest_normal
        return {
            "finite": np.isfinite(x),
            "infinite": np.isinf(x),
            "number": ~np.isnan(x),
            "notanumber": np.isnan(x),
            "normal": np.isfinite(x) & (np.abs(x) >= smallest),
            "subnormal": (x != 0) & (np.abs(x) < smallest),
        }[match[1]]

    return Operation((match[2],), ("pred",), compute)
