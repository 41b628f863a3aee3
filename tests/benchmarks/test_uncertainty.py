"""The suite `uncertainty`: its default is what ocm.uncertainty states, and its videos move."""

import math

import pytest
import torch
from harness import moving_images
from suites import uncertainty as suite

import ocm
from ocm.evaluation.maps import reliability


def tiny_task():
    """A network of independent pixels, right for x0 ~ N(0, 1/4), and heads that know nothing."""
    schedule = ocm.flow()

    def mean(x, time):
        alpha, sigma = 1 - time / 1000, time / 1000
        gain = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
        return gain.to(x).reshape(-1, 1, 1, 1) * x

    images = 0.5 * torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.clamp(-1, 1)
    denoiser = ocm.Denoiser(mean, schedule, "sample")
    return suite.Task("tiny", "none", denoiser, {}, images[:4], images[4:])


def test_the_line_of_the_default_is_what_uncertainty_states():
    task, sizes = tiny_task(), suite.Sizes(timesteps=(300,), num_probes=48)
    rows = {row["covariance"]: row for row in suite.scores(task, sizes)}
    (expected,) = reliability(task.denoiser, task.test, [300], batch_size=8)
    assert rows[suite.DEFAULT]["standardised_error"]["mean"] == pytest.approx(
        expected.standardised_error.mean, rel=1e-4
    )
    assert rows[suite.DEFAULT]["observed"] == pytest.approx(expected.observed, rel=1e-4)
    # Every variance is 0.25 * 0.09 / (0.25 * 0.49 + 0.09).
    assert rows[suite.DEFAULT]["mean_std"] == pytest.approx(math.sqrt(0.0225 / 0.2125), rel=1e-3)


def test_images_move_and_are_folded_without_loss():
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    videos = moving_images.moving(images, 8, seed=0)
    assert videos.shape == (3, 1, 8, 16, 16)
    inside = (videos > -1).flatten(3)
    assert (inside.sum(dim=3) == 100).all()  # 10x10 pixels in every frame
    assert (videos[:, :, 0] != videos[:, :, 7]).any()
    torch.testing.assert_close(moving_images.unfolded(moving_images.folded(videos)), videos)


def test_decoding_by_draws_errs_as_much_as_so_few_draws_do():
    (row,) = suite.decoders(suite.Sizes(widths=(0.05,), num_draws=8, num_true=100))
    assert row["draws_error"] < 2.5 / math.sqrt(16)
    assert row["products_error"] < 2.5 / math.sqrt(16)
