"""Bad input of the functions of hessdiag.kernels."""

import math

import numpy as np
import torch
from bad_input import cases_of, close, holds, run, shaped, table

import hessdiag.kernels as kernels

NAN, INF = math.nan, math.inf
X = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -3.0]])
PRODUCTS = torch.arange(24.0).reshape(3, 2, 4).cos()
COEFFICIENTS = kernels.StepCoefficients(0.0, 1.0, 0.5, 1.0, 0.0, 0.0)
QUERY = torch.arange(48.0).reshape(2, 2, 3, 4).sin()


rademacher = cases_of(kernels.rademacher, shape=(2, 2, 3), seed=0)
normal = cases_of(kernels.normal, shape=(2, 3), seed=0)
moments = cases_of(kernels.probe_moments, products=PRODUCTS, seed=0)
step = cases_of(
    kernels.gaussian_step,
    x_t=X,
    prediction=2 * X,
    variance=0.0,
    coefficients=COEFFICIENTS,
    seed=0,
    step=1,
)
loss = cases_of(kernels.ocm_loss, head=torch.ones(2, 4), products=PRODUCTS, seed=0)
attention = cases_of(
    kernels.attention_jvp, query=QUERY, key=QUERY, value=QUERY, value_tangent=QUERY
)

STATE = kernels.Moments(3, torch.zeros(2, 4), torch.zeros(2, 4))

RANDOM = [
    rademacher("a shape that is None", TypeError, "shape must hold integers, got None", shape=None),
    rademacher("a shape that is a number", TypeError, "shape must hold integers, got 4", shape=4),
    rademacher("a shape of letters", TypeError, "shape must hold integers, got 'ab'", shape="ab"),
    rademacher("a shape of floats", TypeError, "shape must hold integers", shape=(2.0, 3)),
    rademacher("a shape without a batch", ValueError, "(M, B, ...)", "(4,)", shape=(4,)),
    rademacher("a negative size", ValueError, "at least 0", "(-1, 2)", shape=(-1, 2)),
    rademacher("a batch beyond 32 bits", ValueError, "at most 2**32", shape=(1, 2**33)),
    rademacher("a seed below 0", ValueError, "seed must lie in [0, 2**64), got -1", seed=-1),
    rademacher("a seed of 65 bits", ValueError, "[0, 2**64)", "18446744073709551616", seed=2**64),
    rademacher("a seed that is a float", TypeError, "seed must be an int", "float", seed=1.5),
    rademacher("a seed that is a boolean", TypeError, "seed must be an int", "bool", seed=True),
    rademacher("a seed tensor of floats", TypeError, "int64 tensor", seed=torch.tensor(1.0)),
    rademacher("two seeds", ValueError, "one element", "(2,)", seed=torch.tensor([1, 2])),
    rademacher("no seed in a tensor", ValueError, "one element", seed=torch.empty(0).long()),
    rademacher(
        "a seed without data",
        ValueError,
        "seed must hold a number, got a tensor on the meta device",
        seed=torch.tensor(1, device="meta"),
    ),
    rademacher("signs of integers", TypeError, "dtype must be one of", dtype=torch.int64),
    rademacher("signs of 8 bits", TypeError, "dtype must be one of", dtype=torch.float8_e4m3fn),
    rademacher("a probe below 0", ValueError, "probe_offset must be at least 0", probe_offset=-1),
    rademacher("a probe of 33 bits", ValueError, "probe_offset + 2 must", probe_offset=2**32 - 1),
    rademacher("half a sample", TypeError, "sample_offset must be an int", sample_offset=0.5),
    normal("a stream of signs", ValueError, "stream must be 1 (probes) or 2", "got 0", stream=0),
    normal("a stream that is a float", ValueError, "stream must be 1", "got 1.0", stream=1.0),
    normal("a stream that is a boolean", ValueError, "stream must be 1", "True", stream=True),
    normal("a step below 0", ValueError, "step must be at least 0, got -1", step=-1),
    normal("half a step", TypeError, "step must be an int, got float", step=0.5),
    normal("no shape", ValueError, "shape must be (B, ...)", "()", shape=()),
    rademacher("no samples have no signs", shape=(3, 0, 5), check=shaped(3, 0, 5)),
    normal(
        "a seed of NumPy is that of Python",
        seed=np.uint64(2**63),
        check=lambda found: holds(torch.equal(found, kernels.normal((2, 3), 2**63))),
    ),
    rademacher(
        "the last probe of 32 bits",
        shape=(1, 2, 3),
        probe_offset=2**32 - 1,
        check=lambda found: holds(torch.equal(found.abs(), torch.ones(1, 2, 3))),
    ),
]


