"""Noisy samples x_t for training and for scores, by the random-number contract.

The noise of a sample is a pure function of (seed, sample number, step), whatever the batch: in
training, ``sample_offset`` counts the samples that were seen before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.kernels import normal
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import Schedule

# Counter of training's noise, apart from those of the samplers, which use 0 .. N.
_TRAINING_STEP = 2**32 - 1
# Of the noise that analytic variances and calibrations are fitted on, from here to N beyond.
FITTING = 2**31
_CHOICE_STEP = 2**32 - 2
# Standard normal numbers exceed it with probability 1/10.
_UPPER_TENTH = 1.2815515655446004


def chosen(count: int, seed: int, sample_offset: int, device: torch.device) -> Tensor:
    """Return which of the training samples ``sample_offset`` onwards are in a random tenth, bool.

    Example:
        >>> 80 < int(chosen(1000, 0, 0, torch.device("cpu")).sum()) < 120
        True
    """
    z = normal((count, 1), seed, step=_CHOICE_STEP, sample_offset=sample_offset, device=device)
    return z[:, 0] > _UPPER_TENTH


def noisy(
    schedule: Schedule, x0: Tensor, t: Tensor, seed: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """Return x_t and its noise for the training samples ``sample_offset`` onwards."""
    noise = normal(
        x0.shape, seed, step=_TRAINING_STEP, sample_offset=sample_offset, device=x0.device
    ).to(x0)
    return schedule.diffuse(x0, t, noise), noise


def noisy_prediction(
    denoiser: Denoiser,
    x0: Tensor,
    t: int,
    seed: int,
    sample_offset: int = 0,
    *,
    labels: Tensor | None = None,
    draw: int = 0,
) -> Prediction:
    """Return the backbone's prediction at x_t drawn from q(x_t | x_0), on its device.

    Args:
        denoiser: The frozen denoiser.
        x0: A batch of the data.
        t: Timestep.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        labels: Class of every sample of the data set, of which those of the batch are taken.
        draw: 0 for scores, :data:`FITTING` for what is fitted before: other noise.
    """
    x0 = x0.to(denoiser.device)
    step = draw + t
    noise = normal(x0.shape, seed, step=step, sample_offset=sample_offset, device=x0.device).to(x0)
    if labels is not None:
        labels = labels[sample_offset : sample_offset + len(x0)]
    x_t = denoiser.schedule.diffuse(x0, t, noise)
    return denoiser.predict(x_t, t, sample_offset=sample_offset, labels=labels)
