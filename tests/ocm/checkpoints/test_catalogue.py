"""Covariances by name: made of what the settings say, and fitted in the range of the data."""

from types import SimpleNamespace

import pytest
import torch

import hessdiag
import ocm
from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.fitting import fitted
from ocm.diffusion.tables import Table

DENOISER = ocm.Denoiser(lambda x, time: torch.full_like(x, 3.0), ocm.linear(), "sample")
SETTINGS = CovarianceSettings(num_probes=4, lanczos_probes=2, seed=9)
RANGE = (-4.0, 4.0)


def checkpoint(**options):
    return Checkpoint(DENOISER, (1, 2, 2), 17, "made up", **options)


def test_settings_reach_the_covariances_that_take_products():
    made = {
        name: build_covariance(name, checkpoint(), SETTINGS)
        for name in ("hutchinson", "coloring", "cosine", "lanczos")
    }
    assert made["hutchinson"] == ocm.Hutchinson(DENOISER, 4, 9)
    assert made["coloring"] == ocm.Hutchinson(DENOISER, 4, 9, hessdiag.Coloring(4))
    assert made["cosine"] == ocm.CosineDiagonal(DENOISER, 4, 9)
    assert made["lanczos"] == ocm.Lanczos(DENOISER, 2)


@pytest.mark.parametrize("x0_range", [RANGE, None])
def test_a_calibration_keeps_the_range_of_the_data(x0_range):
    table = Table({1: [1.0, 0.0], 1000: [1.0, 0.0]})
    kept = checkpoint(calibrations={"beta": table}, x0_range=x0_range)
    assert build_covariance("beta_calibrated", kept).x0_range == x0_range


def test_what_is_fitted_clips_the_mean_to_the_range_of_the_data():
    """The network says 3 of data that are 2: too far for images, and right for these."""
    x0 = torch.full((6, 1, 2, 2), 2.0)
    names, steps = ["analytic_data", "beta"], [(500, 1000)]
    for x0_range, error in ((RANGE, 1.0), (None, 1.0), ((-4.0, 2.0), 0.0)):
        made = fitted(checkpoint(x0_range=x0_range), x0, names, steps, calibrated=["beta"])
        bound = made.analytic["analytic_data"].variances(None)
        assert bound[-1].item() == pytest.approx(error, abs=1e-6)
        scale, shift = made.calibrations["beta"].numbers(None, 1000)
        beta_bar = DENOISER.schedule.level(1000).beta_bar
        assert scale * beta_bar + shift == pytest.approx(error, abs=1e-6)


def test_fits_reach_down_to_the_first_timestep():
    """Where every trajectory ends, whatever steps were asked for."""
    x0 = torch.full((6, 1, 2, 2), 2.0)
    made = fitted(checkpoint(), x0, ["analytic"], [(0, 500), (500, 1000)], calibrated=["beta"])
    assert set(made.analytic["analytic"].scaled_variances.rows) == {1, 500, 1000}
    assert set(made.calibrations["beta"].rows) == {1, 500, 1000}


def test_heads_are_those_of_the_checkpoint():
    head = SimpleNamespace()
    assert build_covariance("ocm", checkpoint(learned={"ocm": head})) is head
