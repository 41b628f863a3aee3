"""Noisy samples x_t for training and for scores, by the random-number contract.

The noise of a sample is a pure function of (seed, sample number, step), whatever the batch: in
training, ``sample_offset`` counts the samples that were seen before.
"""

from __future__ import annotations

from torch import Tensor

from hessdiag.kernels import normal
from ocm.denoiser import Denoiser, Prediction
from ocm.schedules import Schedule

# Counter of training's noise, apart from those of the samplers, which use 0 .. N.
_TRAINING_STEP = 2**32 - 1


def noisy(
    schedule: Schedule, x0: Tensor, t: Tensor, seed: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """Return x_t and its noise for the training samples ``sample_offset`` onwards."""
    noise = normal(
        x0.shape, seed, step=_TRAINING_STEP, sample_offset=sample_offset, device=x0.device
    ).to(x0)
    return schedule.diffuse(x0, t, noise), noise


def noisy_prediction(
    denoiser: Denoiser, x0: Tensor, t: int, seed: int, sample_offset: int = 0
) -> Prediction:
    """Return the backbone's prediction at x_t drawn from q(x_t | x_0), on its device."""
    x0 = x0.to(denoiser.device)
    noise = normal(x0.shape, seed, step=t, sample_offset=sample_offset, device=x0.device).to(x0)
    return denoiser.predict(denoiser.schedule.diffuse(x0, t, noise), t, sample_offset=sample_offset)
