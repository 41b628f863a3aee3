"""The suite `inverse`: azula's solvers against ours where they are the same, and its scores."""

import math

import pytest
import torch
from harness import azula_solvers, gaussian_flow
from suites import inverse

import ocm
from hessdiag.kernels import normal

pytest.importorskip("azula", reason="a library of benchmarks/peers.txt")

DATA = gaussian_flow.correlated_gaussian(6)
STEPS = [100, 400, 700, 950]
A = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROBLEM = azula_solvers.Problem(
    "random", lambda x: x @ A.T, lambda y: y @ torch.linalg.pinv(A).T, noise_std=0.1
)


def ours(y, **options):
    denoiser = gaussian_flow.exact_denoiser("linear", DATA)
    return ocm.sample_given_measurement(
        denoiser,
        ocm.Full(denoiser),
        y,
        PROBLEM.operator,
        noise_std=0.1,
        shape=(len(y), 6),
        steps=STEPS,
        draw_x0=False,
        x0_range=None,
        dtype=torch.float64,
        **options,
    )


def theirs(method, y, **options):
    denoiser = gaussian_flow.exact_denoiser("linear", DATA)
    return azula_solvers.solve(method, denoiser, PROBLEM, y, (len(y), 6), STEPS, seed=0, **options)


def measured(count):
    return normal((count, 3), 5).double()


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_mmps_of_azula_is_ours_without_draws(iterations):
    y = measured(5)
    found = ours(y, tolerance=None, max_iterations=iterations)
    expected = theirs("MMPS", y, solver="cg", iterations=iterations)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dps_of_azula_is_ours_for_one_sample():
    y = measured(1)
    torch.testing.assert_close(
        ours(y, weighting=0.3), theirs("DPS", y, zeta=0.3), rtol=1e-4, atol=1e-5
    )


def test_tmpd_of_azula_is_ours():
    """Of two rows that measure alike: where no sum is negative, which ours raises to 0."""
    B = torch.stack([A[0], A[0] + 0.1 * A[1]])
    problem = azula_solvers.Problem("rows", lambda x: x @ B.T, lambda y: y, 0.1)
    denoiser = gaussian_flow.exact_denoiser("linear", DATA)
    y = normal((4, 2), 5).double()
    expected = azula_solvers.solve("TMPD", denoiser, problem, y, (4, 6), STEPS, seed=0)
    found = ocm.sample_given_measurement(
        denoiser,
        ocm.Full(denoiser),
        y,
        problem.operator,
        noise_std=0.1,
        shape=(4, 6),
        steps=STEPS,
        weighting="row_sums",
        draw_x0=False,
        x0_range=None,
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mmps_of_azula_with_its_settings_and_pgdm_run():
    y = measured(4)
    for method in ("MMPS", "PGDM"):
        found = theirs(method, y)
        assert found.shape == (4, 6)
        assert bool(found.isfinite().all()), method
    assert math.isfinite(found.std())


def test_scores_of_draws_that_are_as_likely_as_the_truth():
    x = normal((400, 20, 4), 1)
    found = inverse.scores(x[:, 0], x[:, 1:])
    for name, expected in {
        "squared_error_over_variance": 1.0,
        "within_50": 0.5,
        "within_90": 0.9,
        "crps": 1 / math.pi**0.5,  # of N(0, 1) at its own points, on average
        "rmse_of_draw": 2**0.5,
        "rmse_of_mean": (1 + 1 / 19) ** 0.5,
    }.items():
        assert abs(found[name] - expected) < 4 * found[f"{name}_error"], name
    too_sure = inverse.scores(x[:, 0], 0.5 * x[:, 1:])
    assert too_sure["squared_error_over_variance"] > 3
    assert too_sure["within_90"] < 0.75
    assert too_sure["crps"] > found["crps"]


def test_draws_that_equal_the_truth_share_its_rank():
    """As pixels that are -1 in every draw: each of the ranks is as likely."""
    found = inverse.scores(torch.zeros(3, 4), torch.zeros(3, 19, 4))
    assert found["within_50"] == pytest.approx(0.5)
    assert found["within_90"] == pytest.approx(0.9)
    assert inverse.scores(torch.zeros(3, 4), torch.full((3, 19, 4), torch.inf))["crps"] is None


@pytest.mark.parametrize("problem", inverse.problems(), ids=lambda problem: problem.name)
def test_the_measurements_of_images_are_linear_and_inverted(problem):
    y = problem.operator(normal((2, 4, 8, 8), 1))
    torch.testing.assert_close(problem.operator(problem.pseudo_inverse(y)), y)
    assert not problem.operator(torch.zeros(1, 4, 8, 8)).any()
