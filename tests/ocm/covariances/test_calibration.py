"""Calibration: the fit against scipy's, what it finds on Gaussian data, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from scipy.optimize import minimize
from two_classes import images_of, two_classes

import ocm
from ocm.covariances.calibrated import fit_variance_components
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.tables import Table

COVARIANCE = torch.tensor([[0.06, 0.03, 0.0], [0.03, 0.05, -0.01], [0.0, -0.01, 0.02]]).double()
MEAN = torch.tensor([0.1, -0.1, 0.0])
T = (50, 400)


def data(count):
    z = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).double()
    x0 = MEAN.double() + z @ torch.linalg.cholesky(COVARIANCE).T
    return x0.reshape(count, 1, 1, 3)


@pytest.fixture
def denoiser():
    return gaussian_denoiser(MEAN, COVARIANCE, ocm.linear())


def negative_log_likelihood(parameters, variances, squared_errors):
    variance = parameters[:-1] @ variances + parameters[-1]
    return np.mean(np.log(variance) + squared_errors / variance)


@pytest.mark.parametrize("true", [[1.0, 0.1], [0.3, 0.0], [0.0, 0.5], [2.0, 0.7, 0.05]])
def test_the_fit_is_the_maximum_of_the_likelihood(true):
    generator = np.random.default_rng(0)
    variances = generator.exponential(size=(len(true) - 1, 3000))
    squared_errors = (np.array(true) @ np.vstack([variances, np.ones(3000)])) * (
        generator.standard_normal(3000) ** 2
    )
    found = fit_variance_components(
        torch.from_numpy(variances), torch.from_numpy(squared_errors)
    ).numpy()
    assert (found >= 0).all()
    best = min(
        (
            minimize(
                negative_log_likelihood,
                np.array(start),
                args=(variances, squared_errors),
                method="L-BFGS-B",
                bounds=[(1e-9, None)] * len(true),
            )
            for start in ([0.5] * len(true), [0.1] * len(true))
        ),
        key=lambda result: result.fun,
    )
    assert negative_log_likelihood(found, variances, squared_errors) <= best.fun + 1e-6
    assert np.abs(found - best.x).max() < 0.02


def test_a_variance_of_zero_leaves_the_shift_alone():
    squared_errors = torch.tensor([1.0, 2.0, 3.0]).double()
    fit = fit_variance_components(torch.zeros(1, 3).double(), squared_errors)
    torch.testing.assert_close(fit, torch.tensor([0.0, 2.0]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("covariance", [ocm.Exact, ocm.Full])
def test_a_true_covariance_stays_as_it_is(denoiser, covariance):
    calibrated = ocm.calibrate(denoiser, covariance(denoiser), data(8000), T)
    for t in T:
        stated = calibrated.at(denoiser.predict(data(1), t))
        expected = posterior_covariance(COVARIANCE, denoiser.schedule, t).diagonal()
        torch.testing.assert_close(stated.diagonal()[0, 0, 0], expected, rtol=0.05, atol=0)


def test_the_shift_finds_the_error_of_the_mean(denoiser):
    """A mean that is off by N(0, 0.01) per dimension adds 0.01 to every variance."""

    class Off(type(denoiser.backbone)):
        def forward(self, x, t, class_labels=None):
            output = super().forward(x, t)
            t = torch.as_tensor(t).reshape(-1)[0] + 1
            ratio = (self.schedule.alpha_bar[t] / self.schedule.beta_bar[t]).sqrt()
            wrong = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
            output.sample = output.sample - 0.1 * ratio * wrong
            return output

    wrong = ocm.Denoiser(
        Off(MEAN, COVARIANCE, ocm.linear()), ocm.linear(), architecture=denoiser.architecture
    ).freeze()
    calibrated = ocm.calibrate(wrong, ocm.Exact(denoiser), data(8000), T, batch_size=8000)
    for row, t in zip(calibrated.weights.values, T, strict=True):
        variances = posterior_covariance(COVARIANCE, denoiser.schedule, t).diagonal()
        torch.testing.assert_close(row[0] * variances + row[1], variances + 0.01, rtol=0.06, atol=0)


def test_fixed_and_wrong_covariances_become_the_best_of_their_form(denoiser):
    x0, t = data(4000), 400
    for covariance in (ocm.BetaTilde(denoiser), ocm.Beta(denoiser)):
        calibrated = ocm.calibrate(denoiser, covariance, x0, [t])
        prediction = noisy_prediction(denoiser, x0, t, 0)
        error = (x0 - prediction.x0_hat.clamp(-1, 1)).square().mean()
        variance = calibrated.at(prediction).diagonal()
        torch.testing.assert_close(variance.flatten()[0], error, rtol=1e-3, atol=0)


def test_mixing_is_at_least_as_good_as_each_part(denoiser):
    x0, t = data(2000), 200
    parts = (ocm.Exact(denoiser), ocm.Hutchinson(denoiser, 1))
    prediction = noisy_prediction(denoiser, x0, t, 0)
    error = (x0 - prediction.x0_hat.clamp(-1, 1)).square()

    def nll(calibrated):
        variance = calibrated.at(prediction).diagonal()
        return (variance.log() + error / variance).mean().item()

    mixed = ocm.calibrate(denoiser, parts, x0, [t], batch_size=2000)
    for part in parts:
        assert nll(mixed) <= nll(ocm.calibrate(denoiser, part, x0, [t], batch_size=2000)) + 1e-5


def test_calibration_lowers_the_bound_of_a_covariance_that_is_off(denoiser):
    x0 = ocm.quantise(data(2000).clamp(-1, 1).float())
    K = 5
    timesteps = ocm.even_timesteps(ocm.linear(), K)
    for covariance in (ocm.Beta(denoiser), ocm.BetaTilde(denoiser)):
        calibrated = ocm.calibrate(denoiser, covariance, x0, timesteps)
        plain, better = (
            ocm.bits_per_dim(denoiser, c, x0, timesteps, seed=3).total.mean()
            for c in (covariance, calibrated)
        )
        assert better < plain - 0.05


def test_what_cannot_be_calibrated(denoiser):
    with pytest.raises(TypeError, match="must have a density, and LanczosCovariance has none"):
        ocm.calibrate(denoiser, ocm.Lanczos(denoiser, 2), data(10), T)
    with pytest.raises(TypeError, match="must be diagonal to be mixed"):
        ocm.calibrate(denoiser, [ocm.Exact(denoiser), ocm.Full(denoiser)], data(10), T)
    calibrated = ocm.calibrate(denoiser, ocm.BetaTilde(denoiser), data(10), T)
    with pytest.raises(ValueError, match=r"t must lie in 50 \.\. 400, .* got 401"):
        calibrated.at(denoiser.predict(data(1), 401))
    with pytest.raises(ValueError, match=r"weights must have 2 columns, .* got 3"):
        ocm.Calibrated((ocm.BetaTilde(denoiser),), Table({1: [1.0, 2.0, 3.0]}))


def test_a_table_interpolates_and_refuses():
    table = Table({10: [0.0, 1.0], 20: [1.0, 3.0], 40: [2.0, 3.0]})
    for t, expected in ((10, [0, 1]), (15, [0.5, 2]), (20, [1, 3]), (35, [1.75, 3]), (40, [2, 3])):
        torch.testing.assert_close(table.at(None, t), torch.tensor(expected).double())
    for rows, message in (
        ({}, "rows must be of one length, by timesteps t or by steps"),
        ({1: [1.0], (1, 2): [1.0]}, "rows must be of one length, by timesteps t or by steps"),
        ({"x": [1.0]}, "rows must be of one length, by timesteps t or by steps"),
        ({1: [1.0], 2: [1.0, 2.0]}, r"rows of lengths \[1, 2\]"),
        ({1: [math.nan]}, "rows must hold finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Table(rows)


@pytest.fixture
def classes():
    return two_classes()


def test_each_sample_is_fitted_and_scored_with_its_own_class(classes):
    labels = torch.arange(40) % 3 % 2  # which no two batches share
    x0 = images_of(labels)
    wrong = 1 - labels
    for given, error in ((labels, 0.0), (wrong, 0.25)):
        calibrated = ocm.calibrate(
            classes, ocm.BetaTilde(classes), x0, [500], labels=given, batch_size=16
        )
        assert calibrated.weights.at(None, 500)[1].item() == pytest.approx(error, abs=1e-6)
    x0 = ocm.quantise(x0)
    timesteps = ocm.even_timesteps(ocm.linear(), 4)
    right, off = (
        ocm.bits_per_dim(
            classes, ocm.Exact(classes), x0, timesteps, condition=classes.condition(given)
        ).total.mean()
        for given in (labels, wrong)
    )
    assert right + 1 < off


def test_a_label_that_is_none_of_the_classes(classes):
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\. 1, got 0 \.\. 7"):
        classes.condition(torch.tensor([0, 7]))


def test_a_covariance_that_depends_on_s_is_calibrated_by_steps(denoiser):
    covariance = ocm.ImprovedDDPM(denoiser, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"timesteps must be the steps \(s, t\)"):
        ocm.calibrate(denoiser, covariance, data(4), [100])
    assert ocm.calibrate(denoiser, covariance, data(4), [(50, 100)]).depends_on_s


def test_a_table_by_steps_takes_the_neighbour_where_no_end_is_given():
    table = Table({(4, 5): [1.0], (2, 5): [3.0]})
    assert table.numbers(None, 5) == [1.0]
    assert table.numbers(2, 5) == [3.0]


def test_fits_draw_other_noise_than_scores(denoiser):
    from ocm.diffusion.draws import FITTING

    x0 = data(6)
    fits, scores = (noisy_prediction(denoiser, x0, 400, 5, draw=d) for d in (FITTING, 0))
    assert not torch.allclose(fits.x_t, scores.x_t)
    # Without a variance that could be scaled, the shift is the mean squared error of the mean.
    fitted = ocm.calibrate(denoiser, ocm.BetaTilde(denoiser), x0, [400], seed=5)
    errors = (x0 - fits.x0_hat.clamp(-1, 1)).square()
    assert fitted.weights.at(None, 400)[1].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_few_samples_tell_analytic_variances_where_there_is_little_signal(denoiser):
    """The mean square of the noise itself is known: without it they would err by a half."""
    schedule = denoiser.schedule
    covariance = posterior_covariance(COVARIANCE, schedule, 300)
    expected = (covariance.diagonal().mean() / schedule.beta_bar[300]).item()
    fits = (ocm.fit_analytic(denoiser, data(2000), [300], seed=seed) for seed in range(4))
    found = [fit.scaled_variances.numbers(None, 300)[0] for fit in fits]
    assert sum(abs(value - expected) for value in found) / 4 < 0.25 * expected


@pytest.mark.parametrize(("x0_range", "error"), [((-1.0, 1.0), 0.0), (None, 0.25)])
def test_fits_clip_the_mean_as_samplers_do(x0_range, error):
    """The network says 1.5 of data that are 1."""
    denoiser = ocm.Denoiser(lambda x, time: torch.full_like(x, 1.5), ocm.linear(), "sample")
    x0 = torch.ones(8, 1, 2, 2)
    calibrated = ocm.calibrate(denoiser, ocm.BetaTilde(denoiser), x0, [500], x0_range=x0_range)
    assert calibrated.weights.at(None, 500)[1].item() == pytest.approx(error, abs=1e-6)
    analytic = ocm.fit_analytic_from_data(denoiser, x0, [1, 1000], x0_range=x0_range)
    assert analytic.variances(x0_range)[-1].item() == pytest.approx(error, abs=1e-6)


def test_what_is_calibrated_is_bounded_first():
    """A variance of 4 counts as 1, the most that images allow, in the fit and afterwards."""
    denoiser = ocm.Denoiser(lambda x, time: 0.0 * x, ocm.linear(), "sample")
    covariance = ocm.Analytic(denoiser, Table({1: [4e9], 1000: [4e9]}))
    x0 = torch.full((8, 1, 2, 2), 0.5)
    calibrated = ocm.calibrate(denoiser, covariance, x0, [500])
    scale, shift = calibrated.weights.numbers(None, 500)
    assert scale + shift == pytest.approx(0.25, rel=1e-3)
    stated = calibrated.at(denoiser.predict(x0, 500)).diagonal()
    torch.testing.assert_close(
        stated.expand(x0.shape), torch.full_like(x0, 0.25), rtol=1e-3, atol=0
    )


def test_fits_do_not_depend_on_batches(denoiser):
    x0 = data(24)
    for fit in (
        lambda size: (
            ocm.calibrate(denoiser, ocm.Beta(denoiser), x0, [400], batch_size=size).weights
        ),
        lambda size: ocm.fit_analytic(denoiser, x0, [400], batch_size=size).scaled_variances,
        lambda size: (
            ocm.fit_analytic_from_data(denoiser, x0, [400], batch_size=size).scaled_variances
        ),
    ):
        torch.testing.assert_close(fit(24).values, fit(7).values, rtol=1e-4, atol=1e-8)
