"""Errors against maps: closed forms on Gaussian data, SciPy, and what the pictures hold."""

import math

import numpy as np
import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from scipy.stats import spearmanr

import ocm
from ocm.covariances.operators import diagonal
from ocm.evaluation import maps

D, SCHEDULE = 6, ocm.cosine()
ROOT = torch.randn(D, D, generator=torch.Generator().manual_seed(0)) * 0.3
COVARIANCE = ROOT @ ROOT.T + 0.02 * torch.eye(D)


class Scaled(ocm.Covariance):
    """The true variances, times a factor."""

    def __init__(self, denoiser, factor):
        self.denoiser, self.factor = denoiser, factor

    def at(self, prediction):
        true = posterior_covariance(COVARIANCE, SCHEDULE, prediction.t).diagonal()
        return diagonal((self.factor * true).expand(prediction.x_t.shape), prediction.x_t.shape)


def gaussian_images(count):
    z = torch.randn(count, D, generator=torch.Generator().manual_seed(1))
    return (z @ torch.linalg.cholesky(COVARIANCE).T).reshape(count, 1, 1, D)


def gaussian_rows(factor, count=500, **options):
    denoiser = gaussian_denoiser(torch.zeros(D), COVARIANCE, SCHEDULE)
    return maps.reliability(
        Scaled(denoiser, factor), gaussian_images(count), [100, 600], x0_range=None, **options
    )


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_true_variances_have_standardised_errors_of_one(factor):
    for row in gaussian_rows(factor):
        error = row.standardised_error
        assert abs(error.mean - 1 / factor) < 4 * error.standard_error
        assert error.standard_error < 0.1 / factor
        # Phi(2) - Phi(-2), and of errors twice as large Phi(1) - Phi(-1).
        assert abs(row.within_two - (0.954 if factor == 1 else 0.683)) < 0.03
        # A bin holds pixels of about one variance.
        ratio = np.array(row.observed) / np.array(row.predicted) * math.sqrt(factor)
        assert np.abs(ratio - 1).max() < 0.2


def test_the_log_density_is_highest_for_the_true_variances():
    found = {factor: gaussian_rows(factor)[0].log_density for factor in (0.5, 1.0, 2.0)}
    assert max(found, key=found.get) == 1.0


def test_rows_do_not_depend_on_the_batch():
    whole, parts = gaussian_rows(1.0, 20, batch_size=20), gaussian_rows(1.0, 20, batch_size=7)
    for a, b in zip(whole, parts, strict=True):
        assert a.observed == pytest.approx(b.observed, rel=1e-4)
        assert a.standardised_error.mean == pytest.approx(b.standardised_error.mean, rel=1e-4)


def test_the_correlation_is_that_of_scipy_ties_included():
    generator = torch.Generator().manual_seed(2)
    std = torch.randint(1, 5, (3, 40), generator=generator).double()
    error = std * torch.randn(3, 40, generator=generator).round().double()
    expected = spearmanr(std.flatten(), error.abs().flatten()).statistic
    assert maps.compared(1, std, error).correlation == pytest.approx(expected, rel=1e-6)


def test_a_constant_map_tells_nothing_and_a_certain_one_is_infinitely_wrong():
    error = torch.tensor([[0.1, -0.2, 0.0, 0.3]])
    assert maps.compared(1, torch.ones(1, 4), error).correlation is None
    certain = maps.compared(1, torch.tensor([[0.0, 1.0, 1.0, 1.0]]), error)
    assert certain.standardised_error.mean == math.inf
    assert certain.log_density == -math.inf
    # No error where none is stated is right.
    assert maps.compared(1, torch.tensor([[1.0, 1, 0, 1]]), error).standardised_error.mean < 0.1


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_bins must be at least 1"):
        gaussian_rows(1.0, 2, num_bins=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        gaussian_rows(1.0, 2, batch_size=0)


# Pictures


def made_up(shape, t=300.0, x0=True):
    generator = torch.Generator().manual_seed(3)
    x_t, mean, std, truth = torch.rand(4, *shape, generator=generator)
    return ocm.UncertaintyMap(t, x_t, mean, std, truth if x0 else None)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws maps, and returns the arrays of all panels of each noise level, row by row."""
    figures = []
    save = maps.save_figure

    def keep(figure, path):
        for part in figure.subfigs:
            panels = [axis.images[0].get_array() for axis in part.axes if axis.images]
            figures.append([np.asarray(panel) for panel in panels])
        save(figure, path)

    def draw(found, **options):
        monkeypatch.setattr(maps, "save_figure", keep)
        maps.draw_maps(found, tmp_path / "maps.png", **options)
        assert (tmp_path / "maps.png").stat().st_size > 1000
        return figures

    return draw


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_have_rows_and_noise_levels_stand_side_by_side(drawn, channels):
    found = [made_up((2, channels, 5, 5), t) for t in (100.0, 400.0)]
    parts = drawn(found)
    assert [len(part) for part in parts] == [8, 8]  # two images, four panels each
    for part, map_ in zip(parts, found, strict=True):
        std = map_.std[1].square().mean(0).sqrt()
        error = (map_.x0 - map_.mean)[1].square().mean(0).sqrt()
        np.testing.assert_allclose(part[6], std, rtol=1e-5)
        np.testing.assert_allclose(part[7], error, rtol=1e-5)
        shown = (map_.x_t[0] + 1) / 2
        if channels == 3:
            np.testing.assert_allclose(part[0], shown.permute(1, 2, 0), rtol=1e-5)
        if channels == 1:
            np.testing.assert_allclose(part[0], shown[0], rtol=1e-5)


def test_the_frames_of_a_video_run_along_the_columns(drawn):
    found = made_up((2, 4, 3, 5, 5), x0=False)
    (part,) = drawn(found, most=2)
    assert len(part) == 6  # noisy, mean and std of two frames
    for frame in range(2):
        std = found.std[0, :, frame].square().mean(0).sqrt()
        np.testing.assert_allclose(part[4 + frame], std, rtol=1e-5)


def test_calibrations_are_drawn(tmp_path):
    rows = {"true": gaussian_rows(1.0, 20), "too sure": gaussian_rows(0.01, 20)}
    maps.draw_reliability(rows, tmp_path / "calibration.png", title="Gaussian data")
    assert (tmp_path / "calibration.png").stat().st_size > 1000
