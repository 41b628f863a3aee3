"""Standard errors and intervals: the quantiles, and that they cover, from few blocks on."""

import pytest
import torch
from scipy import stats

import hessdiag
from hessdiag.intervals import error_quantile, half_width, standard_error, student_quantile
from hessdiag.probes import BalancedColoring, Coloring, Normal, Rademacher

SEEDS = 2000


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 50, 199, 200, 201, 5000])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_student_quantiles_are_those_of_scipy(level, degrees):
    expected = stats.t.ppf((1 + level) / 2, degrees)
    assert student_quantile(level, degrees) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("independent", [2, 4, 32, 400])
@pytest.mark.parametrize("degrees", [3, 15, 63])
def test_error_quantiles_are_those_of_the_f_distribution(independent, degrees):
    expected = stats.f.ppf(0.95, independent, independent * degrees) ** 0.5
    assert error_quantile(independent, degrees) == pytest.approx(expected, rel=0.01)


def test_error_quantiles_of_too_little_are_infinite():
    assert error_quantile(1, 0) == float("inf")
    assert error_quantile(2, 1) > 4


def linear(A):
    return lambda x: (x.flatten(1) @ A.T.to(x.dtype)).reshape(x.shape)


def dense(size, seed=0):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def decaying(shape, rate):
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).float()[:, 1:]
    return dense(len(places)) * torch.exp(-rate * torch.cdist(places, places))


def partners(size):
    """One entry off the diagonal in each row."""
    return torch.eye(size) + 0.7 * torch.eye(size).roll(size // 2, 0)


IMAGE = (3, 8, 8)
LINES = {
    "coloring, 2 blocks": (decaying(IMAGE, 2.0), IMAGE, Coloring(48), 96),
    "coloring, 3 blocks": (decaying(IMAGE, 1.0), IMAGE, Coloring(12), 36),
    **{
        f"one entry a row, {M} probes": (partners(32), (32,), Rademacher(), M)
        for M in (2, 3, 4, 5, 6)
    },
    "orthogonal, I + 11'/D": (torch.eye(64) + 1 / 64, (64,), BalancedColoring(32), 64),
    "dense, 2 probes": (dense(48), (48,), Rademacher(), 2),
    "dense, 16 probes": (dense(48), (48,), Rademacher(), 16),
    "dense, 64 normal probes": (dense(48), (48,), Normal(), 64),
    "a row of one scale, a row of another": (
        torch.logspace(-2, 0, 48)[:, None] * dense(48),
        (48,),
        Rademacher(),
        8,
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_intervals_cover(line):
    """A nominal 95%, over 2,000 samples with random numbers of their own."""
    A, shape, design, max_probes = LINES[line]
    x = torch.zeros(1, *shape).expand(SEEDS, *shape)
    result = hessdiag.estimate(linear(A), x, probes=design, max_probes=max_probes, mode="jvp")
    low, high = result.interval(0.95)
    truth = A.diagonal().reshape(shape)
    covered = ((low <= truth + 1e-5) & (truth - 1e-5 <= high)).double().mean()
    assert covered >= 0.93
    if line.startswith("dense") and max_probes > 2:
        assert covered <= 0.97


@pytest.mark.parametrize(
    ("A", "shape", "probes", "rtol"),
    [
        (decaying(IMAGE, 2.0), IMAGE, "auto", 0.05),
        (decaying(IMAGE, 0.5), IMAGE, "auto", 0.2),
        (decaying(IMAGE, 1.0), IMAGE, "coloring", 0.1),
        (dense(48) / 5 + torch.eye(48), (48,), "rademacher", 0.2),
        (torch.eye(48) + 0.3, (48,), "rademacher", 0.2),
        (dense(4) / 3 + torch.eye(4), (4,), "rademacher", 0.2),
    ],
)
def test_stopping_at_a_tolerance_leaves_the_coverage(A, shape, probes, rtol):
    x = torch.zeros(1, *shape).expand(SEEDS, *shape)
    result = hessdiag.estimate(linear(A), x, probes=probes, max_probes=2000, rtol=rtol, mode="jvp")
    assert result.converged.all()
    low, high = result.interval(0.95)
    truth = A.diagonal().reshape(shape)
    assert ((low <= truth + 1e-5) & (truth - 1e-5 <= high)).double().mean() >= 0.93
    # Nor does it pull the estimate to one side.
    error = result.diagonal - truth
    assert error.mean().abs() <= 5 * error.flatten(1).mean(1).std() / SEEDS**0.5 + 1e-6
    within = error.flatten(1).norm(dim=1) <= rtol * truth.norm() + 1e-6
    assert within.double().mean() >= 0.93


@pytest.mark.parametrize(("deviation", "converges"), [(30, False), (10, True)])
def test_a_trace_within_its_tolerance_or_said_not_to_be(deviation, converges):
    """A trace of 2 with a standard deviation of 30 for each probe, which 1,500 cannot reach."""
    size = 16
    A = torch.triu(torch.randn(size, size, generator=torch.Generator().manual_seed(3)), 1)
    A = deviation * A / A.norm() + torch.eye(size) * 2 / size
    x = torch.zeros(1, size).expand(SEEDS, size)
    result = hessdiag.trace(linear(A), x, max_probes=1500, rtol=0.5, mode="jvp")
    good = (result.trace - 2).abs() <= 0.5 * 2
    assert (good | ~result.converged).double().mean() >= 0.93
    assert (result.converged.double().mean() > 0.9) == converges
    low, high = result.interval()
    assert ((low <= 2) & (2 <= high)).double().mean() >= 0.93
    assert (result.num_probes[~result.converged] == 1500).all()


def test_entries_whose_blocks_agree_are_not_certain():
    deviations = torch.tensor([[0.0, 3.0, 3.0, 0.0] * 4])
    error = standard_error(2, deviations)
    expected = (error[0, 1] / 2**0.5).expand(8)
    torch.testing.assert_close(error[deviations == 0], expected)
    # Rounding is no deviation.
    assert standard_error(2, deviations + 1e-12)[0, 0] == pytest.approx(error[0, 0].item())
    many = standard_error(16, deviations)
    assert 0 < many[0, 0] < 0.02 * many[0, 1]


def test_agreement_everywhere_is_exact_where_luck_is_out_of_the_question():
    assert (standard_error(2, torch.zeros(1, 64)) == 0).all()
    assert (standard_error(16, torch.zeros(1, 1)) == 0).all()
    assert torch.isinf(standard_error(2, torch.zeros(1, 4))).all()
    assert torch.isinf(standard_error(5, torch.zeros(1))).all()


def test_one_block_covers_everything_and_no_chance_nothing():
    stderr = torch.tensor([[float("inf")], [0.0]])
    assert half_width(stderr, torch.tensor([1, 1]), 0.95).tolist() == [[float("inf")], [0.0]]


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95])
def test_levels_that_are_none(level):
    result = hessdiag.estimate(torch.sin, torch.zeros(1, 2), max_probes=2)
    with pytest.raises(ValueError, match=f"level must lie between 0 and 1, got {level}"):
        result.interval(level)


def test_converged_is_for_tolerances():
    x = torch.zeros(2, 4)
    assert hessdiag.estimate(torch.sin, x, max_probes=2).converged is None
    result = hessdiag.estimate(torch.sin, x, max_probes=64, rtol=0.1)
    assert result.converged.tolist() == [True, True]
    assert result.num_probes.tolist() == [16, 16]
    one_probe = hessdiag.estimate(torch.sin, x, max_probes=1, rtol=0.1)
    assert one_probe.converged.tolist() == [False, False]
