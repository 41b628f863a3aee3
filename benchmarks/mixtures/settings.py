"""Sizes of the experiment on mixtures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mixtures.mixture import Mixture, correlated_mixture, nine_gaussians
from ocm.training.settings import TrainingSettings

_DENOISER_SEED = 1000
# The papers' heads, by name.
HEADS = ("iddpm", "npr", "sn", "ocm")

MIXTURES: dict[str, Callable[[], Mixture]] = {
    "nine Gaussians": nine_gaussians,
    "correlated mixture": correlated_mixture,
}


@dataclass(frozen=True)
class MixtureSettings:
    """Sizes of the experiment; the defaults take less than ten minutes on two cores.

    Attributes:
        seeds: One run each: data, weights, noise and probes.
        head_steps: Optimiser steps of every head.
        head_batch_size: Points a step of the heads.
        head_learning_rate: Peak rate of the heads, the same for all methods.
        denoiser_steps: Optimiser steps of a learned denoiser.
        denoiser_batch_size: Points a step of the denoisers.
        denoiser_learning_rate: Peak rate of the denoisers.
        denoiser_width: Channels of its hidden layers.
        num_data: Points to train on.
        num_fit: Points that the analytic variance is fitted to.
        num_test: Points at which errors are measured, for each noise level.
        timesteps: Noise levels of the errors.
        probes: Numbers of probes M of Hutchinson's estimates.
        num_samples: Samples of a cell.
        step_counts: Numbers of reverse steps K, evenly spaced.
        bandwidth: Of the Gaussian kernel of the maximum mean discrepancy.
        check_step_counts: Numbers of reverse steps of the checks.
        early_steps: Steps of the shorter trainings.
        weight_noise: Standard deviations of the noise that is added to the weights, in units of
            that of each tensor of weights.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    head_steps: int = 600
    head_batch_size: int = 1024
    head_learning_rate: float = 2e-2
    denoiser_steps: int = 2000
    denoiser_batch_size: int = 512
    denoiser_learning_rate: float = 1e-2
    denoiser_width: int = 64
    num_data: int = 100_000
    num_fit: int = 4000
    num_test: int = 5000
    timesteps: tuple[int, ...] = (5, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    probes: tuple[int, ...] = (1, 10, 100)
    num_samples: int = 1000
    step_counts: tuple[int, ...] = (2, 3, 5, 10, 20, 50, 100)
    bandwidth: float = 1.0
    check_step_counts: tuple[int, ...] = (5, 10)
    early_steps: tuple[int, ...] = (100, 300, 1000)
    weight_noise: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)

    def head_training(self, seed: int) -> TrainingSettings:
        """Return the settings of a head's training.

        Half of the points are at t <= N / 4, where the variance has most to learn.
        """
        size, rate = self.head_batch_size, self.head_learning_rate
        training = _training(self.head_steps, size, rate, seed)
        return replace(training, timestep_exponent=2.0)

    def denoiser_training(self, seed: int, num_steps: int) -> TrainingSettings:
        """Return the settings of a denoiser's training."""
        # Another seed: the heads see other noise than the denoiser was fitted to.
        other = seed + _DENOISER_SEED
        size, rate = self.denoiser_batch_size, self.denoiser_learning_rate
        return _training(num_steps, size, rate, other)


def _training(num_steps: int, batch_size: int, rate: float, seed: int) -> TrainingSettings:
    return TrainingSettings(
        num_steps,
        batch_size,
        rate,
        warmup_steps=num_steps // 20,
        ema_decay=1.0 - 4.0 / max(num_steps, 8),
        seed=seed,
    )


# Sizes at which every line runs in seconds, and the figures mean little.
QUICK = MixtureSettings(
    seeds=(0,),
    head_steps=100,
    head_batch_size=256,
    denoiser_steps=200,
    denoiser_batch_size=256,
    num_data=10_000,
    num_fit=2000,
    num_test=2000,
    timesteps=(5, 100, 300, 500, 700, 1000),
    probes=(1, 10),
    num_samples=500,
    step_counts=(2, 5, 10),
    check_step_counts=(5,),
    early_steps=(50,),
    weight_noise=(0.05, 0.2),
)
