"""An evaluation against its parts, on a network that knows nothing but the class."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from two_classes import images_of, two_classes

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.data import Images
from ocm.diffusion.tables import Table
from ocm.evaluation import evaluation
from ocm.evaluation.by_ode import ode_bits_per_dim
from ocm.evaluation.evaluation import EvaluationSettings, evaluate
from ocm.evaluation.features import FeatureExtractor
from ocm.evaluation.samples import draw, quality

HELD_BACK = 12
LABELS = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(0))
TEST_LABELS = torch.randint(0, 2, (10,), generator=torch.Generator().manual_seed(1))


def noisy_images(labels, seed):
    """What the network knows, and noise that it does not."""
    noise = torch.randn(len(labels), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return ocm.quantise(images_of(labels) + 0.1 * noise)


IMAGES = Images(
    "two classes", noisy_images(LABELS, 2), noisy_images(TEST_LABELS, 3), 256, LABELS, TEST_LABELS,
    2,
)  # fmt: skip
PIXELS = FeatureExtractor("pixels", 4, lambda images: images.flatten(1))


@pytest.fixture
def checkpoint():
    return Checkpoint(two_classes(), (1, 2, 2), 256, "two classes", num_calibration=HELD_BACK)


def bits(checkpoint, covariance, K, seed=0):
    condition = checkpoint.denoiser.condition(TEST_LABELS)
    found = ocm.bits_per_dim(
        checkpoint.denoiser, covariance, IMAGES.test, K, condition=condition, seed=seed
    )
    return found.total.mean().item()


def calibration(checkpoint, timesteps, count, seed):
    """Of the first images that were held back, with their classes."""
    own = slice(40 - HELD_BACK, 40 - HELD_BACK + count)
    return ocm.calibrate(
        checkpoint.denoiser, ocm.Beta(checkpoint.denoiser), IMAGES.train[own], timesteps,
        labels=LABELS[own], seed=seed,
    )  # fmt: skip


def scores(checkpoint, tmp_path, K, **settings):
    given = {"num_images": 10, "fit_images": 7, "batch_size": 4, "seed": 5, **settings}
    settings = EvaluationSettings(["beta"], [K], **given)
    return evaluate(checkpoint, IMAGES, settings, tmp_path, progress=False)[0]


def test_scores_are_those_of_the_held_out_images_with_their_classes(checkpoint, tmp_path):
    record = scores(checkpoint, tmp_path, 3, calibrated=True)["nll_bits_per_dim"]
    beta = ocm.Beta(checkpoint.denoiser)
    assert record["beta"][3] == pytest.approx(bits(checkpoint, beta, 3, 5), rel=1e-5)
    fitted = calibration(checkpoint, [1, 500, 1000], 7, 5)
    expected = bits(checkpoint, fitted, 3, 5)
    assert record["beta_calibrated"][3] == pytest.approx(expected, rel=1e-5)


def test_a_calibration_is_taken_where_it_was_fitted_and_fitted_elsewhere(checkpoint, tmp_path):
    table = Table({t: [0.0, 5.0] for t in (1, 500, 1000)})  # more than images allow
    known = replace(checkpoint, calibrations={"beta": table})
    wide = ocm.Calibrated((ocm.Beta(checkpoint.denoiser),), table)
    fitted = calibration(checkpoint, ocm.even_timesteps(ocm.linear(), 4), 7, 5)
    for K, covariance in ((3, wide), (4, fitted)):
        record = scores(known, tmp_path, K, calibrated=True)["nll_bits_per_dim"]
        expected = bits(checkpoint, covariance, K, 5)
        assert record["beta_calibrated"][K] == pytest.approx(expected, rel=1e-5)


def test_quality_is_that_of_samples_of_both_classes_by_both_samplers(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "_features", lambda *arguments: (PIXELS, "Features: pixels."))
    samplers = []

    def drawn(*arguments, sampler, **options):
        samplers.append(sampler)
        return draw(*arguments, sampler=sampler, **options)

    monkeypatch.setattr(evaluation, "draw", drawn)
    record = scores(checkpoint, tmp_path, 2, quality=True, num_samples=9)
    # This network ends at the same images by both.
    assert samplers[0] is ocm.ddpm
    assert (samplers[1].func, samplers[1].keywords) == (ocm.ddim, {"eta": 0.0})
    real = PIXELS(IMAGES.train)
    assert record["num_real"] == 40
    floor = quality(real, PIXELS(IMAGES.test))
    assert {name: record["held_out"][name] for name in floor._fields} == floor._asdict()
    for title, sampler in (("ddpm", ocm.ddpm), ("ddim", partial(ocm.ddim, eta=0.0))):
        images = draw(checkpoint, "beta", 9, 2, sampler=sampler, labels=range(2), seed=5)
        expected = quality(real, PIXELS(images))._asdict()
        assert record["quality"][title]["beta"][2] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_bits_by_the_ode_do_not_depend_on_batches(checkpoint):
    """Neither classes nor noise start again in each."""
    few = slice(0, 5)
    whole, parts = (
        ode_bits_per_dim(
            checkpoint, IMAGES.test[few], labels=TEST_LABELS[few], tolerance=3.0, batch_size=size
        )[0]["ode"]
        for size in (5, 2)
    )
    assert parts["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-5)
    assert parts["standard_error"] == pytest.approx(whole["standard_error"], rel=1e-5)
