"""Instructions on floating-point numbers against exact fractions that are rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from exact_floats import FORMATS, edges, flushed, product, rounded, total, value
from ptx_snippets import evaluate

REGISTER = {"f16": "h", "bf16": "h", "f32": "w", "f64": "l"}
TYPES = list(FORMATS)


def pairs(format_):
    bits = edges(format_, 8)
    a, b = np.meshgrid(bits, bits)
    return a.ravel(), b.ravel()


def is_nan(number):
    return isinstance(number, float) and math.isnan(number)


def check(opcode, format_, compute, *sources, flush=False):
    """Compare with ``compute`` of exact numbers; NaN of float64 may have any payload."""
    register, width = REGISTER[format_], FORMATS[format_][2]
    names = ", ".join(f"%{register}{i}" for i in range(1, len(sources) + 1))
    made = evaluate(f"{opcode} %{register}0, {names};", width, *sources)
    for result, *operands in zip(made, *sources, strict=True):
        numbers = [value(bits, format_) for bits in operands]
        if flush:
            numbers = [flushed(number) for number in numbers]
        exact = compute(*numbers)
        if format_ == "f64" and is_nan(exact):
            assert is_nan(value(result, format_)), (opcode, numbers)
            continue
        expected = rounded(exact, format_)
        if flush:
            expected = rounded(flushed(value(expected, format_)), format_)
        assert int(result) == expected, (opcode, numbers, hex(result), hex(expected))


def negative(number):
    if isinstance(number, float):
        return -number if number else Fraction(0)
    return -number if number else -0.0


@pytest.mark.parametrize("format_", TYPES)
def test_sums_and_products(format_):
    a, b = pairs(format_)
    check(f"add.{format_}", format_, total, a, b)
    check(f"sub.{format_}", format_, lambda x, y: total(x, negative(y)), a, b)
    check(f"mul.{format_}", format_, product, a, b)
    if format_ == "f32":
        check("add.rn.f32", format_, total, a, b)
        check("add.ftz.f32", format_, total, a, b, flush=True)
        check("mul.ftz.f32", format_, product, a, b, flush=True)


@pytest.mark.parametrize("format_", TYPES)
def test_fused_products_and_sums(format_):
    a, b = pairs(format_)
    generator = np.random.default_rng(1)
    c = generator.permutation(a)
    check(f"fma.rn.{format_}", format_, lambda x, y, z: total(product(x, y), z), a, b, c)
    # Sums that nearly cancel, for which the product's low bits matter.
    near = edges(format_, 60, seed=2)[-60:]
    x, y = near, near[::-1]
    cancelling = np.array(
        [
            rounded(negative(product(value(p, format_), value(q, format_))), format_)
            for p, q in zip(x, y, strict=True)
        ],
        x.dtype,
    )
    check(f"fma.rn.{format_}", format_, lambda x, y, z: total(product(x, y), z), x, y, cancelling)
    if format_ == "f32":
        check(
            "fma.rn.ftz.f32", format_, lambda x, y, z: total(product(x, y), z), a, b, c, flush=True
        )


def test_a_fused_sum_is_rounded_once():
    """(1 + 2**-12)**2 is a tie of float32; a part too small for float64 decides it."""
    factor = rounded(1 + Fraction(2) ** -12, "f32")
    for sign in (0, 0x80000000):
        a = np.full(2, factor | sign, np.uint32)
        b = np.full(2, factor, np.uint32)
        c = np.array([rounded(Fraction(s) * Fraction(2) ** -80, "f32") for s in (1, -1)], np.uint32)
        check("fma.rn.f32", "f32", lambda x, y, z: total(product(x, y), z), a, b, c)
    made = evaluate("fma.rn.f32 %w0, %w1, %w2, %w3;", 32, b, b, c)
    assert int(made[0]) - int(made[1]) == 1


def test_a_fused_sum_is_rounded_once_among_subnormal_numbers():
    """A product just below half of the least number, and a sum whose ties are not at bit 24."""
    unit = Fraction(2) ** -75
    factors = (unit * (1 + Fraction(2) ** -23), unit * (1 - Fraction(2) ** -23))
    a, b = (np.array([rounded(factor, "f32")], np.uint32) for factor in factors)
    c = np.array([rounded(Fraction(2) ** -127 + Fraction(2) ** -149, "f32")], np.uint32)
    made = evaluate("fma.rn.f32 %w0, %w1, %w2, %w3;", 32, a, b, c)
    assert int(made[0]) == int(c[0])
    check("fma.rn.f32", "f32", lambda x, y, z: total(product(x, y), z), a, b, c)


@pytest.mark.parametrize("format_", ["f16", "bf16"])
def test_pairs_are_two_numbers(format_):
    a, b = pairs(format_)
    c = a[::-1]
    as_words = [np.ascontiguousarray(x[: len(x) // 2 * 2]).view(np.uint32) for x in (a, b, c)]
    for opcode, count in (("add", 2), ("mul", 2), ("fma.rn", 3), ("max", 2), ("min.NaN", 2)):
        halves = ", ".join(f"%h{i}" for i in range(1, count + 1))
        words = ", ".join(f"%w{i}" for i in range(1, count + 1))
        single = evaluate(f"{opcode}.{format_} %h0, {halves};", 16, *(a, b, c)[:count])
        double = evaluate(f"{opcode}.{format_}x2 %w0, {words};", 32, *as_words[:count])
        np.testing.assert_array_equal(double.view(np.uint16), single[: len(a) // 2 * 2])


@pytest.mark.parametrize("format_", TYPES)
@pytest.mark.parametrize("keep", [False, True])
def test_the_smaller_and_the_larger(format_, keep):
    if keep and format_ == "f64":
        return  # there is no such instruction

    def pick(choose):
        def compute(x, y):
            if is_nan(x) or is_nan(y):
                return math.nan if keep or (is_nan(x) and is_nan(y)) else (y if is_nan(x) else x)
            # -0 is less than +0.
            return choose((x, y), key=lambda n: (n, not isinstance(n, float) or n > 0))

        return compute

    a, b = pairs(format_)
    suffix = ".NaN" if keep else ""
    check(f"min{suffix}.{format_}", format_, pick(min), a, b)
    check(f"max{suffix}.{format_}", format_, pick(max), a, b)


@pytest.mark.parametrize("format_", TYPES)
def test_signs(format_):
    bits = edges(format_)
    register, width = REGISTER[format_], FORMATS[format_][2]
    sign = bits.dtype.type(1 << (width - 1))
    made = evaluate(f"neg.{format_} %{register}0, %{register}1;", width, bits)
    np.testing.assert_array_equal(made, bits ^ sign)
    made = evaluate(f"abs.{format_} %{register}0, %{register}1;", width, bits)
    np.testing.assert_array_equal(made, bits & ~sign)


@pytest.mark.parametrize("format_", ["f32", "f64"])
def test_quotients_and_roots(format_):
    a, b = pairs(format_)

    def quotient(x, y):
        special = any(isinstance(n, float) or n == 0 for n in (x, y))
        if not special:
            return x / y
        with np.errstate(all="ignore"):
            made = float(np.float64(float_or_sign(x)) / np.float64(float_or_sign(y)))
        return made if made or math.copysign(1, made) < 0 else Fraction(0)

    check(f"div.rn.{format_}", format_, quotient, a, b)
    bits = edges(format_)
    check(f"rcp.rn.{format_}", format_, lambda x: quotient(Fraction(1), x), bits)
    register, width = REGISTER[format_], FORMATS[format_][2]
    roots = evaluate(f"sqrt.rn.{format_} %{register}0, %{register}1;", width, bits)
    for root, pattern in zip(roots, bits, strict=True):
        x, r = value(pattern, format_), value(root, format_)
        if is_nan(x) or (x < 0):
            assert is_nan(r)
        elif x in (0, math.inf):
            assert int(root) == int(pattern)
        else:
            # No neighbour is nearer: (r - ulp/2)**2 < x < (r + ulp/2)**2.
            above, below = value(root + 1, format_), value(root - 1, format_)
            assert ((r + below) / 2) ** 2 <= x <= ((r + above) / 2) ** 2


def float_or_sign(number):
    if isinstance(number, float):
        return number
    return 0.0 if number == 0 else (1.0 if number > 0 else -1.0)


@pytest.mark.parametrize(
    ("opcode", "function", "ulps"),
    # The largest errors that the manual states, in float32's last place of the result.
    [
        ("ex2.approx.f32", lambda x: 2.0**x, 2),
        ("sqrt.approx.f32", math.sqrt, 1),
        ("rsqrt.approx.f32", lambda x: x**-0.5, 2),
        ("rcp.approx.f32", lambda x: 1 / x, 1),
        ("lg2.approx.f32", math.log2, 2),
        ("sin.approx.f32", math.sin, 4),
        ("cos.approx.f32", math.cos, 4),
        ("tanh.approx.f32", math.tanh, 4),
    ],
)
def test_functions_that_the_hardware_approximates(opcode, function, ulps):
    x = np.linspace(0.01, 3, 200).astype(np.float32)
    made = evaluate(f"{opcode} %w0, %w1;", 32, x.view(np.uint32)).view(np.float32)
    exact = np.array([function(float(v)) for v in x])
    assert (np.abs(made - exact) <= ulps * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_approximate_functions_flush_subnormal_numbers():
    small = np.array([1, 0x80000001], np.uint32)
    made = evaluate("rcp.approx.ftz.f32 %w0, %w1;", 32, small)
    assert [hex(x) for x in made] == ["0x7f800000", "0xff800000"]
    made = evaluate("div.full.ftz.f32 %w0, %w1, %w1;", 32, small)
    assert [hex(x) for x in made] == ["0x7fffffff", "0x7fffffff"]
    made = evaluate(
        "ex2.approx.ftz.f32 %w0, %w1;", 32, np.array([0xC3020000], np.uint32)
    )  # 2**-130
    assert int(made[0]) == 0


ORDERED = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.mark.parametrize("format_", TYPES)
def test_comparisons(format_):
    bits = edges(format_, 4)
    a, b = (x.ravel() for x in np.meshgrid(bits, bits))
    register = REGISTER[format_]
    numbers = [(value(x, format_), value(y, format_)) for x, y in zip(a, b, strict=True)]
    unordered = np.array([is_nan(x) or is_nan(y) for x, y in numbers])
    cases = {"nan": unordered, "num": ~unordered}
    for name, compare in ORDERED.items():
        truth = np.array([compare(x, y) for x, y in numbers])
        cases[name] = truth & ~unordered
        cases[f"{name}u"] = truth | unordered
    for name, expected in cases.items():
        made = evaluate(f"setp.{name}.{format_} %p0, %{register}1, %{register}2;", 1, a, b)
        np.testing.assert_array_equal(made.astype(bool), expected, err_msg=name)


def test_saturation():
    bits = edges("f32")
    made = evaluate("add.sat.f32 %w0, %w1, 0f00000000;", 32, bits)
    for result, pattern in zip(made, bits, strict=True):
        number = value(pattern, "f32")
        clamped = Fraction(0) if is_nan(number) else min(max(number, Fraction(0)), Fraction(1))
        assert int(result) == rounded(clamped or Fraction(0), "f32")


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("result", TYPES)
def test_conversions_between_formats(source, result):
    bits = edges(source, 60)
    # Numbers around the ties of the result.
    if FORMATS[source][0] > FORMATS[result][0]:
        half = 1 << (FORMATS[source][0] - FORMATS[result][0] - 1)
        one = int(edges(source, 0)[6]) & ~(2 * half - 1)
        ties = [one + half * k + d for k in range(1, 8) for d in (-1, 0, 1)]
        bits = np.concatenate([bits, np.array(ties, bits.dtype)])
    registers = f"%{REGISTER[result]}0, %{REGISTER[source]}1"
    width = FORMATS[result][2]
    for mode in ("rn", "rz", "rm", "rp"):
        widens = (
            FORMATS[result][0] >= FORMATS[source][0] and FORMATS[result][1] <= FORMATS[source][1]
        )
        if widens and mode != "rn":
            continue
        rounding = "" if widens else f".{mode}"
        made = evaluate(f"cvt{rounding}.{result}.{source} {registers};", width, bits)
        for one, pattern in zip(made, bits, strict=True):
            number = value(pattern, source)
            if is_nan(number) and result == "f64":
                assert is_nan(value(one, result))
            else:
                assert int(one) == rounded(number, result, mode), (mode, hex(pattern))


@pytest.mark.parametrize("format_", ["f16", "bf16"])
def test_pairs_take_the_first_operand_as_their_upper_half(format_):
    bits = edges("f32", 60)
    made = evaluate(f"cvt.rn.{format_}x2.f32 %w0, %w1, %w2;", 32, bits, bits[::-1])
    low, high = made.astype(np.uint16), (made >> np.uint32(16)).astype(np.uint16)
    expected = [rounded(value(pattern, "f32"), format_) for pattern in bits]
    np.testing.assert_array_equal(high, expected)
    np.testing.assert_array_equal(low, expected[::-1])


@pytest.mark.parametrize("mode", ["rn", "rna"])
def test_tf32(mode):
    bits = edges("f32", 100)
    bits = np.concatenate([bits, np.arange(0x3F800000, 0x3F800000 + 2**16, 2**11, np.uint32)])
    made = evaluate(f"cvt.{mode}.tf32.f32 %w0, %w1;", 32, bits)
    for one, pattern in zip(made, bits, strict=True):
        number = value(pattern, "f32")
        if isinstance(number, float):
            assert int(one) == (0x7FFFFFFF if is_nan(number) else int(pattern))
            continue
        # The patterns of bits count the numbers, and every 2**13th is one of tf32.
        steps, rest = divmod(int(pattern) & 0x7FFFFFFF, 2**13)
        up = rest > 2**12 or (rest == 2**12 and (mode == "rna" or steps % 2))
        assert int(one) == (int(pattern) & 0x80000000) | (steps + up) * 2**13


TO_INTEGER = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", TO_INTEGER)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("result", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_conversions_to_integers(mode, source, result):
    bits = edges(source, 60)
    out = int(result[1:])
    low, high = (-(2 ** (out - 1)), 2 ** (out - 1) - 1) if result[0] == "s" else (0, 2**out - 1)
    small = [rounded(Fraction(n, 4), source) for n in range(-14, 15)]
    large = [
        rounded(Fraction(n), source)
        for n in (2**31, 2**31 - 1, 2**32, -(2**31) - 1, 2**63, -(2**63))
    ]
    bits = np.concatenate([bits, np.array(small + large, bits.dtype)])
    registers = f"%{ {16: 'h', 32: 'w', 64: 'l'}[out] }0, %{REGISTER[source]}1"
    made = evaluate(f"cvt.{mode}.{result}.{source} {registers};", out, bits)
    for one, pattern in zip(made, bits, strict=True):
        number = value(pattern, source)
        if is_nan(number):
            expected = 0 if source != "f64" and out != 64 else 2 ** (out - 1)
        elif isinstance(number, float) and math.isinf(number):
            expected = high if number > 0 else low
        else:
            expected = max(low, min(high, TO_INTEGER[mode](Fraction(number))))
        assert int(one) == expected % 2**out, number


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("result", TYPES)
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_conversions_from_integers(source, result, mode):
    width = int(source[1:])
    precision = FORMATS[result][0]
    if result == "f64" and width == 64 and mode != "rn":
        return  # not emulated, and refused
    numbers = [0, 1, 2**width - 1, 2 ** (width - 1), 2 ** (width - 1) - 1]
    if width > precision:
        tie = 2**precision + 1
        numbers += [(tie << k) + d for k in range(0, width - precision - 1, 3) for d in (-1, 0, 1)]
    numbers += [
        int(x) for x in np.random.default_rng(0).integers(0, 2**width - 1, 60, dtype=np.uint64)
    ]
    bits = np.array(
        [n % 2**width for n in numbers], {16: np.uint16, 32: np.uint32, 64: np.uint64}[width]
    )
    registers = f"%{REGISTER[result]}0, %{ {16: 'h', 32: 'w', 64: 'l'}[width] }1"
    made = evaluate(f"cvt.{mode}.{result}.{source} {registers};", FORMATS[result][2], bits)
    for one, pattern in zip(made, bits, strict=True):
        number = int(pattern)
        if source[0] == "s" and number >= 2 ** (width - 1):
            number -= 2**width
        assert int(one) == rounded(Fraction(number), result, mode), number


def test_rounding_to_whole_numbers():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.7, 3.2], np.float32)
    for mode, expected in (("rni", [0, 2, 2, -0.0, -2, 3]), ("rmi", [0, 1, 2, -1, -2, 3])):
        made = evaluate(f"cvt.{mode}.f32.f32 %w0, %w1;", 32, x.view(np.uint32)).view(np.float32)
        np.testing.assert_array_equal(made, np.array(expected, np.float32))
