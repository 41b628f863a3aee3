"""The settings of a training, and what they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ocm.diffusion.checks import check_positive_int

MixedPrecision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training loop.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Images a step, over all processes and micro-batches.
        learning_rate: Peak of AdamW's learning rate: a linear warm-up, then a cosine to zero.
        warmup_steps: Steps of the warm-up.
        ema_decay: Decay of the exponential moving average of the weights, which is what training
            leaves in the network.
        seed: Seed of the order of the images, the timesteps, the noise and the probes.
        weight_decay: AdamW's weight decay.
        max_gradient_norm: Norm to which a larger gradient is scaled down; infinity for none.
        gradient_accumulation_steps: Micro-batches that a process takes a step in.
        mixed_precision: What autocast computes the loss in: "no" for none, "bf16" or "fp16".
        horizontal_flip: Whether to flip each image left to right with probability 1/2.
        timestep_exponent: Timesteps are N u^exponent with u uniform: 1 for all alike, 2 to see
            little noise more often, half of the time t <= N / 4.
        checkpoint_every: Steps from one state on disk to the next, where there is a directory.
        num_workers: Processes that read images ahead of the steps, for images that are decoded as
            they are needed; 0 reads them in between. It changes no number.

    Raises:
        TypeError: If a number of steps or images is not an int.
        ValueError: If a number is out of its range, or there is no such precision.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance = ocm.NPR(denoiser, ocm.make_head(denoiser))
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4, learning_rate=1e-3)
        >>> losses = ocm.train_head(covariance, torch.zeros(8, 1, 8, 8), settings, progress=False)
        >>> len(losses)
        2
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    ema_decay: float = 0.995
    seed: int = 0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    mixed_precision: MixedPrecision = "no"
    horizontal_flip: bool = False
    timestep_exponent: float = 1.0
    checkpoint_every: int = 200
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "gradient_accumulation_steps", "checkpoint_every"):
            check_positive_int(name, getattr(self, name))
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, got {self.max_gradient_norm}")
        for name in ("learning_rate", "timestep_exponent"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "num_workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.mixed_precision not in get_args(MixedPrecision):
            raise ValueError(
                f"mixed_precision must be one of {', '.join(get_args(MixedPrecision))}, got "
                f"{self.mixed_precision!r}"
            )
