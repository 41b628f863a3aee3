"""Every kernel as it is compiled for each type, alignment and shape, against its reference.

Triton compiles a kernel anew for each type, for pointers that are multiples of 16, and for numbers
that are 1 or multiples of 16. The interpreter sees none of this, and rounds to bfloat16 wrongly.
"""

import importlib
import math

import numpy as np
import numpy_contract
import pytest
import torch

moments = importlib.import_module("hessdiag.kernels.probe_moments")
loss = importlib.import_module("hessdiag.kernels.ocm_loss")
normals = importlib.import_module("hessdiag.kernels.normal")
signs = importlib.import_module("hessdiag.kernels.rademacher")
steps = importlib.import_module("hessdiag.kernels.gaussian_step")

SEED = 2**63 - 25
# Below and beyond int32, up to the last counter.
OFFSETS = [(0, 0), (13, 2**31 - 2), (2**31 - 3, 2**31), (2**32 - 64, 2**32 - 8)]
DIGITS = {torch.bfloat16: 7, torch.float16: 10}  # after the first one

# Probes, samples and features: one of each and several; less than a tile of 16 probes, one, and
# more; rows that are no multiple of 4, of 4, of 8, and of 16 features.
ONE, ODD, FOURS, EIGHTS, WHOLE = (1, 1, 1), (19, 3, 7), (5, 2, 12), (16, 1, 72), (1, 3, 64)
# How the pointers are aligned is the last of each.
CASES = [
    (torch.float32, ONE, "aligned"),
    (torch.float32, ODD, "aligned"),
    (torch.float32, ODD, "odd"),
    (torch.float32, FOURS, "odd"),
    (torch.float32, EIGHTS, "aligned"),
    (torch.float32, EIGHTS, "odd"),
    (torch.float32, WHOLE, "aligned"),
    (torch.bfloat16, ODD, "odd"),
    (torch.bfloat16, EIGHTS, "aligned"),
    (torch.bfloat16, EIGHTS, "odd"),
    (torch.bfloat16, WHOLE, "aligned"),
    (torch.float16, ODD, "odd"),
    (torch.float16, WHOLE, "aligned"),
    (torch.float64, ODD, "odd"),
    (torch.float64, EIGHTS, "aligned"),
]


def over(cases):
    """Run a test for each type, sizes and alignment."""
    return pytest.mark.parametrize(
        ("dtype", "sizes", "place"),
        cases,
        indirect=["place"],
        ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
    )


