"""What a denoiser is trained on; the losses of covariances stand with them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.noise import noisy
from ocm.diffusion.schedules import per_sample


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    *,
    seed: int,
    sample_offset: int,
    labels: Tensor | None = None,
    backbone: nn.Module | None = None,
) -> Tensor:
    """Return the mean of (target - output(x_t, t))^2 (Ho, Jain and Abbeel, 2020).

    The target is the noise, x0 or v, by the denoiser's ``prediction_type``.

    Args:
        denoiser: The denoiser in training.
        x0: Data, shape (B, ...).
        t: Timesteps in 1 .. N, int64 of shape (B,).
        seed: Seed of the noise.
        sample_offset: Number of samples that training has seen before these.
        labels: Class labels, for a backbone that takes them.
        backbone: Called in place of the denoiser's own: the same, wrapped for training.
    """
    schedule = denoiser.schedule
    x_t, noise = noisy(schedule, x0, t, seed, sample_offset)
    condition = None if labels is None else denoiser.condition(labels)
    output = denoiser.output(x_t, t, condition=condition, backbone=backbone)
    return functional.mse_loss(output, _target(denoiser, x0, t, noise))


def _target(denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    if denoiser.prediction_type == "epsilon":
        return noise
    if denoiser.prediction_type == "sample":
        return x0
    signal, spread = (
        per_sample(table.sqrt(), t, x0)
        for table in (denoiser.schedule.alpha_bar, denoiser.schedule.beta_bar)
    )
    return signal * noise - spread * x0
