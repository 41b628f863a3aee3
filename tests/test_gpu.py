"""On a CUDA device: the dispatched ops against the CPU and float64 (``pytest -m gpu``)."""

import pytest
import torch

import hessdiag
from hessdiag.kernels import StepCoefficients, gaussian_step, normal, rademacher

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


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_estimates_are_those_of_the_cpu(unet, mode):
    x = torch.randn(2, 2, 8, 8)
    expected = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x, 4, mode=mode)
    unet.cuda()
    try:
        on_gpu = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x.cuda(), 4, mode=mode)
    finally:
        unet.cpu()
    assert (on_gpu.cpu() - expected).norm() < 1e-3 * expected.norm()
