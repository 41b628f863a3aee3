"""The diagonal of the Hessian over parameters: against the matrix, in little memory."""

import math

import pytest
import torch
from harness.memory import peak_bytes
from small_classifier import flat, small_classifier
from torch import nn

import hessdiag
from hessdiag import parameter_vectors
from hessdiag.kernels import rademacher


@pytest.fixture(scope="module")
def problem():
    return small_classifier()


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_against_the_matrix(problem, mode):
    def total(p):
        return problem.loss(problem.model(p))

    H, parameters = problem.hessian(), problem.parameters
    exact = hessdiag.parameter_hessian_diagonal(
        total, parameters, max_probes=len(H), probes="auto", mode=mode
    )
    assert {name: p.shape for name, p in exact.diagonal.items()} == {
        name: p.shape for name, p in parameters.items()
    }
    torch.testing.assert_close(flat(exact.diagonal), H.diagonal())
    M = 200
    rough = hessdiag.parameter_hessian_diagonal(total, parameters, max_probes=M, mode=mode)
    assert (rough.num_probes, rough.mode) == (M, mode)
    error = (H.square().sum(1) - H.diagonal().square()).div(M).sqrt()
    assert ((flat(rough.diagonal) - H.diagonal()).abs() < 5 * error).all()
    assert ((flat(rough.stderr) / error - 1).abs() < 0.4).all()
    assert all(p.grad is None for p in parameters.values())


def test_is_the_mean_over_the_probes_of_the_contract(problem):
    """Signs of one sample, its features numbered over the tree: 21 probes, in two tiles."""
    H, M = problem.hessian(), 21
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: problem.loss(problem.model(p)),
        problem.parameters,
        max_probes=M,
        seed=3,
        probe_offset=11,
    )
    v = rademacher((M, 1, len(H)), 3, probe_offset=11, dtype=torch.float64)[:, 0]
    y = v * (v @ H)
    torch.testing.assert_close(flat(result.diagonal), y.mean(0))
    torch.testing.assert_close(flat(result.stderr), y.std(0) / math.sqrt(M))


def test_calls_in_parts_give_the_probes_of_one_call(problem):
    def run(M, first):
        return hessdiag.parameter_hessian_diagonal(
            lambda p: problem.loss(problem.model(p)),
            problem.parameters,
            max_probes=M,
            probe_offset=first,
        ).diagonal

    whole, first, second = flat(run(30, 0)), flat(run(10, 0)), flat(run(20, 10))
    torch.testing.assert_close(whole, (first + 2 * second) / 3)


@pytest.mark.parametrize("probes", ["orthogonal", hessdiag.BalancedColoring(4)])
def test_designs_do_not_depend_on_chunks(problem, probes):
    results = [
        hessdiag.parameter_hessian_diagonal(
            lambda p: problem.loss(problem.model(p)),
            problem.parameters,
            max_probes=8,
            probes=probes,
            chunk_size=chunk_size,
        )
        for chunk_size in (1, 3, "auto")
    ]
    for result in results[1:]:
        assert torch.equal(flat(result.diagonal), flat(results[0].diagonal))
        assert torch.equal(flat(result.stderr), flat(results[0].stderr))


def test_without_standard_errors_the_estimate_is_the_same(problem):
    def run(**options):
        return hessdiag.parameter_hessian_diagonal(
            lambda p: problem.loss(problem.model(p)), problem.parameters, max_probes=5, **options
        )

    plain = run(stderr=False)
    assert plain.stderr is None
    assert torch.equal(flat(plain.diagonal), flat(run().diagonal))
    with pytest.raises(ValueError, match="stderr must be True with rtol or atol"):
        run(stderr=False, rtol=0.1)


def test_tolerance(problem):
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: problem.loss(problem.model(p)), problem.parameters, max_probes=5000, rtol=0.1
    )
    assert 16 <= result.num_probes < 5000
    assert result.num_probes % 16 == 0
    assert flat(result.stderr).norm() <= 0.1 * flat(result.diagonal).norm()


