"""The covariance-scaled Gaussian step: reference and Triton kernel against its formula."""

import importlib
import math

import numpy as np
import numpy_contract
import pytest
import torch
from one_device import one_device

from hessdiag.kernels import StepCoefficients, gaussian_step
from hessdiag.kernels._checks import rows_per_sample

module = importlib.import_module("hessdiag.kernels.gaussian_step")

SCALARS = StepCoefficients(1.3, -0.4, 0.6, 0.5, 0.01, 0.3)


def formula(x_t, prediction, variance, coefficients, seed, step, sample_offset=0, **clamps):
    """The step in float64 NumPy, with the noise of the NumPy contract."""
    shape = x_t.shape
    x_t, prediction = (np.asarray(a.double()) for a in (x_t, prediction))
    p, q, a, b, c, k = (
        np.asarray(torch.as_tensor(value).double()).reshape(-1, *[1] * (len(shape) - 1))
        for value in coefficients
    )
    z = numpy_contract.normal(shape[0], math.prod(shape[1:]), seed, 2, step, sample_offset).reshape(
        shape
    )
    x0 = p * x_t + q * prediction
    if "x0_range" in clamps:
        x0 = np.clip(x0, *clamps["x0_range"])
    variance = np.asarray(torch.as_tensor(variance).double())
    if "variance_range" in clamps:
        variance = np.clip(variance, *clamps["variance_range"])
    noise_variance = np.maximum(c + k * variance, 0.0)
    if "max_noise_std" in clamps:
        noise_variance = np.minimum(noise_variance, clamps["max_noise_std"] ** 2)
    return torch.from_numpy(a * x_t + b * x0 + np.sqrt(noise_variance) * z)


def inputs(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(math.prod(shape))
    x_t, prediction = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x_t, prediction, (1.5 * torch.rand(shape, generator=generator) - 0.25).to(dtype)


CLAMPS = [
    {},
    {"x0_range": (-1.0, 1.0), "variance_range": (0.1, 0.5)},
    {"max_noise_std": 0.2},
]


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 8), (2, 9), (3, 2, 5, 5), (2, 129)])
@pytest.mark.parametrize("clamps", CLAMPS)
def test_step_is_its_formula(shape, clamps):
    x_t, prediction, variance = inputs(shape)
    arguments = {"seed": 2**40 + 3, "step": 17, "sample_offset": 5, **clamps}
    result = gaussian_step(x_t, prediction, variance, SCALARS, **arguments)
    expected = formula(x_t, prediction, variance, SCALARS, **arguments)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 8), (3, 2, 5, 5), (2, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["none", "one", "per sample", "per element"])
@pytest.mark.parametrize("per_sample_coefficients", [False, True])
def test_triton_kernel_is_the_reference(
    shape, dtype, layout, per_sample_coefficients, kernel_device, monkeypatch
):
    x_t, prediction, variance = inputs(shape, dtype)
    if layout == "one":
        variance = variance.flatten()[0]
    elif layout == "per sample":
        variance = variance.flatten(1)[:, 0].reshape(-1, *[1] * (len(shape) - 1))
    coefficients = SCALARS
    if per_sample_coefficients:
        coefficients = StepCoefficients(*(torch.linspace(v, v + 1, shape[0]) for v in SCALARS))
    rows, numbers = rows_per_sample(coefficients._asdict(), x_t)
    arguments = (
        x_t,
        prediction,
        None if layout == "none" else module._variance_layout(variance, x_t),
        rows,
        numbers,
        module.Clamps(-1.0, 1.0, 0.0, 1.0, 0.25),
        torch.tensor(2**63 - 5),
        2**32 - 1,
        2**31,
    )
    expected = module.gaussian_step_reference(*arguments)
    poisoned = torch.full_like(x_t, math.nan, device=kernel_device)
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: poisoned)
    on_device = [a.to(kernel_device) if isinstance(a, torch.Tensor) else a for a in arguments]
    result = module.gaussian_step_triton(*on_device).cpu()
    # The interpreter truncates float32 to bfloat16 where a GPU rounds.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def two_clamps(c, k, variance, low, high, most):
    """The variance of the noise, as the step is defined."""
    return (c + k * variance.clamp(low, high)).clamp(0.0, most)


