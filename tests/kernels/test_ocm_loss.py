"""The fused regression loss: reference, Triton kernel and gradients against NumPy and autograd."""

import importlib
import math

import numpy_contract
import pytest
import torch

from hessdiag.kernels import ocm_loss, rademacher

module = importlib.import_module("hessdiag.kernels.ocm_loss")

SEED = 2**33 + 1


def inputs(num_probes, batch, features, dtype=torch.float32):
    generator = torch.Generator().manual_seed(features)
    head = torch.randn(batch, features, generator=generator).to(dtype)
    return head, torch.randn(num_probes, batch, features, generator=generator).to(dtype)


def expected(head, products, weight=1.0, scale=1.0, shift=0.0, probe_offset=0, sample_offset=0):
    """Loss and gradient by float64 autograd on the formula."""
    signs = torch.from_numpy(
        numpy_contract.rademacher(*products.shape, SEED, probe_offset, sample_offset)
    )
    weight, scale, shift = (
        torch.as_tensor(value).double().reshape(-1, 1) for value in (weight, scale, shift)
    )
    h = head.double().requires_grad_()
    target = (signs * products.double()).mean(dim=0)
    loss = (weight * (h - scale * target - shift) ** 2).mean()
    loss.backward()
    return loss.detach(), h.grad


@pytest.mark.parametrize(
    ("num_probes", "features"),
    [(5, 1), (5, 7), (18, 8), (5, 9), (1, 8), (1, 9), (2, 127), (5, 129), (1, 4097)],
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_reference_and_kernel_against_autograd(features, num_probes, per_sample, kernel_device):
    head, products = inputs(num_probes, 3, features)
    values = (1.5, -0.3, 0.2)
    if per_sample:
        values = tuple(torch.linspace(v, v + 1, 3) for v in values)
    offsets = (2**31 - 3, 2**32 - 4)
    loss, gradient = expected(head, products, *values, *offsets)

    leaf = head.clone().requires_grad_()
    options = dict(zip(("weight", "scale", "shift"), values, strict=True))
    result = ocm_loss(
        leaf, products, SEED, **options, probe_offset=offsets[0], sample_offset=offsets[1]
    )
    result.backward()
    torch.testing.assert_close(result.detach().double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=1e-6)

    rows = torch.stack(values, dim=1).to(kernel_device) if per_sample else None
    numbers = [0.0] * 3 if per_sample else list(values)
    seed = torch.tensor(SEED, device=kernel_device)
    arguments = (head.to(kernel_device), products.to(kernel_device), rows, numbers, seed, *offsets)
    kernel_loss = module.ocm_loss_triton(*arguments).cpu()
    torch.testing.assert_close(kernel_loss.double(), loss, rtol=1e-5, atol=0)
    upstream = torch.tensor(2.0, device=kernel_device)
    kernel_gradient = module.ocm_loss_backward_triton(upstream, *arguments).cpu()
    torch.testing.assert_close(kernel_gradient.double(), 2 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype, kernel_device):
    head, products = inputs(4, 2, 64, dtype)
    loss, gradient = expected(head, products)
    seed = torch.tensor(SEED, device=kernel_device)
    arguments = (head.to(kernel_device), products.to(kernel_device), None, [1.0, 1.0, 0.0])
    kernel_loss = module.ocm_loss_triton(*arguments, seed, 0, 0).cpu()
    for result in (ocm_loss(head, products, SEED), kernel_loss):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), loss, rtol=1e-5, atol=0)
    upstream = torch.ones((), device=kernel_device)
    result = module.ocm_loss_backward_triton(upstream, *arguments, seed, 0, 0)
    assert result.dtype == dtype
    # The interpreter truncates float32 to bfloat16 where a GPU rounds.
    torch.testing.assert_close(result.cpu().double(), gradient, rtol=2e-2, atol=1e-5)


def test_gradcheck():
    head, products = inputs(3, 2, 5, torch.float64)
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    head.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: ocm_loss(h, products, SEED, weight=weight, scale=0.5, shift=0.1), (head,)
    )


def test_outputs_are_written_everywhere(kernel_device, monkeypatch):
    head, products = (a.to(kernel_device) for a in inputs(2, 3, 129))
    seed = torch.tensor(SEED, device=kernel_device)
    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: original(x).fill_(math.nan))
    upstream = torch.ones((), device=kernel_device)
    result = module.ocm_loss_backward_triton(
        upstream, head, products, None, [1.0, 1.0, 0.0], seed, 0, 0
    )
    assert torch.isfinite(result).all()


def test_the_minimiser_over_many_probes_is_the_diagonal():
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    probes = rademacher((3000, 1, 6), SEED)
    head = torch.zeros(1, 6, requires_grad=True)
    ocm_loss(head, probes @ A.T, SEED).backward()
    # At h = 0 the gradient is -2/n times the mean target, an estimate of diag(A).
    energy = A.square().sum(dim=1) - A.diagonal() ** 2
    error = -head.grad[0] * 6 / 2 - A.diagonal()
    assert (error.abs() < 5 * (energy / 3000).sqrt()).all()


def test_custom_ops_pass_opcheck():
    head, products = inputs(2, 2, 5)
    arguments = (head, products, torch.rand(2, 3), [0.0] * 3, torch.tensor(1), 0, 0)
    torch.library.opcheck(torch.ops.hessdiag.ocm_loss.default, arguments)
    torch.library.opcheck(
        torch.ops.hessdiag.ocm_loss.default, (head.requires_grad_(), *arguments[1:])
    )
    torch.library.opcheck(
        torch.ops.hessdiag.ocm_loss_backward.default,
        (torch.tensor(1.0), head.detach(), *arguments[1:]),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"products": torch.zeros(2, 3)},
            ValueError,
            r"products must have shape \(M, \*\(2, 3\)\)",
        ),
        ({"products": torch.zeros(1, 2, 3).double()}, ValueError, "dtype of head.*float64"),
        ({"products": torch.zeros(0, 2, 3)}, ValueError, "products must not be empty"),
        ({"products": torch.zeros(1, 2, 3, requires_grad=True)}, ValueError, "products.detach"),
        ({"head": torch.zeros(2, 3).int()}, TypeError, "head must be.*int32"),
        ({"head": torch.zeros(2, 1).expand(2, 3)}, ValueError, "head must not overlap"),
        ({"scale": torch.zeros(5)}, ValueError, r"scale must be .* \(2,\), got 5 values"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, error, message):
    arguments = {"head": torch.zeros(2, 3), "products": torch.zeros(1, 2, 3), "seed": 0}
    with pytest.raises(error, match=message):
        ocm_loss(**{**arguments, **change})
