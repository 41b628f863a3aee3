"""On a CUDA device: the dispatched ops against the CPU and float64 (``pytest -m gpu``)."""

import math

import numpy as np
import numpy_contract
import pytest
import torch

from hessdiag.kernels import (
    StepCoefficients,
    gaussian_step,
    normal,
    normal_probes,
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


def test_normal_probes_are_those_of_the_cpu():
    arguments = {"probe_offset": 2**32 - 70, "sample_offset": 3}
    on_gpu = normal_probes((65, 2, 9), 7, device="cuda", **arguments).cpu()
    torch.testing.assert_close(
        on_gpu, normal_probes((65, 2, 9), 7, **arguments), rtol=2e-6, atol=2e-6
    )


def test_more_tiles_than_one_direction_of_a_grid_takes():
    shape = (16 * 65_535 + 5, 1, 3)
    assert torch.equal(rademacher(shape, 7, device="cuda").cpu(), rademacher(shape, 7))


@pytest.mark.parametrize("features", [2**31 + 4096, 2**31 + 4099])
def test_one_sample_of_more_features_than_int32_counts(features):
    """4 GiB of signs; the last are those of a sample whose first features were left out."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    signs = rademacher((1, 1, features), 7, dtype=torch.bfloat16, device="cuda")
    last = signs[0, 0, -128:].cpu().double().numpy()
    np.testing.assert_array_equal(
        last, numpy_contract.rademacher(1, 1, 128, 7, 0, 0, features - 128)[0, 0]
    )


def test_a_kernel_launched_again_computes_the_same():
    """For other tensors, on another stream, and after one that is not aligned to 16 bytes."""
    arguments = {"seed": torch.tensor(3, device="cuda"), "step": 5}
    tensors = [torch.rand(4, 33, device="cuda") for _ in range(3)]
    storage = torch.empty(3, 133, device="cuda")
    odd = [row[1:].view(4, 33).copy_(tensor) for row, tensor in zip(storage, tensors, strict=True)]
    first = gaussian_step(*tensors, STEP, **arguments)
    assert torch.equal(gaussian_step(*odd, STEP, **arguments), first)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        again = gaussian_step(*(tensor.clone() for tensor in tensors), STEP, **arguments)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(again, first)


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
