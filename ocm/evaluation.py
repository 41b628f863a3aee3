"""Scores of a checkpoint: the bound for every covariance and K, and the head's error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints import Checkpoint
from ocm.covariances import (
    Beta,
    BetaTilde,
    Covariance,
    Exact,
    Hutchinson,
    OptimalCovarianceMatching,
)
from ocm.likelihood import bits_per_dim, noisy_prediction
from ocm.progress import progress_bar
from ocm.samplers import VARIANCE_RANGE
from ocm.schedules import even_timesteps


@dataclass(frozen=True)
class CovarianceSettings:
    """What the covariances that draw probes need.

    Attributes:
        num_probes: Probes M of ``hutchinson``.
        seed: Seed of the probes.
    """

    num_probes: int = 8
    seed: int = 0


def _optimal(checkpoint: Checkpoint, settings: CovarianceSettings) -> Covariance:
    if checkpoint.head is None:
        raise ValueError("covariance 'ocm' needs a trained head, and this checkpoint has none")
    return OptimalCovarianceMatching(checkpoint.denoiser, checkpoint.head)


COVARIANCES: dict[str, Callable[[Checkpoint, CovarianceSettings], Covariance]] = {
    "beta": lambda checkpoint, settings: Beta(checkpoint.denoiser.schedule),
    "beta_tilde": lambda checkpoint, settings: BetaTilde(),
    "ocm": _optimal,
    "hutchinson": lambda checkpoint, settings: Hutchinson(
        checkpoint.denoiser, settings.num_probes, settings.seed
    ),
    "exact": lambda checkpoint, settings: Exact(checkpoint.denoiser),
}


def build_covariance(
    name: str, checkpoint: Checkpoint, settings: CovarianceSettings | None = None
) -> Covariance:
    """Return the covariance of that name for a checkpoint.

    Raises:
        ValueError: If there is none of that name, or it needs a head and there is none.
    """
    if name not in COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {name!r}")
    return COVARIANCES[name](checkpoint, settings or CovarianceSettings())


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, None for a single image."""

    mean: float
    standard_error: float | None


def estimate(values: Tensor) -> Estimate:
    """Return the mean of one value per image, and its standard error.

    Example:
        >>> estimate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        Estimate(mean=2.5, standard_error=0.6454972243679028)
    """
    values = values.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(values.mean().item(), error)


def likelihood_table(
    checkpoint: Checkpoint,
    images: Tensor,
    names: Sequence[str],
    step_counts: Sequence[int],
    *,
    settings: CovarianceSettings | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> dict[str, dict[int, Estimate]]:
    """Return bits/dim of ``images`` for every covariance and every number of steps K.

    Every entry scores the same noisy images (:func:`ocm.likelihood.bits_per_dim`), whatever the
    ``batch_size``.

    Raises:
        FloatingPointError: If a bound is not finite.
    """
    num_timesteps = checkpoint.denoiser.schedule.num_timesteps
    table: dict[str, dict[int, Estimate]] = {name: {} for name in names}
    cells = [(name, K) for name in names for K in step_counts]
    bar = progress_bar(cells, "bits/dim", show=progress)
    for name, K in bar:
        bar.set_postfix_str(f"{name}, K = {K}")
        covariance = build_covariance(name, checkpoint, settings)
        totals = [
            bits_per_dim(
                checkpoint.denoiser,
                covariance,
                images[first : first + batch_size],
                even_timesteps(num_timesteps, K),
                levels=checkpoint.levels,
                seed=seed,
                sample_offset=first,
            ).total
            for first in range(0, len(images), batch_size)
        ]
        table[name][K] = estimate(torch.cat(totals))
        if not math.isfinite(table[name][K].mean):
            raise FloatingPointError(
                f"bits/dim of {name} at K = {K} is {table[name][K].mean}; does the denoiser "
                "return NaN?"
            )
    return table


def likelihood_record(table: Mapping[str, Mapping[int, Estimate]]) -> dict[str, Any]:
    """Return the table as JSON values: ``nll_bits_per_dim`` and ``nll_standard_error``.

    Example:
        >>> likelihood_record({"ocm": {10: Estimate(4.9, None)}})
        {'nll_bits_per_dim': {'ocm': {10: 4.9}}, 'nll_standard_error': {'ocm': {10: None}}}
    """
    return {
        "nll_bits_per_dim": {
            name: {K: cell.mean for K, cell in row.items()} for name, row in table.items()
        },
        "nll_standard_error": {
            name: {K: cell.standard_error for K, cell in row.items()} for name, row in table.items()
        },
    }


@torch.no_grad()
def variance_errors(
    checkpoint: Checkpoint,
    images: Tensor,
    names: Sequence[str],
    timesteps: Sequence[int],
    *,
    settings: CovarianceSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[int, float]]:
    """Return each covariance's error against the exact diagonal, at each noise level.

    Args:
        checkpoint: The denoiser, with the head if one is asked for.
        images: Images in [-1, 1], shape (n, C, H, W).
        names: Covariances to compare.
        timesteps: Noise levels, in 1 .. N.
        settings: For covariances that draw probes.
        seed: Seed of the noise.
        progress: Whether to show a progress bar.

    The error is the root mean square of Var - Var_exact over that of Var_exact, over images and
    pixels, with both variances clipped to [0, 1] as samplers do.
    """
    denoiser = checkpoint.denoiser
    errors: dict[str, dict[int, float]] = {name: {} for name in names}
    for t in progress_bar(timesteps, "variance error", unit="t", show=progress):
        x_t, prediction = noisy_prediction(denoiser, images.to(denoiser.device), t, seed)

        variances = {
            name: build_covariance(name, checkpoint, settings)
            .variance(x_t, t, prediction)
            .clamp(*VARIANCE_RANGE)
            for name in {"exact", *names}
        }
        exact = variances["exact"]
        for name in names:
            error = (variances[name] - exact).square().mean() / exact.square().mean()
            errors[name][t] = error.sqrt().item()
    return errors