@pytest.mark.parametrize("k", [0.3, -0.3, 0.0, 1e-30])
@pytest.mark.parametrize("c", [0.2, 0.0, -0.1, math.inf])
@pytest.mark.parametrize(
    ("low", "high", "most"),
    [
        (0.1, 0.5, 0.25),
        (-math.inf, math.inf, math.inf),
        (0.0, math.inf, 0.1),
        (-math.inf, 2.0, 9.0),
    ],
)
def test_one_clamp_does_what_two_do(k, c, low, high, most):
    finite = torch.linspace(-3, 3, 61, dtype=torch.float64)
    bounded = math.isfinite(low) and math.isfinite(high) and math.isfinite(c)
    ends = [-math.inf, math.inf] if bounded else []
    variance = torch.cat([finite, torch.tensor(ends, dtype=torch.float64)])
    factor, new_low, new_high = module._noise_bounds(c, k, low, high, most)
    one = (c + factor * variance).clamp(new_low, new_high)
    torch.testing.assert_close(one, two_clamps(c, k, variance, low, high, most))
    assert (c + factor * torch.tensor(math.nan)).clamp(new_low, new_high).isnan()


@pytest.mark.parametrize("k", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("max_noise_variance", [0.25, math.inf])
@pytest.mark.parametrize("per_sample", [False, True])
def test_kernel_with_a_factor_of_either_sign(k, max_noise_variance, per_sample, kernel_device):
    x_t, prediction, variance = inputs((2, 9))
    variance = 2 * variance - 0.5
    variance[0, 1], variance[1, 2] = math.inf, -math.inf
    coefficients = list(SCALARS._replace(noise_from_variance=k))
    clamps = module.Clamps(-1.0, 1.0, 0.1, 0.9, max_noise_variance)
    rows = torch.tensor([coefficients, coefficients]) if per_sample else None
    rest = (rows, coefficients, clamps, torch.tensor(5), 3, 0)
    expected = module.gaussian_step_reference(x_t, prediction, variance, *rest)
    assert expected.isfinite().all()
    given = (x_t, prediction, variance, *rest)
    on_device = [a.to(kernel_device) if isinstance(a, torch.Tensor) else a for a in given]
    result = module.gaussian_step_triton(*on_device)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_sample_i_is_the_same_in_any_batch():
    x_t, prediction, variance = inputs((6, 3, 5))
    whole = gaussian_step(x_t, prediction, variance, SCALARS, seed=1, step=2)
    part = gaussian_step(
        x_t[4:], prediction[4:], variance[4:], SCALARS, seed=1, step=2, sample_offset=4
    )
    assert torch.equal(whole[4:], part)


def test_strided_input_gives_the_same_numbers():
    x_t, prediction, variance = inputs((2, 4, 6, 6))
    expected = gaussian_step(x_t, prediction, variance, SCALARS, seed=1, step=2)
    strided = [a.contiguous(memory_format=torch.channels_last) for a in (x_t, prediction, variance)]
    assert torch.equal(gaussian_step(*strided, SCALARS, seed=1, step=2), expected)


def test_float64_is_computed_in_float64():
    x_t, prediction, variance = (a.double() for a in inputs((3, 11)))
    result = gaussian_step(
        x_t,
        prediction,
        variance,
        SCALARS._replace(noise_variance=0.0, noise_from_variance=0.0),
        seed=0,
        step=0,
    )
    expected = 0.6 * x_t + 0.5 * (1.3 * x_t - 0.4 * prediction)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["x_t", "prediction", "variance"])
def test_nan_is_not_clamped_away(name):
    arguments = dict(zip(("x_t", "prediction", "variance"), inputs((2, 5)), strict=True))
    arguments[name][1, 3] = math.nan
    result = gaussian_step(
        **arguments, coefficients=SCALARS, seed=0, step=1, x0_range=(-1, 1), variance_range=(0, 1)
    )
    assert result.isnan().nonzero().tolist() == [[1, 3]]