@pytest.mark.parametrize("features", [1, 8, 13, 8 * parameter_vectors._GROUPS_AT_A_TIME + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_signs_are_those_of_the_contract(features, dtype):
    seed = torch.tensor(-7)
    signs = parameter_vectors.sign_vectors(features, seed, dtype, sample=2)
    for probe in (3, 4, 31, 0):
        expected = rademacher(
            (1, 1, features), seed, probe_offset=probe, sample_offset=2, dtype=dtype
        )
        assert torch.equal(signs(probe), expected[0, 0])
        assert signs(probe).dtype == dtype


@pytest.mark.parametrize("size", [400, 1000])
def test_memory_in_sizes_of_the_parameters(size):
    """By hand it is 6.9 times; gradient, probe, product, mean, deviations and bits are 5.5."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))
    x = torch.randn(2, size)
    parameters = dict(module.named_parameters())

    def loss(p):
        return torch.func.functional_call(module, p, (x,)).square().mean()

    peak = peak_bytes(lambda: hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=17))
    assert peak < 9 * sum(p.nbytes for p in parameters.values())


def test_dropout_is_the_same_for_every_product():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    n = sum(p.numel() for p in parameters.values())

    def loss(p):
        return torch.func.functional_call(module, p, (x,)).square().mean()

    diagonals = []
    for mode in ("vjp", "jvp"):
        torch.manual_seed(1)
        result = hessdiag.parameter_hessian_diagonal(
            loss, parameters, max_probes=n, probes="auto", mode=mode
        )
        diagonals.append(flat(result.diagonal))
    torch.testing.assert_close(*diagonals)


@pytest.mark.parametrize("mode", ["auto", "vjp", "jvp"])
def test_attention(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)

    def loss(p):
        return torch.func.functional_call(layer, p, (x,)).pow(3).mean()

    parameters = {"linear1.bias": layer.linear1.bias.detach()}
    result = hessdiag.parameter_hessian_diagonal(
        loss, parameters, max_probes=8, probes="auto", mode=mode
    )
    H = torch.func.hessian(lambda b: loss({"linear1.bias": b}))(parameters["linear1.bias"])
    torch.testing.assert_close(result.diagonal["linear1.bias"], H.detach().diagonal())
    assert "mode" not in result.note


class NoSecondBackward(torch.autograd.Function):
    """The sine, whose backward pass keeps no graph; it has a rule for forward mode."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no rule")


def test_what_cannot_be_differentiated_says_so():
    with pytest.raises(RuntimeError, match="no rule"):
        hessdiag.parameter_hessian_diagonal(
            lambda p: NoSecondBackward.apply(p).sum(), torch.ones(3), max_probes=1
        )
    with pytest.raises(ValueError, match="loss has no backward graph to parameters"):
        hessdiag.parameter_hessian_diagonal(
            lambda p: torch.tensor(1.0), torch.ones(3), max_probes=1
        )


def test_a_linear_loss_and_an_unused_parameter_have_no_curvature():
    parameters = {"used": torch.ones(2), "unused": torch.ones(3)}
    for loss in (lambda p: p["used"].sum(), lambda p: p["used"].pow(2).sum()):
        for mode in ("vjp", "jvp"):
            result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=2, mode=mode)
            assert torch.equal(result.diagonal["unused"], torch.zeros(3))
    linear = hessdiag.parameter_hessian_diagonal(
        lambda p: p["used"].sum(), parameters, max_probes=2
    )
    assert torch.equal(linear.diagonal["used"], torch.zeros(2))


def test_products_that_share_memory_are_not_written_into():
    """The gradient of p^2 / 2 is p, and its product with v may be v itself."""
    parameters = [torch.ones(3), torch.ones(3)]
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: (p[0] * p[1]).sum() + p[0].square().sum() / 2, parameters, max_probes=16
    )
    v = rademacher((16, 1, 6), 0)[:, 0]
    H = torch.eye(3).repeat(2, 2)
    H[3:, 3:] = 0
    torch.testing.assert_close(torch.cat(result.diagonal), (v * (v @ H)).mean(0))


@pytest.mark.parametrize("probes", ["auto", hessdiag.UnitVectors()])
def test_no_more_unit_vectors_than_there_are_parameters(probes):
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: p.pow(3).sum(), torch.ones(5), max_probes=50, probes=probes
    )
    assert result.num_probes == 5
    assert torch.equal(result.diagonal, torch.full((5,), 6.0))


@pytest.mark.parametrize("max_probes", [50, 51, 52, 60, 400, 2000])
def test_a_tolerance_that_auto_cannot_miss(max_probes):
    """The unit vectors always fit, whatever two rows seem to say."""
    A = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    H = A @ A.T
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: 0.5 * p @ H @ p, torch.zeros(50), max_probes=max_probes, probes="auto", rtol=0.05
    )
    assert result.converged
    error = (result.diagonal - H.diagonal()).square().mean().sqrt()
    assert error <= 0.05 * H.diagonal().square().mean().sqrt()
    assert "UnitVectors" in result.note or "unit vectors" in result.note


@pytest.mark.parametrize("M", [4, 16, 64])
def test_intervals_hold_the_truth_as_often_as_they_say(M):
    A = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    H = A @ A.T
    parameters = {"w": torch.zeros(20, 2), "b": torch.tensor(1.0)}

    def loss(p):
        return 0.5 * p["w"].flatten() @ H @ p["w"].flatten() + p["b"] ** 2

    held = []
    for seed in range(50):
        result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=M, seed=seed)
        assert result.num_blocks == M
        low, high = result.interval(0.9)
        truth = H.diagonal().reshape(20, 2)
        held.append(((low["w"] <= truth) & (truth <= high["w"])).float().mean())
        assert low["b"] == high["b"] == 2.0  # which nothing disturbs
    # From few blocks the floor makes them wider than they need be.
    assert 0.86 < torch.stack(held).mean() < (0.99 if M < 8 else 0.94)


