"""What is trained and fitted on a mixture: a denoiser, heads, the analytic variance."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from mixtures.mixture import Mixture
from mixtures.networks import point_denoiser, point_head
from mixtures.settings import MixtureSettings
from ocm.covariances import Analytic, fit_analytic
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.names import LEARNED
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule
from ocm.evaluation.environment import Row
from ocm.evaluation.scores import steps_of
from ocm.training.loop import mean_of_last
from ocm.training.objectives import train_denoiser, train_head


def learned_denoiser(
    mixture: Mixture,
    schedule: Schedule,
    settings: MixtureSettings,
    seed: int,
    device: torch.device,
    num_steps: int | None = None,
) -> Denoiser:
    """Train a denoiser of points, for fewer steps than the settings say if asked to."""
    denoiser = point_denoiser(
        mixture.num_features, schedule, mixture.std, width=settings.denoiser_width, seed=seed
    )
    denoiser.backbone.to(device)
    x0 = mixture.sample(settings.num_data, seed).to(device)
    training = settings.denoiser_training(seed, num_steps or settings.denoiser_steps)
    train_denoiser(denoiser, x0, training, progress=False)
    return denoiser


def trained_head(
    name: str,
    parameterisation: Parameterisation,
    denoiser: Denoiser,
    mixture: Mixture,
    settings: MixtureSettings,
    seed: int,
    *,
    true_score: bool = False,
) -> tuple[LearnedCovariance, Row]:
    """Train the head of a method; also return how long it took and its last losses.

    Args:
        name: A name of :data:`ocm.covariances.names.LEARNED`.
        parameterisation: What the head's output means.
        denoiser: Frozen.
        mixture: The data.
        settings: Sizes.
        seed: Seed of the data, the weights, the noise and the probes.
        true_score: Whether the denoiser errs in nothing that a loss should be weighted down for.
    """
    options: dict[str, Any] = {}
    if true_score and name in ("npr", "ocm"):
        options["network_error"] = 0.0
    head = point_head(denoiser, seed=seed)
    covariance: LearnedCovariance = LEARNED[name](denoiser, head, parameterisation, **options)
    x0 = mixture.sample(settings.num_data, seed).to(denoiser.device)
    start = time.perf_counter()
    losses = train_head(covariance, x0, settings.head_training(seed), progress=False)
    seconds = time.perf_counter() - start
    return covariance, {"seconds": seconds, "final_loss": mean_of_last(losses)}


def fitted_analytic(
    denoiser: Denoiser,
    mixture: Mixture,
    settings: MixtureSettings,
    step_counts: Sequence[int],
    seed: int,
) -> Analytic:
    """Fit the analytic variance at the timesteps of errors, and of samples in so many steps."""
    timesteps = {*settings.timesteps, *(t for _, t in steps_of(denoiser.schedule, step_counts))}
    x0 = mixture.sample(settings.num_fit, seed).to(denoiser.device)
    return fit_analytic(denoiser, x0, sorted(timesteps), seed=seed, batch_size=settings.num_fit)
