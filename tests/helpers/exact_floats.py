"""Floating-point formats in exact arithmetic: numbers are fractions, rounded by the definition."""

import math
from fractions import Fraction

import numpy as np

# Bits of the significand with the leading one, exponent of the smallest normal number, bits in all.
FORMATS = {
    "f16": (11, -14, 16),
    "bf16": (8, -126, 16),
    "f32": (24, -126, 32),
    "f64": (53, -1022, 64),
}


def value(bits, format_):
    """The number that bits stand for: a Fraction, or a float for infinities, NaN and -0."""
    precision, smallest, width = FORMATS[format_]
    bits = int(bits)
    sign = -1 if bits >> (width - 1) else 1
    field = bits >> (precision - 1) & (2 ** (width - precision) - 1)
    fraction = bits & (2 ** (precision - 1) - 1)
    if field == 2 ** (width - precision) - 1:
        return math.nan if fraction else sign * math.inf
    if field == 0 and fraction == 0 and sign < 0:
        return -0.0
    significand = fraction + (2 ** (precision - 1) if field else 0)
    return sign * significand * Fraction(2) ** (max(field, 1) - 1 + smallest - (precision - 1))


def rounded(exact, format_, mode="rn"):
    """The bits of a number rounded once: rn, rz, rm or rp."""
    precision, smallest, width = FORMATS[format_]
    infinity = (2 ** (width - precision) - 1) << (precision - 1)
    if isinstance(exact, float):
        if math.isnan(exact):
            return infinity | (2 ** (precision - 1) - 1)  # canonical, sign bit clear
        sign = 1 if math.copysign(1, exact) < 0 else 0
        return sign << (width - 1) | (infinity if math.isinf(exact) else 0)
    sign, magnitude = exact < 0, abs(exact)
    if magnitude == 0:
        return 0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - (precision - 1))
    count, rest = divmod(magnitude, unit)
    count = int(count)
    away = (mode == "rp" and not sign) or (mode == "rm" and sign)
    if (mode == "rn" and (rest * 2 > unit or (rest * 2 == unit and count % 2))) or (away and rest):
        count += 1
    if unit * count >= Fraction(2) ** (1 - smallest + 1):
        # Beyond the largest finite number.
        finite = infinity - 1
        made = infinity if mode == "rn" or away else finite
    else:
        # The patterns of bits count the numbers from zero on.
        made = count + ((max(exponent, smallest) - smallest) << (precision - 1))
    return int(sign) << (width - 1) | made


def flushed(number):
    """A float32 number with subnormal ones as zeros of their sign."""
    if isinstance(number, Fraction) and abs(number) < Fraction(2) ** -126:
        return -0.0 if number < 0 else Fraction(0)
    return number


def _is_special(*numbers):
    return any(isinstance(n, float) and (math.isnan(n) or math.isinf(n)) for n in numbers)


def _exact(number):
    return Fraction(0) if isinstance(number, float) else number


def product(a, b):
    """a * b, with IEEE's rules for zeros, infinities and NaN."""
    if _is_special(a, b) or not (a and b):
        with np.errstate(all="ignore"):
            result = float(np.float64(_sign_of(a)) * np.float64(_sign_of(b)))
        return result if result or math.copysign(1, result) < 0 else Fraction(0)
    return a * b


def _sign_of(number):
    """A float64 that is special where the number is, and 1 or -1 where it is not."""
    if isinstance(number, float) or number == 0:
        return float(number)
    return 1.0 if number > 0 else -1.0


def total(a, b):
    """a + b, likewise."""
    if _is_special(a, b):
        with np.errstate(all="ignore"):
            return float(np.float64(_sign_of(a)) + np.float64(_sign_of(b)))
    result = _exact(a) + _exact(b)
    if result == 0:
        both_negative = all(isinstance(n, float) for n in (a, b))
        return -0.0 if both_negative else Fraction(0)
    return result


def edges(format_, random=40, seed=0):
    """Bits of zeros, subnormal numbers, ones, the largest, infinities, NaN, and random ones."""
    precision, _, width = FORMATS[format_]
    infinity = (2 ** (width - precision) - 1) << (precision - 1)
    one = (infinity >> 1) & ~(2 ** (precision - 1) - 1)
    small = [0, 1, 2, 2 ** (precision - 1) - 1, 2 ** (precision - 1)]
    positive = [*small, one - 1, one, one + 1, infinity - 1, infinity, infinity + 1]
    negative = [pattern | 1 << (width - 1) for pattern in positive]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 2**width - 1, random, dtype=np.uint64)
    near_one = one + generator.integers(-(2**precision), 2**precision, random)
    patterns = np.array([*positive, *negative], dtype=np.uint64)
    patterns = np.concatenate([patterns, drawn, near_one.astype(np.uint64)])
    return patterns.astype({16: np.uint16, 32: np.uint32, 64: np.uint64}[width])
