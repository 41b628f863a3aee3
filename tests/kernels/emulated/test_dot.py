"""Products of matrices as Triton compiles them, against float64: on sm_80 and on sm_90.

Between them they are compiled to ``mma.sync``, to ``wgmma`` with a factor in registers or in shared
memory, swizzled in every way, and to fused products and sums where float32 must be exact.
"""

import emulator
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _product_kernel(
    a,
    b,
    out,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + k[None, :])
    if TRANSPOSED:
        right = tl.trans(tl.load(b + j[:, None] * K + k[None, :]))
    else:
        right = tl.load(b + k[:, None] * N + j[None, :])
    product = tl.dot(left, right, input_precision=PRECISION)
    tl.store(out + i[:, None] * N + j[None, :], product)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    inside = row[:, None] < length
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    total = tl.zeros((ROWS, D), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    for first in range(0, length, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        exists = column[:, None] < length
        k = tl.load(k_ptr + column[:, None] * D + d[None, :], mask=exists, other=0.0)
        v = tl.load(v_ptr + column[:, None] * D + d[None, :], mask=exists, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        score = tl.where(column[None, :] < length, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp(score - new[:, None])
        shrink = tl.exp(largest - new)
        norm = norm * shrink + tl.sum(weight, 1)
        total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        largest = new
    tl.store(out_ptr + row[:, None] * D + d[None, :], total / norm[:, None], mask=inside)


# Type, how Triton multiplies, and the relative error that follows from it.
PRECISIONS = [
    (torch.float32, "ieee", 1e-6),
    (torch.float32, "tf32", 2e-3),
    (torch.float32, "tf32x3", 1e-5),
    (torch.bfloat16, "ieee", 1e-6),
    (torch.float16, "ieee", 1e-6),
]


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    # wgmma takes 64 rows; rows of 32, 64 and 128 bytes are swizzled in three ways.
    ("capability", "rows", "depth", "transposed"),
    [
        (80, 16, 64, True),
        (90, 16, 32, False),
        (90, 64, 16, True),
        (90, 64, 32, False),
        (90, 128, 64, True),
    ],
)
def test_products(capability, dtype, precision, tolerance, rows, depth, transposed):
    generator = torch.Generator().manual_seed(depth)
    a, b = (torch.randn(n, depth, generator=generator).to(dtype) for n in (rows, 32))
    right = b if transposed else b.T.contiguous()
    out = torch.full((rows, 32), float("nan"))
    with emulator.capability(capability):
        _product_kernel[(1,)](a, right, out, rows, 32, depth, precision, transposed)
    expected = a.double() @ b.double().T
    assert (out - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "precision", "tolerance"), PRECISIONS)
def test_attention(capability, dtype, precision, tolerance):
    """Whose weights, of the type of the values, are the left factor in registers."""
    length, d = 83, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, d, generator=generator).to(dtype) for _ in range(3))
    q = q / 8
    out = torch.full((length, d), float("nan"))
    with emulator.capability(capability):
        _attention_kernel[(2,)](q, k, v, out, length, 64, 32, d, precision)
    weights = torch.softmax(q.double() @ k.double().T, dim=1)
    expected = weights @ v.double()
    rounded = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert (out - expected).norm() <= (2 * tolerance + rounded) * expected.norm()
