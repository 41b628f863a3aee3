"""Samples of a checkpoint, and how close they are to real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.unfinished import NOT_KEPT, Parts
from ocm.diffusion.noise import condition_of
from ocm.evaluation.distances import (
    frechet_distance,
    maximum_mean_discrepancy,
    precision_recall,
)
from ocm.sampling.samplers import Multistep, Sampler, sample


class Quality(NamedTuple):
    """How close samples are to held-out images, in the features of a network.

    Attributes:
        frechet: Fréchet distance.
        precision: Fraction of the samples within the manifold of the images.
        recall: Fraction of the images within the manifold of the samples.
        mmd: Squared maximum mean discrepancy, without bias, with a Gaussian kernel of the
            bandwidth of :func:`median_distance`.
    """

    frechet: float
    precision: float
    recall: float
    mmd: float


def quality(real_features: Tensor, features: Tensor) -> Quality:
    """Return how close samples are to real images, from the features of both."""
    return Quality(
        frechet_distance(real_features, features),
        *precision_recall(real_features, features),
        maximum_mean_discrepancy(real_features, features, median_distance(real_features)),
    )


def median_distance(features: Tensor, count: int = 500) -> float:
    """Return the median distance between the first ``count`` features, the kernel's bandwidth.

    Example:
        >>> median_distance(torch.tensor([[0.0], [3.0], [4.0]]))
        3.0
    """
    return torch.pdist(features[:count].double()).median().item()


def draw(
    checkpoint: Checkpoint,
    name: str,
    num_images: int,
    steps: int | Sequence[float],
    *,
    sampler: Sampler | Multistep,
    settings: CovarianceSettings | None = None,
    labels: Sequence[int] | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    null_conditions: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 256,
    max_last_noise: float | None = None,
    parts: Parts = NOT_KEPT,
    progress: bool = False,
) -> Tensor:
    """Draw samples number ``first`` onwards, a batch at a time, onto the CPU.

    Args:
        checkpoint: The denoiser, with what the covariance needs.
        name: Covariance, as :func:`ocm.checkpoints.catalogue.build_covariance` names it.
        num_images: How many.
        steps: Number K of evenly spaced timesteps, or increasing timesteps up to N.
        sampler: Reverse process.
        settings: For covariances that take products.
        labels: Classes that the samples take in turns, for a denoiser with classes.
        conditions: Further arguments of the backbone by name, whose rows they take in turns.
        null_conditions: Those of no condition, of shape (1, ...), for guidance.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: Seed of the noise.
        first: Number of the first sample.
        batch_size: Samples at a time.
        max_last_noise: As in :func:`ocm.sample`.
        parts: Where every batch is kept once it is drawn, and taken from.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If a sample is not finite.
        ValueError: If labels are given for a denoiser without classes, or not for one with them.
    """
    takes_labels = checkpoint.denoiser.takes_labels
    if takes_labels != bool(labels) or (guidance_scale != 1.0 and not (labels or conditions)):
        raise ValueError(
            f"labels must be given for a denoiser with classes and for no other, got {labels} for "
            f"one {'with' if takes_labels else 'without'} classes; guidance_scale must be 1 "
            f"without labels or texts, got {guidance_scale}"
        )
    rows = {**(conditions or {}), **({"labels": torch.tensor(labels)} if labels else {})}
    denoiser = checkpoint.denoiser
    covariance = build_covariance(name, checkpoint, settings)

    def batch(offset: int) -> dict[str, Tensor]:
        count = min(batch_size, first + num_images - offset)
        numbers = torch.arange(offset, offset + count)
        turns = {name: values[numbers % len(values)] for name, values in rows.items()}
        images = sample(
            denoiser,
            covariance,
            (count, *checkpoint.image_shape),
            steps,
            sampler=sampler,
            condition=condition_of(denoiser, turns, null_conditions, guidance_scale),
            seed=seed,
            sample_offset=offset,
            x0_range=checkpoint.x0_range,
            max_last_noise=max_last_noise,
            progress=progress,
        )
        return {"images": images}

    offsets = range(first, first + num_images, batch_size)
    batches = [parts.tensors(f"from {i:08d}", partial(batch, i))["images"] for i in offsets]
    return torch.cat(batches) if batches else torch.zeros(0, *checkpoint.image_shape)