def random(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_rounded_once(made, expected):
    """Raise unless short numbers are those of float32, rounded to nearest.

    Half a unit in the last place is what that leaves, beside the errors of float32.
    """
    exponent = torch.floor(torch.log2(expected.abs())).clamp(min=-14)
    unit = 2.0 ** (exponent - DIGITS[made.dtype])
    excess = (made.double() - expected).abs() - unit / 2
    assert excess.max() <= 3e-6


@over(CASES)
def test_signs(dtype, sizes, place):
    num_probes, batch, features = sizes
    probe_offset, sample_offset = OFFSETS[(num_probes + features) % len(OFFSETS)]
    seed = torch.tensor(SEED)
    made = signs.rademacher_triton(
        seed, (num_probes, batch, features), probe_offset, sample_offset, dtype
    )
    assert made.dtype == dtype
    expected = numpy_contract.rademacher(
        num_probes, batch, features, SEED, probe_offset, sample_offset
    )
    np.testing.assert_array_equal(made.double(), expected)


@over([case for case in CASES if case[0] == torch.float32])
def test_normals(dtype, sizes, place):
    _, batch, features = sizes
    step, sample_offset = OFFSETS[features % len(OFFSETS)]
    stream = 1 + features % 2
    made = normals.normal_triton(
        torch.tensor(SEED), (1, batch, features), stream, step, sample_offset
    )[0]
    expected = numpy_contract.normal(batch, features, SEED, stream, step, sample_offset)
    # A few units in the last place of float32.
    np.testing.assert_allclose(made, expected, rtol=5e-7, atol=5e-7)


@over(CASES)
def test_moments(dtype, sizes, place):
    num_probes, batch, features = sizes
    products = 2 + random((num_probes, batch, features), dtype)
    exact = torch.promote_types(dtype, torch.float32)
    probe_offset, sample_offset = OFFSETS[(num_probes + features) % len(OFFSETS)]
    for count in (0, 2**31 + 5):
        state = (None, None)
        if count:
            state = (random((batch, features), exact, 1), 1e9 + random((batch, features), exact, 2))
        given = [place(t) if t is not None else None for t in (products, *state)]
        rest = (count, probe_offset, sample_offset)
        mean, deviations = moments.probe_moments_triton(
            given[0], torch.tensor(SEED), *given[1:], *rest
        )
        expected = moments.probe_moments_reference(products, torch.tensor(SEED), *state, *rest)
        tolerance = 2e-6 if exact == torch.float32 else 1e-13
        torch.testing.assert_close(mean, expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            deviations, expected[1], rtol=10 * tolerance, atol=10 * tolerance
        )


@over([case for case in CASES if case[0] != torch.float64])
def test_loss_and_gradient(dtype, sizes, place):
    num_probes, batch, features = sizes
    head, products = (
        random(s, dtype, i)
        for i, s in enumerate([(batch, features), (num_probes, batch, features)])
    )
    numbers = [1.5, -0.3, 0.2]
    rows = None
    if features % 2:
        rows = torch.stack([torch.linspace(v, v + 1, batch) for v in numbers], dim=1)
    offsets = OFFSETS[(num_probes + features) % len(OFFSETS)]
    seed, upstream = torch.tensor(SEED), torch.tensor(3.0)
    given = [
        place(head),
        place(products),
        None if rows is None else place(rows),
        numbers,
        seed,
        *offsets,
    ]
    exact = [head.double(), products.double(), rows, numbers, seed, *offsets]
    made = loss.ocm_loss_triton(*given)
    expected = loss.ocm_loss_reference(*exact)
    torch.testing.assert_close(made.double(), expected.double(), rtol=1e-5, atol=0)
    gradient = loss.ocm_loss_backward_triton(upstream, *given)
    expected = loss.ocm_loss_backward_reference(upstream, *exact)
    assert gradient.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    else:
        assert_rounded_once(gradient, expected)


LAYOUTS = ["none", "one", "per sample", "per element"]


@over([case for case in CASES if case[0] != torch.float64 and case[1] in (ODD, EIGHTS)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step(dtype, sizes, place, layout):
    _, batch, features = sizes
    x_t, prediction = (random((batch, features), dtype, i) for i in range(2))
    variance = {
        "none": None,
        "one": torch.full((1, 1), 0.4, dtype=dtype),
        "per sample": torch.linspace(-0.1, 1.2, batch).to(dtype)[:, None],
        "per element": random((batch, features), dtype, 2),
    }[layout]
    coefficients = [1.3, -0.4, 0.6, 0.5, 0.01, 0.3]
    rows = None
    if LAYOUTS.index(layout) % 2 == features % 2:
        rows = torch.stack([torch.linspace(v, v + 1, batch) for v in coefficients], dim=1)
    step, sample_offset = OFFSETS[features % len(OFFSETS)]
    seed = torch.tensor(SEED)
    rest = (coefficients, steps.Clamps(-1.0, 1.0, 0.0, 1.0, 0.25), seed, step, sample_offset)
    given = [None if t is None else place(t) for t in (x_t, prediction, variance, rows)]
    made = steps.gaussian_step_triton(*given, *rest)
    exact = [None if t is None else t.double() for t in (x_t, prediction, variance)]
    expected = steps.gaussian_step_reference(*exact, rows, *rest)
    assert made.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(made.double(), expected, rtol=2e-6, atol=2e-6)
    else:
        assert_rounded_once(made, expected)


@pytest.mark.parametrize("name", ["x_t", "prediction", "variance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_does_not_clamp_nan_away(name, dtype):
    tensors = {key: random((2, 24), dtype) for key in ("x_t", "prediction", "variance")}
    tensors[name][1, 3] = math.nan
    made = steps.gaussian_step_triton(
        *tensors.values(),
        None,
        [1.3, -0.4, 0.6, 0.5, 0.01, 0.3],
        steps.Clamps(-1.0, 1.0, 0.0, 1.0, 0.25),
        torch.tensor(1),
        0,
        0,
    )
    assert made.isnan().nonzero().tolist() == [[1, 3]]
