"""What is fitted to data or trained on them, on every path, against the closed form."""

import pytest
import torch
from path_denoiser import FEATURES, PATHS, SHAPE, gaussian, path_denoiser
from torch import nn

import ocm
from ocm.covariances.names import LEARNED
from ocm.training.objectives import train_head

KINDS = {"linear": "epsilon", "edm": "edm", "trigflow": "trigflow", "flow": "flow_prediction"}


def denoiser_of(path):
    return path_denoiser(gaussian(), path, KINDS.get(path, "v_prediction"))


def data_of(count):
    data = gaussian()
    z = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0)).double()
    return (data.mean + z @ torch.linalg.cholesky(data.covariance).T).reshape(-1, *SHAPE)


def variances(schedule, t):
    """Of the posterior, the same for every x_t."""
    snr = schedule.log_snr(t).exp()
    precision = torch.linalg.inv(gaussian().covariance) + snr * torch.eye(FEATURES).double()
    return torch.linalg.inv(precision).diagonal()


@pytest.mark.parametrize("path", PATHS)
def test_analytic_variances(path):
    denoiser = denoiser_of(path)
    x0, timesteps = data_of(4000), [1, 400, 800, 1000]
    for fit, options in (
        (ocm.fit_analytic, {}), (ocm.fit_analytic_from_data, {"x0_range": None})
    ):  # fmt: skip
        analytic = fit(denoiser, x0, timesteps, **options)
        # From data at little noise, and from the score at much, a small difference of two means.
        places = [1, 400] if fit is ocm.fit_analytic else timesteps[1:]
        if not denoiser.schedule.has_signal(1000):
            places.append(1000)
        for t in places:
            prediction = denoiser.predict(x0[:2], t)
            expected = variances(denoiser.schedule, t).mean().item()
            found = analytic.at(prediction).diagonal().mean().item()
            assert found == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("path", PATHS)
def test_calibrations_find_what_was_changed(path):
    denoiser, x0 = denoiser_of(path), data_of(1500)
    for t in (10, 600, 1000):
        found = ocm.calibrate(denoiser, ocm.Full(denoiser), x0, [t], x0_range=None)
        # Scale and shift alone are not told apart where all eigenvalues are nearly the same.
        prediction = denoiser.predict(x0[:1], t)
        stated = ocm.Full(denoiser).at(prediction).eigenvalues
        fitted = found.at(prediction).eigenvalues
        torch.testing.assert_close(fitted, stated, rtol=0.1, atol=0.02 * stated.max().item())


class LevelHead(nn.Module):
    """A head of features that are x_t itself: one number for each of a few noise levels."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(1, *SHAPE))

    def forward(self, features):
        return self.values.expand(len(features), *SHAPE)


@pytest.mark.parametrize(
    ("name", "path"), [*(("ocm", path) for path in PATHS), ("npr", "flow"), ("sn", "edm")]
)
def test_heads_learn_the_variance(name, path, monkeypatch):
    """At one noise level, where a head of one number for each feature can be exact."""
    denoiser, x0, t = denoiser_of(path), data_of(2000).float(), 600
    covariance = LEARNED[name](denoiser, LevelHead(), ocm.Parameterisation(0.5))
    settings = ocm.TrainingSettings(200, 128, learning_rate=5e-2, ema_decay=0.95)
    monkeypatch.setattr(
        "ocm.training.batches.batch_of_step", _at_one_level(t, denoiser.schedule.is_continuous)
    )
    train_head(covariance, x0, settings, progress=False)
    predictions = denoiser.predict(denoiser.schedule.diffuse(
        x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    ), t)  # fmt: skip
    found = covariance.at(predictions).diagonal().expand(x0.shape).mean(0).flatten().double()
    expected = variances(denoiser.schedule, t)
    # SN states a difference of two second moments, which is right on average alone.
    assert ((found - expected).norm() / expected.norm()).item() < 0.1


def _at_one_level(t, is_continuous):
    from ocm.training.batches import batch_of_step

    def batches(*arguments, **options):
        batch = batch_of_step(*arguments, **options)
        level = torch.full_like(batch.timesteps, t)
        assert level.is_floating_point() == is_continuous
        return type(batch)(batch.indices, level, batch.flips)

    return batches


@pytest.mark.parametrize("path", ["flow", "trigflow", "zero_snr"])
def test_heads_at_the_end_without_signal(path):
    """Every loss is finite at t = N, and a head states a variance there."""
    denoiser, x0 = denoiser_of(path), data_of(8).float()
    t = torch.full((8,), 1000)
    for name, make in LEARNED.items():
        covariance = make(denoiser, LevelHead(), ocm.Parameterisation(0.5))
        assert torch.isfinite(covariance.loss(x0, t, seed=0, sample_offset=0)), name
        stated = covariance.at(denoiser.predict(x0, 1000, s=900)).diagonal()
        assert torch.isfinite(stated).all()
    paper = LEARNED["ocm"](denoiser, LevelHead(), ocm.PAPER)
    with pytest.raises(ValueError, match=r"data_std must be finite .* t = 1000, got infinity"):
        paper.at(denoiser.predict(x0, 1000))


def test_training_timesteps_of_a_path_are_any_numbers():
    from ocm.training.batches import batch_of_step

    settings = ocm.TrainingSettings(num_steps=2, batch_size=64)
    t = batch_of_step(1, settings, 10, 1000, is_continuous=True).timesteps
    assert t.dtype == torch.float64
    assert bool(((t > 0) & (t <= 1000)).all())
    assert bool((t != t.round()).any())
    whole = batch_of_step(1, settings, 10, 1000).timesteps
    assert torch.equal(whole, t.floor().long() + 1)
