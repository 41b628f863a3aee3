"""Moments of v * (J v): reference and Triton kernel against NumPy, in any split of the probes."""

import importlib

import numpy as np
import numpy_contract
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hessdiag.kernels import Moments, probe_moments, rademacher

module = importlib.import_module("hessdiag.kernels.probe_moments")

SEED = 2**40 + 9


def products(num_probes, batch, features, dtype=torch.float32):
    generator = torch.Generator().manual_seed(features)
    values = torch.randn(num_probes, batch, features, generator=generator)
    return (3.0 + values).to(dtype)


def expected(values, probe_offset, sample_offset):
    """Mean and sum of squared deviations in float64 NumPy, in two passes."""
    signs = numpy_contract.rademacher(*values.shape, SEED, probe_offset, sample_offset)
    y = signs * values.double().numpy()
    return y.mean(axis=0), ((y - y.mean(axis=0)) ** 2).sum(axis=0)


@pytest.mark.parametrize(
    ("features", "num_probes", "offset"),
    [
        *((features, 16, 2**31 - 7) for features in (1, 7, 8, 9, 127, 129)),
        *((9, 1, 0), (9, 5, 13), (9, 35, 2**32 - 35), (4097, 2, 15)),
    ],
)
def test_reference_and_kernel_against_numpy(features, num_probes, offset, kernel_device):
    values = products(num_probes, 2, features)
    mean, deviations = expected(values, offset, 2**32 - 5)
    result = probe_moments(values, SEED, probe_offset=offset, sample_offset=2**32 - 5)
    kernel = module.probe_moments_triton(
        values.to(kernel_device),
        torch.tensor(SEED, device=kernel_device),
        None,
        None,
        0,
        offset,
        2**32 - 5,
    )
    for means, squares in (result[1:], kernel):
        np.testing.assert_allclose(means.cpu(), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(squares.cpu(), deviations, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probe_offset", [0, 1, 15])
@pytest.mark.parametrize("num_probes", [1, 2, 15, 16, 17, 31, 32, 33])
def test_tiles_of_probes_that_are_whole_and_not(num_probes, probe_offset, kernel_device):
    values = products(num_probes, 1, 9)
    mean, deviations = expected(values, probe_offset, 0)
    seed = torch.tensor(SEED, device=kernel_device)
    kernel = module.probe_moments_triton(
        values.to(kernel_device), seed, None, None, 0, probe_offset, 0
    )
    np.testing.assert_allclose(kernel[0].cpu(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernel[1].cpu(), deviations, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_kernel", [False, True])
@pytest.mark.parametrize("features", [8, 9])
def test_any_split_of_the_probes_gives_the_same_bits(on_kernel, features, kernel_device):
    device = kernel_device if on_kernel else "cpu"
    values = products(37, 2, features).to(device)
    seed = torch.tensor(SEED, device=device)
    compute = module.probe_moments_triton if on_kernel else module.probe_moments_reference
    whole = compute(values, seed, None, None, 0, 5, 0)
    for splits in ([1, 36], [16, 16, 5], [3] * 12 + [1]):
        mean = deviations = None
        count = 0
        for part in values.split(splits):
            mean, deviations = compute(part, seed, mean, deviations, count, 5 + count, 0)
            count += len(part)
        assert torch.equal(mean, whole[0])
        assert torch.equal(deviations, whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    # Rows of one number, short, long, in two parts; more of them than a block holds.
    ("num_probes", "features"),
    [(1, 1), (40, 1), (40, 16), (17, 100), (3, 2**14 + 9), (7000, 5), (400, 100)],
)
def test_the_bits_are_those_of_the_recurrence(num_probes, features, dtype):
    values = products(num_probes, 1, features, dtype)
    values[0] *= 1e6
    for count in (0, 2**24 + 1):
        state = Moments(count, *torch.rand(2, 1, features, dtype=dtype)) if count else None
        signs = numpy_contract.rademacher(num_probes, 1, features, SEED, 11)
        start = state[1:] if state else torch.zeros(2, 1, features, dtype=dtype)
        expected = numpy_contract.moments(
            values.numpy(), signs, *(tensor.numpy() for tensor in start), count
        )
        made = probe_moments(values, SEED, state=state, probe_offset=11)
        for one, other in zip(made[1:], expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [5, 64, 9000])  # few numbers, and more than a long row
def test_numpy_and_the_operators_of_pytorch_agree(features, dtype, monkeypatch):
    values = products(35, 2, features, dtype)
    state = probe_moments(products(3, 2, features, dtype), 1)
    in_numpy = [probe_moments(values, SEED, state=s) for s in (None, state)]
    monkeypatch.setattr(module, "is_eager_cpu", lambda *_: False)
    monkeypatch.setattr(module, "_add_rows", None)
    seed = torch.tensor(SEED)
    by_operators = [
        module.probe_moments_reference(values, seed, None, None, 0, 0, 0),
        module.probe_moments_reference(values, seed, *state[1:], 3, 0, 0),
    ]
    for one, other in zip(in_numpy, by_operators, strict=True):
        assert torch.equal(one.mean, other[0])
        assert torch.equal(one.squared_deviations, other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_probes_at_hand_give_the_same_bits(dtype):
    values = products(35, 2, 24, dtype).reshape(35, 2, 4, 6).transpose(2, 3)
    signs = rademacher(values.shape, SEED, dtype=dtype, probe_offset=9)
    state = None
    for part in (slice(0, 20), slice(20, 35)):
        state = module.probe_moments_from_probes(values[part], signs[part], state=state)
    expected = probe_moments(values, SEED, probe_offset=9)
    assert state.num_probes == expected.num_probes
    assert torch.equal(state.mean, expected.mean)
    assert torch.equal(state.squared_deviations, expected.squared_deviations)


def test_moments_of_probes_at_hand_can_be_transformed():
    values, signs = products(4, 2, 5, torch.float64), rademacher((4, 2, 5), 1, dtype=torch.float64)

    def compute(values):
        return module.probe_moments_from_probes(values, signs)[1:]

    assert torch.autograd.gradcheck(compute, values.clone().requires_grad_())
    made = torch.func.vmap(compute)(torch.stack([values, 2 * values]))
    for one, other in zip(
        made, zip(compute(values), compute(2 * values), strict=True), strict=True
    ):
        assert torch.equal(one, torch.stack(other))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probes": torch.zeros(4, 2, 2)}, ValueError, r"probes .*\(4, 2, 3\), got \(4, 2, 2\)"),
        ({"probes": torch.zeros(4, 2, 3).int()}, TypeError, "probes must be.*int32"),
        ({"products": torch.zeros(3)}, ValueError, r"products must have shape .*got \(3,\)"),
    ],
)
def test_errors_about_probes_at_hand(change, error, message):
    arguments = {"products": torch.zeros(4, 2, 3), "probes": torch.zeros(4, 2, 3), **change}
    with pytest.raises(error, match=message):
        module.probe_moments_from_probes(**arguments)


def test_without_probes_at_hand_nothing_changes():
    state, none = probe_moments(products(4, 2, 5), SEED), torch.zeros(0, 2, 5)
    assert module.probe_moments_from_probes(none, none, state=state) is state


def test_tensors_that_are_negative_or_zero_in_name_only():
    values = products(4, 2, 5)
    negative = torch.complex(values, values).conj().imag
    assert negative.is_neg()
    assert torch.equal(probe_moments(negative, 1).mean, -probe_moments(values, 1).mean)
    zero = torch._efficientzerotensor((4, 2, 5))
    assert torch.equal(probe_moments(zero, 1).mean, torch.zeros(2, 5))


@pytest.mark.filterwarnings("error")
def test_infinities_are_in_the_result_and_not_in_warnings():
    values = torch.full((3, 1, 2), torch.inf)
    assert not torch.isfinite(probe_moments(values, 1).mean).any()


# Whoever looks on sees the op: what NumPy computes would be lost.


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        made = [rademacher((4, 2, 5), 1), probe_moments(mode.from_tensor(products(4, 2, 5)), 1)[1]]
    assert all(mode.is_our_fake(tensor) for tensor in made)


def test_a_traced_graph_holds_the_ops():
    def compute(values):
        return probe_moments(values, 1).mean + rademacher((4, 2, 5), 1)[0]

    graph = make_fx(compute)(products(4, 2, 5)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert {"hessdiag.probe_moments.default", "hessdiag.rademacher.default"} <= set(names)


@pytest.mark.parametrize("seed", [7, torch.tensor(7)])
def test_compiled_in_one_graph(seed):
    def compute(values, seed):
        return probe_moments(values, seed).mean + rademacher((4, 2, 5), seed)[0]

    values = products(4, 2, 5)
    torch.compiler.reset()
    compiled = torch.compile(compute, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(values, seed), compute(values, seed))


def test_vmap_sees_products_of_its_own():
    values = torch.stack([products(4, 2, 5), -products(4, 2, 5)])
    made = torch.func.vmap(lambda v: probe_moments(v, 1).mean)(values)
    assert torch.equal(made, torch.stack([probe_moments(v, 1).mean for v in values]))


def test_a_gradient_is_refused_and_not_zero():
    values = products(4, 2, 5).requires_grad_()
    made = probe_moments(values, 1).mean
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        made.sum().backward()
    with torch.no_grad():
        assert torch.equal(probe_moments(values, 1).mean, made)


def test_inside_inference_mode():
    values = products(4, 2, 5)
    with torch.inference_mode():
        state = probe_moments(values[:2] * 1, 1)
        made = probe_moments(values[2:], 1, state=state, probe_offset=2)
    assert torch.equal(made.mean, probe_moments(values, 1).mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_is_accumulated_in_float32(dtype, kernel_device):
    values = products(20, 2, 24, dtype)
    mean, deviations = expected(values, 0, 0)
    seed = torch.tensor(SEED, device=kernel_device)
    kernel = module.probe_moments_triton(values.to(kernel_device), seed, None, None, 0, 0, 0)
    for means, squares in (probe_moments(values, SEED)[1:], kernel):
        assert means.dtype == torch.promote_types(dtype, torch.float32)
        np.testing.assert_allclose(means.cpu(), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(squares.cpu(), deviations, rtol=1e-4)


def test_outputs_are_written_everywhere(kernel_device, monkeypatch):
    original = torch.empty

    def poisoned(*arguments, **options):
        return original(*arguments, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, device=x.device))
    values = products(3, 3, 129).to(kernel_device)
    seed = torch.tensor(SEED, device=kernel_device)
    for result in module.probe_moments_triton(values, seed, None, None, 0, 0, 0):
        assert torch.isfinite(result).all()


def test_the_state_is_left_as_it_was():
    values = products(4, 2, 5)
    state = probe_moments(values[:2], SEED)
    before = state.mean.clone()
    result = probe_moments(values[2:], SEED, state=state, probe_offset=2)
    assert torch.equal(state.mean, before)
    assert result.num_probes == 4


def test_strided_products_and_a_shape():
    values = products(4, 3, 60).reshape(4, 3, 5, 3, 4)
    strided = values.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert not strided.is_contiguous()
    for one, other in zip(probe_moments(strided, 1)[1:], probe_moments(values, 1)[1:], strict=True):
        assert torch.equal(one, other)


def test_custom_op_passes_opcheck():
    values, seed = products(3, 2, 5), torch.tensor(1)
    op = torch.ops.hessdiag.probe_moments.default
    torch.library.opcheck(op, (values, seed, None, None, 0, 0, 0))
    state = torch.zeros(2, 5)
    torch.library.opcheck(op, (values, seed, state, state.clone(), 4, 4, 0))


def test_no_probes_change_nothing():
    state = probe_moments(products(4, 2, 5), SEED)
    assert probe_moments(torch.zeros(0, 2, 5), SEED, state=state) is state
    assert probe_moments(torch.zeros(0, 2, 5), SEED).num_probes == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"products": torch.zeros(3)}, ValueError, r"products must have shape .*got \(3,\)"),
        ({"products": torch.zeros(2, 3).int()}, TypeError, "products must be.*int32"),
        ({"products": torch.zeros(2, 3).cfloat()}, TypeError, "products must be.*complex64"),
        ({"products": torch.zeros(1, 3).expand(2, 3)}, ValueError, "products must not overlap"),
        (
            {"state": Moments(1, torch.zeros(4), torch.zeros(4))},
            ValueError,
            r"state.mean must have shape \(2, 3\) .*got \(4,\)",
        ),
        ({"probe_offset": -1}, ValueError, "probe_offset must be at least 0, got -1"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, error, message):
    with pytest.raises(error, match=message):
        probe_moments(**{"products": torch.zeros(4, 2, 3), "seed": 0, **change})


def test_dual_tensors_are_refused():
    with pytest.raises(TypeError, match="products carries a tangent"):
        torch.func.jvp(
            lambda p: probe_moments(p, 0).mean, (torch.zeros(2, 3),), (torch.ones(2, 3),)
        )


def test_it_is_the_mean_of_sign_times_product():
    values = products(6, 2, 11)
    signs = rademacher((6, 2, 11), SEED)
    torch.testing.assert_close(probe_moments(values, SEED).mean, (signs * values).mean(dim=0))
