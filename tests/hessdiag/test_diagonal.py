"""hutchinson and exact: statistics, reproducibility, real networks, and errors."""

import warnings

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.kernels import rademacher

MODES = ["vjp", "jvp", "auto"]


@pytest.fixture(scope="module")
def matrix():
    return torch.randn(24, 24, generator=torch.Generator().manual_seed(1))


def linear(A):
    return lambda x: x @ A.T


class TestStatistics:
    """Mean and variance over 4,000 samples of 40 seeds against their formulas."""

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_mean_and_variance_on_a_linear_map(self, matrix, mode):
        M, count = 4, 4000
        x = torch.zeros(count // 40, 24)
        estimates = torch.cat(
            [hessdiag.hutchinson(linear(matrix), x, M, seed=seed, mode=mode) for seed in range(40)]
        ).double()
        A = matrix.double()
        energy = A.square().sum(dim=1 if mode == "jvp" else 0) - A.diagonal().square()
        expected_variance = energy / M
        standard_error = (expected_variance / count).sqrt()
        assert ((estimates.mean(dim=0) - A.diagonal()).abs() < 5 * standard_error).all()
        ratio = estimates.var(dim=0) / expected_variance
        assert (ratio - 1).abs().max() < 0.1

    def test_a_diagonal_jacobian_needs_one_probe(self):
        x = torch.randn(3, 2, 5)
        result = hessdiag.hutchinson(torch.sin, x, 1)
        torch.testing.assert_close(result, x.cos())


class TestReproducibility:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
    def test_chunks_do_not_change_a_bit(self, mode, chunk_size):
        # Elementwise and shifts only: the same product bit for bit, however it is batched.
        def score_fn(x):
            return torch.sin(x) * torch.roll(x, 1, dims=-1) - x**3

        x = torch.randn(4, 9)
        whole = hessdiag.hutchinson(score_fn, x, 7, mode=mode, chunk_size=7)
        assert torch.equal(
            hessdiag.hutchinson(score_fn, x, 7, mode=mode, chunk_size=chunk_size), whole
        )

    @pytest.mark.parametrize("chunk_size", [1, 3])
    def test_chunks_do_not_change_a_bit_on_a_unet(self, unet, chunk_size):
        x = torch.randn(2, 2, 8, 8)

        def estimate(chunk_size):
            # One probe at a time: products of several may round as their number has it.
            arguments = {"mode": "vjp", "batching": "loop", "chunk_size": chunk_size}
            return hessdiag.estimate(lambda x: unet(x, 9).sample, x, max_probes=5, **arguments)

        assert torch.equal(estimate(None).diagonal, estimate(chunk_size).diagonal)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_batch_whole_and_in_two_calls(self, matrix, mode):
        x = torch.randn(6, 24)

        def score_fn(x):
            # One row at a time, so that the matrix product rounds the same in any batch.
            return torch.stack([matrix @ row.tanh() for row in x])

        whole = hessdiag.hutchinson(score_fn, x, 5, seed=4, mode=mode, chunk_size=1)
        halves = [
            hessdiag.hutchinson(
                score_fn, part, 5, seed=4, mode=mode, sample_offset=first, chunk_size=1
            )
            for first, part in ((0, x[:2]), (2, x[2:]))
        ]
        assert torch.equal(torch.cat(halves), whole)

    def test_an_estimate_continues_where_another_ended(self, matrix):
        x = torch.randn(2, 24)
        first = hessdiag.hutchinson(linear(matrix), x, 3)
        second = hessdiag.hutchinson(linear(matrix), x, 5, probe_offset=3)
        together = hessdiag.hutchinson(linear(matrix), x, 8)
        torch.testing.assert_close((3 * first + 5 * second) / 8, together)

    def test_it_is_the_mean_of_probe_times_product(self, matrix):
        """A sum that is never divided by M, or a probe from elsewhere, would fail here."""
        x = torch.randn(3, 24)
        v = rademacher((6, 3, 24), 11, sample_offset=2)
        expected = (v * (v @ matrix)).mean(dim=0)
        result = hessdiag.hutchinson(linear(matrix), x, 6, seed=11, mode="vjp", sample_offset=2)
        torch.testing.assert_close(result, expected)


class TestExact:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("chunk_size", [None, 1, 5])
    def test_linear_map(self, matrix, mode, chunk_size):
        result = hessdiag.exact(
            linear(matrix), torch.randn(3, 24), mode=mode, chunk_size=chunk_size
        )
        torch.testing.assert_close(result, matrix.diagonal().expand(3, -1))

    def test_unet_against_jacrev(self, unet):
        x = torch.randn(2, 2, 8, 8)

        def score_fn(x):
            return unet(x, 9).sample

        def image_score(image):
            return score_fn(image[None])[0]

        jacobians = [torch.func.jacrev(image_score, chunk_size=1)(image) for image in x]
        expected = torch.stack([j.reshape(128, 128).diagonal() for j in jacobians])
        for mode in MODES:
            result = hessdiag.exact(score_fn, x, mode=mode).reshape(2, 128)
            assert (result - expected).norm() < 1e-4 * expected.norm()

    def test_hessian_of_a_scalar_function(self):
        x = torch.randn(2, 5, dtype=torch.float64)
        gradient = torch.func.grad(lambda x: (x.prod(dim=1) + x.pow(4).sum(dim=1)).sum())
        torch.testing.assert_close(hessdiag.exact(gradient, x), 12 * x**2)


class TestUNet:
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_every_mode_estimates_the_exact_diagonal(self, unet, mode):
        x = torch.randn(2, 2, 8, 8)

        def score_fn(x):
            return unet(x, 9).sample

        exact = hessdiag.exact(score_fn, x)
        groups = torch.stack(
            [hessdiag.hutchinson(score_fn, x, 16, mode=mode, probe_offset=16 * k) for k in range(8)]
        )
        standardised = (groups.mean(dim=0) - exact) / (groups.std(dim=0) / 8**0.5)
        # Student's t with 7 degrees of freedom: 95% within 2.36, and 1e-5 of entries beyond 10.
        assert standardised.abs().max() < 10.0
        assert (standardised.abs() < 2.36).float().mean() > 0.9

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_is_left_behind(self, unet, mode):
        unet.train()
        x = torch.randn(1, 2, 8, 8, requires_grad=True)
        before = x.detach().clone()
        for grad_enabled in (True, False):
            with torch.set_grad_enabled(grad_enabled):
                result = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x, 2, mode=mode)
                assert torch.is_grad_enabled() == grad_enabled
        assert not result.requires_grad
        assert x.grad is None
        assert x.requires_grad
        assert torch.equal(x, before)
        assert all(p.grad is None and p.requires_grad for p in unet.parameters())
        assert unet.training
        assert not unet.conv_in._forward_pre_hooks

    @pytest.mark.parametrize("mode", MODES)
    def test_inside_inference_mode(self, unet, mode):
        x = torch.randn(1, 2, 8, 8)
        expected = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x, 2, mode=mode)
        with torch.inference_mode():
            result = hessdiag.hutchinson(lambda x: unet(x, 9).sample, x + 0, 2, mode=mode)
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_every_way_works_inside_inference_mode(self, mode, batching):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1))
        x = torch.randn(2, 2, 8, 8)

        def estimate(x):
            arguments = {"max_probes": 3, "mode": mode, "batching": batching}
            return hessdiag.estimate(network, x, **arguments).diagonal

        expected = estimate(x)
        with torch.inference_mode():
            assert not torch.is_grad_enabled()
            result = estimate(x + 0)
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(result, expected)


