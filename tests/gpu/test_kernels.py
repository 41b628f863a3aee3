"""On a CUDA device: the dispatched ops against the CPU and float64 (``pytest -m gpu``)."""

import math

import pytest
import torch

from hessdiag.kernels import (
    StepCoefficients,
    gaussian_step,
    normal,
    ocm_loss,
    probe_moments,
    rademacher,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 3, 129), (5, 4, 3, 32, 32), (16, 2, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_those_of_the_cpu_bit_for_bit(shape, dtype):
    arguments = {"probe_offset": 2**31 - 3, "sample_offset": 2**32 - 9, "dtype": dtype}
    on_gpu = rademacher(shape, 2**63 + 1, device="cuda", **arguments)
    assert torch.equal(on_gpu.cpu(), rademacher(shape, 2**63 + 1, **arguments))


@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (64, 3, 32, 32)])
def test_normals_are_those_of_the_cpu(shape):
    on_gpu = normal(shape, 7, step=2**32 - 1, device="cuda")
    torch.testing.assert_close(on_gpu.cpu(), normal(shape, 7, step=2**32 - 1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_against_float64(dtype):
    x_t, prediction, variance = (torch.randn(5, 3, 33).to(dtype) for _ in range(3))
    coefficients = StepCoefficients(1.3, -0.4, 0.6, 0.5, 0.01, 0.3)
    arguments = {"seed": 3, "step": 5, "x0_range": (-1.0, 1.0), "variance_range": (0.0, 1.0)}
    expected = gaussian_step(
        x_t.double(), prediction.double(), variance.double(), coefficients, **arguments
    )
    on_gpu = gaussian_step(
        x_t.cuda(), prediction.cuda(), variance.cuda(), coefficients, **arguments
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(on_gpu.cpu().double(), expected, rtol=tolerance, atol=tolerance)


STEP = StepCoefficients(1.3, -0.4, 0.6, 0.5, 0.01, 0.3)


@pytest.mark.parametrize("shape", [(20, 3, 129), (16, 8, 3, 32, 32), (35, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_against_float64(shape, dtype):
    products = torch.randn(shape).to(dtype)
    expected = probe_moments(products.double(), 5, probe_offset=2**31 - 3)
    on_gpu = probe_moments(products.cuda(), 5, probe_offset=2**31 - 3)
    for one, other in zip(on_gpu[1:], expected[1:], strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-5)
    first = probe_moments(products[:7].cuda(), 5, probe_offset=2**31 - 3)
    both = probe_moments(products[7:].cuda(), 5, state=first, probe_offset=2**31 + 4)
    assert torch.equal(both.mean, on_gpu.mean)
    assert torch.equal(both.squared_deviations, on_gpu.squared_deviations)


@pytest.mark.parametrize("shape", [(1, 3, 129), (3, 8, 3, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_against_float64(shape, dtype):
    products, head = torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)
    options = {"weight": torch.rand(shape[1]), "scale": -0.5, "shift": 0.1}
    results = []
    for move in (lambda a: a.double(), lambda a: a.cuda()):
        leaf = move(head).requires_grad_()
        arguments = {k: move(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss = ocm_loss(leaf, move(products), 3, **arguments)
        loss.backward()
        results.append((loss.detach().cpu().double(), leaf.grad.cpu().double()))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for one, other in zip(results[1], results[0], strict=True):
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("name", ["x_t", "prediction", "variance"])
def test_nan_is_not_clamped_away(name):
    arguments = {key: torch.rand(2, 64, device="cuda") for key in ("x_t", "prediction", "variance")}
    arguments[name][1, 3] = math.nan
    ranges = {"x0_range": (-1, 1), "variance_range": (0, 1)}
    result = gaussian_step(**arguments, coefficients=STEP, seed=0, step=1, **ranges)
    assert result.isnan().nonzero().tolist() == [[1, 3]]


def test_the_step_compiles_in_one_graph():
    x = torch.rand(4, 3, 16, 16, device="cuda")
    seed = torch.tensor(3, device="cuda")

    def step(x, prediction):
        prediction = torch.sin(prediction)
        return gaussian_step(x, prediction, prediction.abs(), STEP, seed=seed, step=5) * 2

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x, x), step(x, x))