def continued(found):
    """Moments of no products after those of three are those of three."""
    assert found.num_probes == 3
    assert torch.equal(found.mean, STATE.mean)


MOMENTS = [
    moments("products of integers", TypeError, "products must be a float32", products=X.long()),
    moments("products that are a list", TypeError, "products must be a torch", products=[[1.0]]),
    moments("products without a batch", ValueError, "(M, B, ...)", products=torch.ones(3)),
    moments(
        "products that share memory",
        ValueError,
        "products must not overlap itself",
        products=PRODUCTS[:1].expand(3, 2, 4),
    ),
    moments(
        "a state of another shape",
        ValueError,
        "state.mean must have shape (2, 4)",
        state=kernels.Moments(3, torch.zeros(2, 3), torch.zeros(2, 3)),
    ),
    moments(
        "a state in another precision",
        ValueError,
        "torch.float32",
        state=kernels.Moments(3, torch.zeros(2, 4).double(), torch.zeros(2, 4).double()),
    ),
    moments("a state that is a number", TypeError, "state must be", "int", state=3),
    moments("an empty state", TypeError, "state must be hessdiag.kernels.Moments", state=()),
    *(
        moments(
            f"a state of {count!r} probes",
            ValueError,
            "state.num_probes must be an int of at least 0",
            state=STATE._replace(num_probes=count),
        )
        for count in (-5, 1.5, NAN, True, torch.tensor(3))
    ),
    moments("no further products", state=STATE, products=PRODUCTS[:0], check=continued),
    moments(
        "samples that are none are counted as probes",
        products=PRODUCTS[:, :0],
        state=kernels.Moments(3, torch.zeros(0, 4), torch.zeros(0, 4)),
        check=lambda found: holds(found.num_probes == 6),
    ),
    moments(
        "a NaN stays in its entry",
        products=PRODUCTS.clone().index_put_((torch.tensor(1),) * 3, torch.tensor(NAN)),
        check=lambda found: holds(
            torch.equal(found.mean.isnan().nonzero(), torch.tensor([[1, 1]]))
        ),
    ),
]

STEPS = [
    step("x_t of integers", TypeError, "x_t must be a float32", x_t=X.long(), prediction=X.long()),
    step("no x_t", TypeError, "x_t must be a torch.Tensor, got NoneType", x_t=None),
    step(
        "x_t of no dimension",
        ValueError,
        "x_t must have a batch dimension",
        x_t=torch.tensor(1.0),
        prediction=torch.tensor(1.0),
    ),
    step("a prediction for fewer samples", ValueError, "prediction must", prediction=X[:1]),
    step("a prediction in float64", ValueError, "prediction must have", prediction=X.double()),
    step("a prediction elsewhere", ValueError, "prediction must be on", prediction=X.to("meta")),
    step("a variance of no kind", TypeError, "variance must be a number or a", variance=None),
    step("a variance that is a word", TypeError, "variance must be a number", variance="1"),
    step("a variance of integers", TypeError, "variance must be", variance=torch.tensor(1)),
    step("variances of three samples", ValueError, "broadcast", variance=torch.ones(3, 3)),
    step("variances of a batch, flat", ValueError, "broadcast", variance=torch.ones(2)),
    step("no coefficients", TypeError, "coefficients must be StepCoefficients", coefficients=None),
    step("a tuple of coefficients", TypeError, "coefficients must be", coefficients=(0.0, 1.0)),
    step(
        "coefficients of three samples",
        ValueError,
        "mean_from_x0 must be a number or a tensor of shape (2,), got 3 values",
        coefficients=COEFFICIENTS._replace(mean_from_x0=torch.ones(3)),
    ),
    step("a range that is reversed", ValueError, "x0_range must be (low, high)", x0_range=(1, -1)),
    step("a range from NaN", ValueError, "x0_range must be (low, high)", x0_range=(NAN, 1.0)),
    step("a range of one number", TypeError, "x0_range must be (low, high)", x0_range=(1.0,)),
    step("a range that is a number", TypeError, "x0_range must be (low, high)", x0_range=1.0),
    step("variances reversed", ValueError, "variance_range must be", variance_range=(1.0, 0.0)),
    step("less than no noise", ValueError, "max_noise_std must be at least 0", max_noise_std=-1.0),
    step("noise up to NaN", ValueError, "max_noise_std must be at least 0", max_noise_std=NAN),
    step("a step of 33 bits", ValueError, "step + 1 must be at most 2**32", step=2**32),
    step("no step number", TypeError, "step must be an int, got NoneType", step=None),
    # x0_hat = 2 x, x_s = 0.5 x + x0_hat, without noise.
    step("x_t of strides", x_t=X.T, prediction=2 * X.T, check=close(2.5 * X.T)),
    step("no samples", x_t=X[:0], prediction=X[:0], check=shaped(0, 3)),
    step("no features", x_t=X[:, :0], prediction=X[:, :0], check=shaped(2, 0)),
    step("an infinite range is none", x0_range=(-INF, INF), check=close(2.5 * X)),
    step(
        "NaN is not clipped to the range",
        prediction=X * NAN,
        x0_range=(-1.0, 1.0),
        check=lambda found: holds(bool(found.isnan().all())),
    ),
]