class TestAuto:
    def test_it_warns_when_it_takes_forward_mode(self, matrix):
        score_fn = torch.no_grad()(linear(matrix))
        x = torch.randn(2, 24)
        with pytest.warns(
            UserWarning, match=r"mode='auto' takes forward mode: .*has no backward graph"
        ):
            result = hessdiag.hutchinson(score_fn, x, 3)
        torch.testing.assert_close(result, hessdiag.hutchinson(linear(matrix), x, 3, mode="jvp"))

    def test_it_warns_when_a_backward_rule_is_missing(self):
        class ForwardOnly(torch.autograd.Function):
            @staticmethod
            def forward(x):
                return x.sin()

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.save_for_forward(*inputs)

            @staticmethod
            def jvp(ctx, tangent):
                return tangent * ctx.saved_tensors[0].cos()

        x = torch.ones(1, 2)
        with pytest.warns(
            UserWarning, match=r"mode='auto' takes forward mode: .*use the other one"
        ):
            result = hessdiag.hutchinson(ForwardOnly.apply, x, 2, chunk_size=1)
        torch.testing.assert_close(result, x.cos())

    def test_it_is_silent_otherwise(self, matrix):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hessdiag.hutchinson(linear(matrix), torch.randn(2, 24), 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_x_is_kept(dtype):
    x = torch.linspace(0, 1, 8).to(dtype).reshape(2, 4)
    result = hessdiag.hutchinson(torch.sin, x, 3)
    assert result.dtype == dtype
    torch.testing.assert_close(result, x.cos(), rtol=1e-2, atol=1e-2)


def test_dropout_is_one_function_in_a_chunk():
    module = nn.Dropout(0.5)
    x = torch.ones(1, 200)
    result = hessdiag.hutchinson(module, x, 16, mode="jvp")
    assert set(result.unique().tolist()) == {0.0, 2.0}


def test_dropout_is_one_function_in_all_chunks():
    x, results = torch.ones(1, 40), []
    for chunk_size in (1, 5, 40):
        torch.manual_seed(0)
        results.append(hessdiag.exact(nn.Dropout(0.5), x, mode="jvp", chunk_size=chunk_size))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_function_that_writes_into_its_input(mode, chunk_size):
    x = torch.tensor([[1.0, 2.0, 3.0]])
    result = hessdiag.exact(lambda z: z.mul_(2).sub_(0.5) ** 2, x, mode=mode, chunk_size=chunk_size)
    assert torch.equal(result, torch.tensor([[6.0, 14.0, 22.0]]))
    assert torch.equal(x, torch.tensor([[1.0, 2.0, 3.0]]))


@pytest.fixture(scope="module")
def custom_sine():
    @torch.library.custom_op("hessdiag_tests::sine", mutates_args=())
    def sine(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    sine.register_fake(torch.empty_like)
    sine.register_autograd(
        lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return sine


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_custom_operator_is_refused_in_forward_mode(custom_sine, chunk_size):
    """torch.func.jvp would leave out its part of the derivative without a word."""

    def score_fn(x):
        return custom_sine(x) + x

    x = torch.ones(1, 2)
    torch.testing.assert_close(hessdiag.hutchinson(score_fn, x, 2), 1 + x.cos())
    with pytest.raises(ValueError, match=r"hessdiag_tests.sine.*use mode='vjp'"):
        hessdiag.hutchinson(score_fn, x, 2, mode="jvp", chunk_size=chunk_size)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda z: f(z).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(f)(x[None]),
    ],
)
def test_inside_a_transform_it_raises_rather_than_give_zero(transform):
    with pytest.raises(TypeError, match=r"x must not take part in torch.func.grad, jvp or vmap"):
        transform(lambda z: hessdiag.hutchinson(torch.sin, z, 2), torch.ones(2, 3))


def test_an_empty_batch():
    x = torch.zeros(0, 3)
    assert hessdiag.hutchinson(torch.sin, x, 2).shape == (0, 3)
    assert hessdiag.exact(torch.sin, x).shape == (0, 3)


NAN = torch.tensor([[1.0, float("nan")]])
ONES = torch.ones(2, 3)


class TestErrors:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("score_fn", "x", "error", "message"),
        [
            (torch.sin, torch.ones(2, 3, dtype=torch.int64), TypeError, "x must be.*int64"),
            (torch.sin, ONES.cfloat(), TypeError, "x must be.*complex64"),
            (torch.sin, [1.0, 2.0], TypeError, "x must be a torch.Tensor, got list"),
            (torch.sin, torch.tensor(1.0), ValueError, r"x must have shape \(B, \.\.\.\)"),
            (torch.sin, NAN, ValueError, "x must be finite, got 1 NaN.* of 2"),
            (lambda x: x[:, :2], ONES, ValueError, r"the shape of x, \(2, 3\), got \(2, 2\)"),
            (lambda x: x.sum(), ONES, ValueError, r"the shape of x, \(2, 3\), got \(\)"),
            (lambda x: x.double(), ONES, TypeError, "the dtype of x, torch.float32, got torch.fl"),
            (lambda x: (x, x), ONES, TypeError, "must return a torch.Tensor, got tuple; take"),
            (lambda x: None, ONES, TypeError, "must return a torch.Tensor, got NoneType"),
            (lambda x: torch.zeros(2, 3), ONES, ValueError, "score_fn does not depend|graph to x"),
            (lambda x: x.detach() * 2, ONES, ValueError, "score_fn does not depend|graph to x"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:mode='auto'")
    def test_of_x_and_score_fn(self, mode, score_fn, x, error, message):
        with pytest.raises(error, match=message):
            hessdiag.hutchinson(score_fn, x, 2, mode=mode)
        with pytest.raises(error, match=message):
            hessdiag.exact(score_fn, x, mode=mode)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"M": 0}, ValueError, "M must be at least 1, got 0"),
            ({"M": -3}, ValueError, "M must be at least 1, got -3"),
            ({"M": 2.5}, TypeError, "M must be an int, got 2.5 of type float"),
            ({"M": True}, TypeError, "M must be an int, got True"),
            ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
            ({"mode": "reverse"}, ValueError, "mode must be one of auto, vjp, jvp, got 'reverse'"),
            ({"seed": -1}, ValueError, "seed must lie in"),
            ({"seed": "a"}, TypeError, "seed must be an int.*str"),
            ({"sample_offset": -1}, ValueError, "sample_offset must be at least 0, got -1"),
            ({"sample_offset": 2**32}, ValueError, "sample_offset"),
        ],
    )
    def test_of_the_other_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            hessdiag.hutchinson(torch.sin, ONES, **{"M": 2, **arguments})

    @pytest.mark.parametrize("count", [2, 2000])
    def test_output_that_depends_on_parameters_alone(self, count):
        weight = nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=r"does not depend on x|no backward graph to x"):
            hessdiag.hutchinson(lambda x: weight * x.detach(), torch.ones(count, 3), 2, mode="vjp")
