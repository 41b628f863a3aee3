"""Training loops for a small denoiser and for the covariance head on a frozen one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessdiag.checks import check_positive_int
from ocm.denoiser import Denoiser
from ocm.heads import CovarianceHead
from ocm.losses import denoising_loss, ocm_loss
from ocm.progress import progress_bar

_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training loop.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak of AdamW's learning rate: a linear warm-up, then a cosine to zero.
        warmup_steps: Steps of the warm-up.
        ema_decay: Decay of the exponential moving average of the weights, which is what training
            leaves in the network.
        seed: Seed of the order of the images, the timesteps, the noise and the probes.
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    ema_decay: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("batch_size", self.batch_size)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


def train_denoiser(
    denoiser: Denoiser, images: Tensor, settings: TrainingSettings, *, progress: bool = True
) -> list[float]:
    """Train the backbone to predict the noise, and freeze it.

    Args:
        denoiser: Its backbone is trained in place and left in eval mode, without gradients.
        images: Training images in [-1, 1], shape (n, C, H, W).
        settings: Length, batch size, learning rate and seed.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    denoiser.unet.train().requires_grad_(True)

    def loss(x0: Tensor, t: Tensor, sample_offset: int) -> Tensor:
        return denoising_loss(denoiser, x0, t, seed=settings.seed, sample_offset=sample_offset)

    losses = _train("denoiser", denoiser, denoiser.unet, images, loss, settings, progress)
    denoiser.freeze()
    return losses


def train_head(
    denoiser: Denoiser,
    head: CovarianceHead,
    images: Tensor,
    settings: TrainingSettings,
    *,
    num_probes: int = 1,
    progress: bool = True,
) -> list[float]:
    """Train a covariance head by Optimal Covariance Matching on the frozen denoiser.

    Args:
        denoiser: The trained denoiser; frozen first.
        head: Trained in place and left in eval mode, without gradients.
        images: Training images in [-1, 1], shape (n, C, H, W).
        settings: Length, batch size, learning rate and seed.
        num_probes: Probes M in each target.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    denoiser.freeze()
    head.train().requires_grad_(True)

    def loss(x0: Tensor, t: Tensor, sample_offset: int) -> Tensor:
        return ocm_loss(
            denoiser,
            head,
            x0,
            t,
            seed=settings.seed,
            sample_offset=sample_offset,
            num_probes=num_probes,
        )

    losses = _train("OCM head", denoiser, head, images, loss, settings, progress)
    head.eval().requires_grad_(False)
    return losses


def mean_of_last(losses: list[float], count: int = 100) -> float:
    """Return the mean of the last ``count`` losses, or of all if there are fewer.

    Example:
        >>> mean_of_last([9.0, 1.0, 3.0], count=2)
        2.0
    """
    return sum(losses[-count:]) / len(losses[-count:])


def _train(
    name: str,
    denoiser: Denoiser,
    module: nn.Module,
    images: Tensor,
    loss_function: Callable[[Tensor, Tensor, int], Tensor],
    settings: TrainingSettings,
    progress: bool,
) -> list[float]:
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    rates = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.num_steps)
    average = EMAModel(parameters, decay=settings.ema_decay)
    losses: list[float] = []
    bar = progress_bar(range(settings.num_steps), name, unit="step", show=progress)
    batches = _batches(images, denoiser, settings)
    for step, (x0, t) in zip(bar, batches, strict=False):
        loss = loss_function(x0, t, step * settings.batch_size)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of the {name} is {losses[-1]} at step {step}; "
                f"try a learning_rate below {settings.learning_rate}"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        rates.step()
        average.step(parameters)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{mean_of_last(losses):.4f}")
    average.copy_to(parameters)
    return losses


def _batches(
    images: Tensor, denoiser: Denoiser, settings: TrainingSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images drawn with replacement, and timesteps spread evenly over 1 .. N.

    Each timestep alone is uniform; spreading them within a batch lowers the gradient's variance.
    """
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    size, num_timesteps = settings.batch_size, denoiser.schedule.num_timesteps
    while True:
        picked = torch.randint(len(images), (size,), generator=generator)
        place = (torch.arange(size) + torch.rand(1, generator=generator)) / size
        t = 1 + (place * num_timesteps).long().clamp(max=num_timesteps - 1)
        yield images[picked].to(denoiser.device), t.to(denoiser.device)
