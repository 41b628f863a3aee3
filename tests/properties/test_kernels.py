"""The references of the kernels against their formulas in float64, for any layout and type."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BATCHES, SEEDS, SHAPES, TENSOR_SEEDS, offsets, parts, splits, tensor

from hessdiag import kernels
from hessdiag.kernels import StepCoefficients
from hessdiag.kernels.probe_moments import probe_moments_from_probes

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
# Twice the unit of rounding, for a result that is rounded once to the type, from float32.
STEP = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
LAYOUTS = st.sampled_from(["contiguous", "reversed", "strided"])


def laid_out(values, layout):
    """The same values, other strides."""
    if layout == "reversed":
        order = list(range(values.dim()))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([values, -values], dim=-1)[..., 0]
    return values


def of_type(shape, seed, dtype, layout="contiguous"):
    return laid_out(tensor(shape, seed, dtype), layout)


@given(st.data(), SHAPES, BATCHES, DTYPES, LAYOUTS, TENSOR_SEEDS, SEEDS)
def test_a_step_is_its_formula(data, shape, batch, dtype, layout, seed, noise_seed):
    full = (batch, *shape)
    x = of_type(full, seed, dtype, layout)
    prediction = of_type(full, seed + 1, dtype, data.draw(LAYOUTS))
    kind = data.draw(st.sampled_from(["number", "one", "sample", "element", "channel"]))
    sizes = {
        "one": (1,) * len(full),
        "sample": (batch, *[1] * len(shape)),
        "element": full,
        "channel": (1, shape[0], *[1] * (len(shape) - 1)),
    }
    variance = 0.7 if kind == "number" else of_type(sizes[kind], seed + 2, dtype, layout)
    if kind != "number" and data.draw(st.booleans()):
        variance = variance.expand(full)
    per_sample = data.draw(st.booleans())
    numbers = [0.9, -0.4, 0.6, 0.3, 0.05, 0.8]
    if per_sample:
        numbers = [c + 0.1 * tensor((batch,), seed + i) for i, c in enumerate(numbers)]
        numbers[4] = numbers[4].abs()
    x0_range = data.draw(st.sampled_from([None, (-1.0, 1.0), (-0.2, 3.0)]))
    variance_range = data.draw(st.sampled_from([None, (0.0, 1.0), (0.3, 0.3)]))
    most = data.draw(st.sampled_from([None, 0.0, 0.5]))
    step, first = data.draw(offsets(1)), data.draw(offsets(batch))
    found = kernels.gaussian_step(
        x,
        prediction,
        variance,
        StepCoefficients(*numbers),
        seed=noise_seed,
        step=step,
        sample_offset=first,
        x0_range=x0_range,
        variance_range=variance_range,
        max_noise_std=most,
    )
    assert found.dtype == dtype
    assert found.is_contiguous()
    p, q, a, b, c, k = (
        value.reshape(-1, *[1] * len(shape)) if per_sample else value for value in numbers
    )
    z = kernels.normal(full, noise_seed, step=step, sample_offset=first).double()
    x0_hat = p * x.double() + q * prediction.double()
    x0_hat = x0_hat if x0_range is None else x0_hat.clamp(*x0_range)
    v = torch.as_tensor(variance).double()
    v = v if variance_range is None else v.clamp(*variance_range)
    noise_variance = (c + k * v).clamp(0.0, math.inf if most is None else most**2)
    expected = a * x.double() + b * x0_hat + noise_variance.sqrt() * z
    # Next to 0 a variance's rounding of 1e-7 is a standard deviation of 5e-4.
    slack = 1e-3 if dtype == torch.float32 else STEP[dtype]
    uncertain = (noise_variance < 1e-4).expand_as(expected) & (dtype != torch.float64)
    error = (found.double() - expected).abs()
    allowed = STEP[dtype] * (1 + expected.abs()) * 4
    assert bool((error <= torch.where(uncertain, allowed + 10 * slack, allowed)).all())


@given(st.data(), SHAPES, BATCHES, st.integers(1, 40), DTYPES, LAYOUTS, TENSOR_SEEDS, SEEDS)
def test_moments_are_those_of_float64_in_any_parts(
    data, shape, batch, probes, dtype, layout, seed, probe_seed
):
    products = of_type((probes, batch, *shape), seed, dtype, layout)
    at = {"sample_offset": data.draw(offsets(batch))}
    first = data.draw(offsets(probes))
    signs = kernels.rademacher(products.shape, probe_seed, probe_offset=first, **at)
    y = products.double() * signs.double()
    whole = kernels.probe_moments(products, probe_seed, probe_offset=first, **at)
    given_probes = probe_moments_from_probes(products, signs)
    state = None
    for part in parts(data.draw(splits(probes))):
        state = kernels.probe_moments(
            products[part], probe_seed, state=state, probe_offset=first + part.start, **at
        )
    eps = 1e-12 if dtype == torch.float64 else 1e-5
    for found in (whole, given_probes, state):
        assert found.num_probes == probes
        torch.testing.assert_close(found.mean.double(), y.mean(0), rtol=eps, atol=eps)
        expected = (y - y.mean(0)).square().sum(0)
        torch.testing.assert_close(
            found.squared_deviations.double(), expected, rtol=10 * eps, atol=10 * eps
        )
    assert torch.equal(whole.mean, state.mean)


@given(st.data(), SHAPES, BATCHES, st.integers(1, 5), DTYPES, LAYOUTS, TENSOR_SEEDS, SEEDS)
def test_the_loss_and_its_gradient_are_their_formulas(
    data, shape, batch, probes, dtype, layout, seed, probe_seed
):
    head = of_type((batch, *shape), seed, dtype, layout).detach().requires_grad_()
    products = of_type((probes, batch, *shape), seed + 1, dtype, layout)
    numbers = [0.5, 1.5, -0.2]
    if data.draw(st.booleans()):
        numbers = [n + 0.1 * tensor((batch,), seed + i) for i, n in enumerate(numbers)]
    first = data.draw(offsets(probes))
    w, a, b = (
        torch.as_tensor(n, dtype=torch.float64).reshape(-1, *[1] * len(shape)) for n in numbers
    )
    loss = kernels.ocm_loss(
        head,
        products,
        probe_seed,
        weight=numbers[0],
        scale=numbers[1],
        shift=numbers[2],
        probe_offset=first,
    )
    (gradient,) = torch.autograd.grad(loss, head)
    signs = kernels.rademacher(products.shape, probe_seed, probe_offset=first).double()
    residual = head.detach().double() - a * (signs * products.double()).mean(0) - b
    eps = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2**-6)
    expected = (w * residual.square()).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=eps, atol=1e-6)
    expected = 2 * w * residual / residual.numel()
    torch.testing.assert_close(gradient.double(), expected, rtol=eps, atol=eps)


@given(
    st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 5)] * 4),
    st.booleans(),
    st.booleans(),
    LAYOUTS,
    TENSOR_SEEDS,
)
def test_attention_and_its_derivative_are_those_of_the_formula(sizes, causal, masked, layout, seed):
    batch, heads, queries, keys, width, value_width = sizes
    shapes = [(queries, width), (keys, width), (keys, value_width)]
    q, k, v = (of_type((batch, heads, *s), seed + i, torch.float64, layout)
               for i, s in enumerate(shapes))  # fmt: skip
    dq, dk, dv = (of_type((2, *x.shape), seed + 5 + i, torch.float64, layout)
                  for i, x in enumerate((q, k, v)))  # fmt: skip
    mask = tensor((queries, keys), seed + 9) if masked and not causal else None

    def attend(q, k, v):
        scores = q @ k.mT / math.sqrt(width)
        if mask is not None:
            scores = scores + mask
        if causal:
            scores = scores.masked_fill(
                torch.ones(queries, keys, dtype=torch.bool).triu(1), -math.inf
            )
        return scores.softmax(-1) @ v

    out, tangent = kernels.attention_jvp(q, k, v, dq, dk, dv, attn_mask=mask, is_causal=causal)
    for i in range(2):
        expected, change = torch.func.jvp(attend, (q, k, v), (dq[i], dk[i], dv[i]))
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(tangent[i], change, rtol=1e-9, atol=1e-11)
