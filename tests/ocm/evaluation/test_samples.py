"""Samples in batches, their labels, and how close they are to others."""

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.evaluation.distances import frechet_distance, maximum_mean_discrepancy
from ocm.evaluation.samples import draw, quality

COVARIANCE = torch.tensor([[0.06, 0.03, 0.0], [0.03, 0.05, -0.01], [0.0, -0.01, 0.02]])


@pytest.fixture(scope="module")
def checkpoint():
    denoiser = gaussian_denoiser(torch.zeros(3), COVARIANCE, ocm.linear())
    return Checkpoint(denoiser, (1, 1, 3), 256, "gaussian")


def test_samples_do_not_depend_on_batches(checkpoint):
    whole, parts = (
        draw(checkpoint, "full", 7, [1, 500, 1000], sampler=ocm.ddpm, seed=2, batch_size=size)
        for size in (7, 3)
    )
    torch.testing.assert_close(parts, whole)
    rest = draw(checkpoint, "full", 3, [1, 500, 1000], sampler=ocm.ddpm, seed=2, first=4)
    torch.testing.assert_close(rest, whole[4:])
    assert draw(checkpoint, "beta", 0, [1000], sampler=ocm.ddpm).shape == (0, 1, 1, 3)


def test_labels_are_for_denoisers_with_classes(checkpoint):
    with pytest.raises(ValueError, match=r"labels must be given .* got \[3\] for one without"):
        draw(checkpoint, "beta", 2, [1000], sampler=ocm.ddpm, labels=[3])


def test_quality_of_the_same_distribution_is_near_zero():
    features = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    same, other = features[200:], features[200:] + 2.0
    near, far = quality(features[:200], same), quality(features[:200], other)
    assert near.frechet < 0.1 < far.frechet
    assert abs(near.mmd) < 0.02 < far.mmd
    assert near.precision > 0.8 > far.precision
    assert near.frechet == frechet_distance(features[:200], same)
    width = torch.cdist(features[:200].double(), features[:200].double())
    median = width[torch.triu(torch.ones(200, 200, dtype=torch.bool), 1)].median().item()
    assert near.mmd == pytest.approx(maximum_mean_discrepancy(features[:200], same, median))
