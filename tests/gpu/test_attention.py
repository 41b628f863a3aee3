"""On a CUDA device: attention with tangents against float64, and forward mode that takes it."""

import pytest
import torch
from harness.memory import allocated_bytes
from torch.nn.functional import scaled_dot_product_attention

import hessdiag
from hessdiag.kernels import attention_jvp

pytestmark = pytest.mark.gpu

# Relative to the norm: rounding in the type of the inputs, and of the products' inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(*shape, probes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    tangents = [torch.randn(probes, *shape, generator=generator).to(dtype) for _ in range(3)]
    return [*points, *tangents]


@pytest.mark.parametrize("head", [16, 32, 40, 64, 72, 80, 96, 128, 160])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "causal"])
def test_attention_against_float64(head, dtype, kind):
    tensors = inputs(2, 3, 150, head, probes=3, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    mask = {
        "boolean": torch.rand(2, 1, 150, 150, generator=generator) < 0.5,
        "additive": torch.randn(3, 150, 150, generator=generator),
    }.get(kind)
    options = {"attn_mask": mask, "is_causal": kind == "causal"}
    expected = attention_jvp(*(tensor.double() for tensor in tensors), **options)
    options["attn_mask"] = None if mask is None else mask.cuda()
    results = attention_jvp(*(tensor.cuda() for tensor in tensors), **options)
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert (result.cpu().double() - want).norm() < TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_through_attention_are_those_of_reverse_mode(dtype):
    x = torch.randn(2, 4, 100, 64, device="cuda").to(dtype)
    results = [
        hessdiag.Jacobian(
            lambda x: scaled_dot_product_attention(x, x, x), x, mode=mode, batching="vmap"
        ).products(x.expand(3, *x.shape))
        for mode in ("jvp", "vjp")
    ]
    # Of J and its transpose, so only v^T J v is one number.
    one, other = ((x.double() * result.double()).sum((-3, -2, -1)) for result in results)
    assert (one - other).norm() < 10 * TOLERANCE[dtype] * other.norm()


def test_memory_does_not_grow_with_the_scores():
    tensors = [t.cuda() for t in inputs(1, 2, 4096, 64, probes=4, dtype=torch.bfloat16)]
    outputs = tensors[0].nbytes + tensors[3].nbytes
    # An allocation is rounded up.
    assert allocated_bytes(lambda: attention_jvp(*tensors), "cuda") <= outputs + 2**22