@pytest.mark.parametrize(
    ("probes", "blocks"),
    [("orthogonal", 2), (hessdiag.BalancedColoring(3), 4), (hessdiag.Normal(), 12)],
)
def test_blocks_of_a_design_are_counted(problem, probes, blocks):
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: problem.loss(problem.model(p)), problem.parameters, max_probes=12, probes=probes
    )
    assert result.num_blocks == blocks
    low, high = result.interval()
    for a, b, found in zip(*map(dict.values, (low, high, result.diagonal)), strict=True):
        assert (a <= found).all()
        assert (found <= b).all()


def test_intervals_of_what_is_exact_are_points_and_others_ask_for_standard_errors(problem):
    def total(p):
        return problem.loss(problem.model(p))

    exact = hessdiag.parameter_hessian_diagonal(
        total, problem.parameters, max_probes=43, probes="auto"
    )
    low, high = exact.interval()
    assert all(torch.equal(low[name], high[name]) for name in low)
    (low, _) = hessdiag.parameter_hessian_diagonal(
        total, problem.parameters, max_probes=1
    ).interval()
    assert all(bool((part == -math.inf).all()) for part in low.values())
    without = hessdiag.parameter_hessian_diagonal(
        total, problem.parameters, max_probes=4, stderr=False
    )
    with pytest.raises(ValueError, match="stderr must have been kept for an interval, got None"):
        without.interval()


def test_one_number_for_each_tensor(problem):
    H = problem.hessian().diagonal()
    result = hessdiag.parameter_hessian_diagonal(
        lambda p: problem.loss(problem.model(p)), problem.parameters, max_probes=43, probes="auto"
    )
    sums = [part.sum() for part in problem.restore(H).values()]
    torch.testing.assert_close(list(result.sum_of_each().values()), sums)
    means = [part.mean() for part in problem.restore(H).values()]
    torch.testing.assert_close(list(result.mean_of_each().values()), means)


@pytest.mark.parametrize(
    ("parameters", "loss", "error", "message"),
    [
        ({}, torch.sum, ValueError, "parameters must hold at least one tensor"),
        ({"a": 3.0}, torch.sum, TypeError, "parameters must hold tensors only, got float"),
        (
            [torch.zeros(1), torch.zeros(1).double()],
            torch.sum,
            TypeError,
            r"parameters must be of one type on one device, got torch.float32 on cpu, torch.f",
        ),
        (torch.tensor([math.nan]), torch.sum, ValueError, "parameters must be finite"),
        (torch.zeros(2), torch.sin, ValueError, r"loss must return a 0-dim.*, got \(2,\)"),
    ],
)
def test_errors(parameters, loss, error, message):
    with pytest.raises(error, match=message):
        hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=1)


def test_errors_of_options():
    with pytest.raises(ValueError, match="mode must be one of auto, vjp, jvp, got 'both'"):
        hessdiag.parameter_hessian_diagonal(torch.sum, torch.ones(2), max_probes=1, mode="both")
    with pytest.raises(ValueError, match="max_probes must be at least 1, got 0"):
        hessdiag.parameter_hessian_diagonal(torch.sum, torch.ones(2), max_probes=0)


def test_a_tolerance_is_not_reached_by_luck():
    """Both of two entries err alike, so that their standard errors alone would stop too early."""

    def loss(w):
        return 3 * w[0] * w[1] + w[0] ** 2

    truth, seeds = torch.tensor([2.0, 0.0]), range(60)
    met = 0
    for seed in seeds:
        result = hessdiag.parameter_hessian_diagonal(
            loss, torch.ones(2), max_probes=4096, rtol=0.7, seed=seed
        )
        error = (result.diagonal - truth).square().mean().sqrt()
        met += bool(error <= 0.7 * truth.square().mean().sqrt())
    assert met >= 0.9 * len(seeds)


@pytest.mark.parametrize("M", [2, 3, 4])
def test_entries_whose_probes_agree_are_not_certain(M):
    """One entry off the diagonal in each row: half of the pairs of probes agree, and are wrong."""
    size = 64
    H = torch.eye(size) + 0.7 * torch.eye(size).roll(size // 2, 0)

    def loss(p):
        return p["w"] @ H @ p["w"] / 2 + p["b"].sum()

    parameters = {"w": torch.ones(size), "b": torch.zeros(3)}
    result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=M)
    wrong = (result.diagonal["w"] - 1).abs() > 1e-3
    assert wrong.any()
    assert (result.stderr["w"][wrong] > 0.1).all()
    assert torch.equal(result.stderr["b"], torch.zeros(3))
    assert result.converged is None


def test_whether_the_tolerance_was_reached():
    def loss(p):
        return (p.square().sum() + 0.1 * p.sum().square()) / 2

    p = torch.ones(20)
    few, enough = (
        hessdiag.parameter_hessian_diagonal(loss, p, max_probes=M, rtol=0.1) for M in (16, 500)
    )
    assert few.converged.item() is False
    assert enough.converged.item() is True
    assert enough.num_probes < 500