LOSSES = [
    loss("a head of integers", TypeError, "head must be a float32", head=torch.ones(2, 4).long()),
    loss("a head of one sample", ValueError, "products must have shape", head=torch.ones(1, 4)),
    loss("products in float64", ValueError, "dtype of head", products=PRODUCTS.double()),
    loss("no products", ValueError, "products must not be empty", products=PRODUCTS[:0]),
    loss(
        "products with a graph",
        ValueError,
        "must not require a gradient",
        products=PRODUCTS.clone().requires_grad_(),
    ),
    loss("three weights", ValueError, "weight must be a number or", weight=torch.ones(3)),
    loss("weights of entries", ValueError, "weight must be a number or", weight=torch.ones(2, 4)),
    # J = I, so that v * J v = 1: (3 - 2 * 1 - 0.5)^2
    loss(
        "half precision",
        head=torch.full((2, 4), 3.0).half(),
        products=kernels.rademacher((3, 2, 4), 0).half(),
        scale=2.0,
        shift=0.5,
        check=close(torch.tensor(0.25)),
    ),
]


def plain(found):
    """Attention and, of its value alone, the same of the tangent."""
    expected = torch.nn.functional.scaled_dot_product_attention(QUERY, QUERY, QUERY)
    torch.testing.assert_close(found, (expected, expected))


ATTENTION = [
    attention("a query of integers", TypeError, "query must be a float32", query=QUERY.long()),
    attention("a query of three dimensions", ValueError, "(B, H, L, E)", query=QUERY[0]),
    attention("no query", TypeError, "query must be a torch.Tensor", query=None),
    attention("a key of another width", ValueError, "query, key and value", key=QUERY[..., :2]),
    attention("a value of fewer keys", ValueError, "query, key and value", value=QUERY[:, :, :2]),
    attention(
        "fewer heads without enable_gqa",
        ValueError,
        "enable_gqa=True",
        key=QUERY[:, :1],
        value=QUERY[:, :1],
        value_tangent=None,
    ),
    attention("a tangent of one sample", ValueError, "value_tangent", value_tangent=QUERY[:1]),
    attention("a tangent in float64", TypeError, "float32", value_tangent=QUERY.double()),
    attention(
        "tangents of two numbers of probes",
        ValueError,
        "same number M of probes",
        value_tangent=QUERY.expand(5, 2, 2, 3, 4),
        key_tangent=QUERY.expand(4, 2, 2, 3, 4),
    ),
    attention("dropout", ValueError, "dropout_p must be 0, got 0.5", dropout_p=0.5),
    attention("a mask of integers", TypeError, "attn_mask must", attn_mask=torch.ones(3, 3).int()),
    attention("a mask too long", ValueError, "broadcast", attn_mask=torch.ones(4, 3).bool()),
    attention("a mask that hides nothing", attn_mask=torch.ones(3, 3).bool(), check=plain),
    attention(
        "a mask that hides all",
        attn_mask=torch.zeros(3, 3).bool(),
        check=lambda found: holds(not found[0].any() and not found[1].any()),
    ),
]


@table([*RANDOM, *MOMENTS, *STEPS, *LOSSES, *ATTENTION])
def test_bad_input_of_kernels(case, tmp_path):
    run(case, tmp_path)