def test_noise_has_the_stated_variance():
    x_t = torch.zeros(200, 1000)
    coefficients = StepCoefficients(0.0, 0.0, 1.0, 0.0, 0.5, 2.0)
    noise = gaussian_step(x_t, x_t, 0.25, coefficients, seed=3, step=1)
    assert noise.var().item() == pytest.approx(1.0, abs=5 * (2 / 2e5) ** 0.5)


def test_custom_op_passes_opcheck():
    x_t, prediction, variance = inputs((2, 5))
    rest = (list(SCALARS), list(module.Clamps(-1.0, 1.0)), torch.tensor(1), 3, 0)
    arguments = (x_t, prediction, variance, None, *rest)
    torch.library.opcheck(torch.ops.hessdiag.gaussian_step.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dispatcher_changes_nothing(dtype):
    """A call without it, one through the custom op, and one of tensors that are not contiguous."""
    x_t, prediction, variance = inputs((4, 6), dtype)
    arguments = {"seed": torch.tensor(3), "step": 2, "x0_range": (-1.0, 1.0)}
    direct = gaussian_step(x_t, prediction, variance, SCALARS, **arguments)
    clamps = list(module.Clamps(-1.0, 1.0))
    through = torch.ops.hessdiag.gaussian_step(
        x_t, prediction, variance, None, list(SCALARS), clamps, torch.tensor(3), 2, 0
    )
    assert torch.equal(direct, through)
    strided = [tensor.t().contiguous().t() for tensor in (x_t, prediction, variance)]
    assert torch.equal(gaussian_step(*strided, SCALARS, **arguments), direct)


def test_a_mode_sees_the_op():
    """A dispatch mode, as fake tensors are one, must see a call that it stands for."""
    x_t, prediction, variance = inputs((2, 5))
    with one_device() as operators:
        gaussian_step(x_t, prediction, variance, SCALARS, seed=torch.tensor(0), step=1)
    assert "hessdiag::gaussian_step" in operators


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_t": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x_t must be.*int64"),
        ({"prediction": torch.zeros(3, 2)}, ValueError, r"prediction must have.*\(3, 2\)"),
        ({"prediction": torch.zeros(2, 3).double()}, ValueError, "prediction must.*float64"),
        ({"variance": torch.zeros(4)}, ValueError, r"variance must broadcast.*\(4,\)"),
        ({"variance": torch.zeros(2, 3).cfloat()}, TypeError, "variance must be a float32"),
        (
            {"coefficients": SCALARS._replace(mean_from_x0=torch.ones(3))},
            ValueError,
            r"mean_from_x0 must be a number or a tensor of shape \(2,\), got 3 values",
        ),
        ({"x_t": torch.zeros(1, 3).expand(2, 3)}, ValueError, "x_t must not overlap itself"),
        ({"x_t": torch.zeros(2, 3).cfloat()}, TypeError, "x_t must be.*complex64"),
        ({"x0_range": (1.0, -1.0)}, ValueError, r"x0_range must be.*\(1.0, -1.0\)"),
        ({"max_noise_std": -0.5}, ValueError, "max_noise_std must be at least 0, got -0.5"),
        ({"step": -1}, ValueError, "step must be at least 0, got -1"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, error, message):
    x = torch.zeros(2, 3)
    arguments = {"x_t": x, "prediction": x, "variance": 0.0, "coefficients": SCALARS}
    with pytest.raises(error, match=message):
        gaussian_step(**{**arguments, "seed": 0, "step": 0, **change})


def test_dual_tensors_are_refused():
    def step(x):
        return gaussian_step(x, torch.zeros(2, 3), 0.0, SCALARS, seed=0, step=0)

    with pytest.raises(TypeError, match="x_t carries a tangent"):
        torch.func.jvp(step, (torch.zeros(2, 3),), (torch.ones(2, 3),))


def test_the_step_compiles_in_one_graph():
    seed = torch.tensor(3)

    def step(x, prediction):
        prediction = torch.sin(prediction)
        return gaussian_step(x, prediction, prediction.abs(), SCALARS, seed=seed, step=5) * 2

    x = torch.rand(4, 3, 8, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), step(x, x))


def test_empty_batch():
    x = torch.zeros(0, 3)
    assert gaussian_step(x, x, 0.0, SCALARS, seed=0, step=0).shape == (0, 3)
