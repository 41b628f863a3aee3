"""The digits suite: how far from diagonal a covariance is, against Gaussian data."""

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from harness import budget
from suites.digits import diagonal_against_full

import ocm
from hessdiag.bases import dct_matrix


@pytest.fixture
def covariance():
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return A @ A.T / 6 + 0.1 * torch.eye(6)


def off_diagonal(C):
    return 1 - C.diagonal().square().sum() / C.square().sum()


def test_the_shares_are_those_of_the_posterior_in_closed_form(covariance):
    schedule = ocm.cosine()
    denoiser = gaussian_denoiser(torch.zeros(6), covariance, schedule)
    images = torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    F = dct_matrix(6, torch.float64, "cpu")
    rows = diagonal_against_full(denoiser, images.double(), (100, 600), seed=0)
    assert [row["t"] for row in rows] == [100, 600]
    for row in rows:
        truth = posterior_covariance(covariance, schedule, row["t"])
        assert row["num_images"] == 3
        assert row["off_diagonal"] == pytest.approx(off_diagonal(truth).item(), rel=1e-4)
        in_cosines = off_diagonal(F @ truth @ F.T).item()
        assert row["off_diagonal_in_cosines"] == pytest.approx(in_cosines, rel=1e-4)
        assert row["off_diagonal_standard_error"] < 1e-4
        assert row["jacobian_asymmetry"] < 1e-4
        assert row["covariance_asymmetry"] < 1e-4
        assert row["negative_eigenvalues"] == 0


def test_an_asymmetric_jacobian_is_seen():
    """J = [[2, 1], [0, 2]] has |J - J^T| / |J + J^T| = sqrt(2) / sqrt(34)."""
    from suites.digits import _asymmetry, _off_diagonal

    J = torch.tensor([[[2.0, 1.0], [0.0, 2.0]]])
    assert _asymmetry(J).item() == pytest.approx((2 / 34) ** 0.5)
    assert _off_diagonal(J).item() == pytest.approx(1 / 9)


def test_budgets_stand_side_by_side():
    row = {"method": "ocm", "sampler": "ddpm", "budget": 5, "frechet": 1.234, "K": 5}
    other = {"method": "Heun", "sampler": "", "budget": 10, "frechet": 2.0, "K": 5}
    table = budget.table([row, row | {"budget": 10, "K": 10}, other])
    assert table.splitlines()[2:] == [
        "| OCM head, DDPM | 1.23 (5) | 1.23 (10) |",
        "| Heun |  | 2.00 (5) |",
    ]
