"""Samples in batches, their labels, and how close they are to others."""

from dataclasses import replace

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser
from two_classes import images_of, two_classes

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.evaluation import samples
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


@pytest.fixture(scope="module")
def classes():
    """A network that knows the class alone, whose samples are its means."""
    return Checkpoint(two_classes(), (1, 2, 2), 256, "two classes")


def test_labels_take_turns_whatever_the_batch(classes):
    how = {"sampler": ocm.ddpm, "labels": [0, 1, 1], "first": 1}
    images = draw(classes, "beta_tilde", 7, 1, batch_size=2, **how)
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])[1:]
    torch.testing.assert_close(images, images_of(labels))


def test_samples_are_clipped_to_the_range_of_the_data(classes):
    for x0_range, most in (((-0.1, 0.1), 0.1), (None, 0.2)):
        narrow = replace(classes, x0_range=x0_range)
        images = draw(narrow, "beta_tilde", 2, 1, sampler=ocm.ddpm, labels=[1])
        torch.testing.assert_close(images, torch.full_like(images, most))


def test_guidance_and_the_bound_on_the_last_noise_reach_the_sampler(monkeypatch, checkpoint):
    given = []

    def sampled(denoiser, covariance, shape, steps, **options):
        given.append(options)
        return torch.zeros(shape)

    monkeypatch.setattr(samples, "sample", sampled)
    text, none = torch.ones(1, 3), torch.zeros(1, 3)
    draw(
        checkpoint, "beta", 2, 3, sampler=ocm.ddpm, conditions={"text": text},
        null_conditions={"text": none}, guidance_scale=2.5, max_last_noise=0.25,
    )  # fmt: skip
    assert given[0]["max_last_noise"] == 0.25
    assert given[0]["condition"].guidance_scale == 2.5
    assert torch.equal(given[0]["condition"].null_tensors["text"], none)
    assert torch.equal(given[0]["condition"].tensors["text"], text.expand(2, 3))
