"""Scores of the covariances of a checkpoint: the likelihood bound, and its standard error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.unfinished import NOT_KEPT, Parts
from ocm.covariances.base import Covariance
from ocm.covariances.names import CALIBRATED, has_density, named
from ocm.covariances.operators import PosteriorCovariance, spectral
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.noise import labelled, noisy_prediction
from ocm.diffusion.schedules import Schedule
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import even_timesteps, reverse_steps
from ocm.progress import tracked
from ocm.sampling.likelihood import Decoder, check_images, decoder_term, prior_term, step_term
from ocm.sampling.samplers import X0_RANGE


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
    calibrated: Sequence[str] = (),
    labels: Tensor | None = None,
    settings: CovarianceSettings | None = None,
    decoder: Decoder = "stated",
    seed: int = 0,
    batch_size: int = 128,
    parts: Parts = NOT_KEPT,
    progress: bool = False,
) -> dict[str, dict[int, Estimate]]:
    """Return bits/dim of ``images`` for every covariance of a checkpoint and every number of steps.

    Args:
        checkpoint: The denoiser, with what the covariances need.
        images: Held-out images in [-1, 1], on the grid of the checkpoint's levels.
        names: Covariances with a density.
        step_counts: Numbers of steps K, evenly spaced.
        calibrated: Those of ``names`` to score calibrated too, as ``NAME_calibrated``.
        labels: Class of each image, for a denoiser that takes them.
        settings: For covariances that take products.
        decoder: As in :func:`ocm.bits_per_dim`.
        seed: Seed of the noise.
        batch_size: Images at a time.
        parts: Where the terms of every timestep are kept once they are found, and taken from.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If a bound is not finite.
        ValueError: If a name is of no covariance with a density.
    """
    for name in names:
        if not has_density(name):
            raise ValueError(f"covariance {name!r} has no density, and so no bits/dim")
    for name in calibrated:
        build_covariance(name + CALIBRATED, checkpoint, settings)  # raises without a calibration
    # Those of products first: all else then comes from the evaluation that they keep the graph of.
    by_products = named("probes", "exact")
    ordered = sorted(names, key=lambda name: name not in by_products)
    values = likelihoods(
        checkpoint.denoiser,
        {name: build_covariance(name, checkpoint, settings) for name in ordered},
        images,
        step_counts,
        levels=checkpoint.levels,
        calibrations={name: checkpoint.calibrations[name] for name in calibrated},
        labels=labels,
        decoder=decoder,
        seed=seed,
        batch_size=batch_size,
        parts=parts,
        progress=progress,
    )
    rows = [*names, *(name + CALIBRATED for name in calibrated)]
    return {row: {K: estimate(values[row][K]) for K in step_counts} for row in rows}


@torch.no_grad()
def likelihoods(
    denoiser: Denoiser,
    covariances: Mapping[str, Covariance],
    images: Tensor,
    step_counts: Sequence[int],
    *,
    levels: int = 256,
    calibrations: Mapping[str, Table] | None = None,
    labels: Tensor | None = None,
    decoder: Decoder = "stated",
    seed: int = 0,
    batch_size: int = 128,
    parts: Parts = NOT_KEPT,
    progress: bool = False,
) -> dict[str, dict[int, Tensor]]:
    """Return bits/dim of every image, float64 of shape (n,), by covariance and number of steps K.

    Every entry scores the same noisy images (:func:`ocm.bits_per_dim`), whatever the
    ``batch_size``; so a covariance is evaluated once for all K that visit a timestep, and
    differences between covariances are paired.

    Args:
        denoiser: The frozen denoiser.
        covariances: With densities, by name.
        images: Held-out images in [-1, 1], on the grid of ``levels`` grey levels.
        step_counts: Numbers of steps K, evenly spaced.
        levels: Number of grey levels.
        calibrations: By the names of covariances to score calibrated too, as ``NAME_calibrated``.
        labels: Class of each image, for a denoiser that takes them.
        decoder: As in :func:`ocm.bits_per_dim`.
        seed: Seed of the noise.
        batch_size: Images at a time.
        parts: Where the terms of every timestep are kept once they are found, and taken from.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If a bound is not finite.
        ValueError: If the images are not on the grid.
    """
    check_images(images, levels)
    calibrations = calibrations or {}
    rows = [*covariances, *(name + CALIBRATED for name in calibrations)]
    visits: dict[float, list[tuple[int, float]]] = {}  # (K, s) of every step by its start t
    for K in step_counts:
        for s, t in reverse_steps(even_timesteps(denoiser.schedule, K)):
            visits.setdefault(t, []).append((K, s))
    zeros = torch.zeros(len(images), dtype=torch.float64)
    totals = {row: {K: zeros.clone() for K in step_counts} for row in rows}

    def terms(first: int, t: float) -> dict[str, Tensor]:
        """Return the terms of the steps from t of some images, by row and K."""
        x0 = images[first : first + batch_size].to(denoiser.device)
        condition = labelled(denoiser, labels, first, len(x0))
        prediction = noisy_prediction(denoiser, x0, t, seed, first, condition=condition)
        shared: dict[str, PosteriorCovariance] = {}
        found: dict[str, Tensor] = {}
        ends: dict[str, Tensor] = {}  # prior and decoder of each row, the same for every K
        if decoder == "beta_tilde" and visits[t][0][1] == 0:
            decoded = decoder_term(None, prediction, x0, levels, decoder)
            ends = dict.fromkeys(rows, prior_term(denoiser, x0) + decoded)
        for K, s in visits[t]:
            if s == 0 and ends:
                found |= {f"{row} {K}": ends[row] for row in rows}
                continue
            towards = prediction.towards(s)
            for name, covariance in covariances.items():
                if name not in shared or covariance.depends_on_s:
                    shared[name] = covariance.at(towards).bounded(X0_RANGE)
            for name, stated in shared.items():
                versions = {name: stated}
                if name in calibrations:
                    scale, shift = calibrations[name].at(s, t).tolist()
                    versions[name + CALIBRATED] = stated.affine(scale, shift)
                for row, version in versions.items():
                    bounded = version.bounded(X0_RANGE)
                    if s > 0:
                        found[f"{row} {K}"] = step_term(spectral(bounded), towards, x0)
                        continue
                    decoded = decoder_term(bounded, towards, x0, levels, decoder)
                    ends[row] = prior_term(denoiser, x0) + decoded
                    found[f"{row} {K}"] = ends[row]
        return found

    work = [(first, t) for first in range(0, len(images), batch_size) for t in visits]
    for first, t in tracked(work, "bits/dim", "timesteps", shown=progress):
        found = parts.tensors(f"bits from {first:08d} at {t}", partial(terms, first, t))
        for row, (K, _) in itertools.product(rows, visits[t]):
            totals[row][K][first : first + batch_size] += found[f"{row} {K}"]
    for row, K in itertools.product(rows, step_counts):
        if not bool(torch.isfinite(totals[row][K]).all()):
            raise FloatingPointError(
                f"bits/dim of {row} at K = {K} is {totals[row][K].mean()}; does the denoiser "
                "return NaN?"
            )
    return totals


def steps_of(schedule: Schedule, step_counts: Sequence[int]) -> list[tuple[float, float]]:
    """Return every step (s, t) of the evenly spaced trajectories.

    Example:
        >>> import ocm
        >>> steps_of(ocm.linear(), [2, 3])
        [(0, 1), (1, 500), (1, 1000), (500, 1000)]
    """
    return sorted(
        {step for K in step_counts for step in reverse_steps(even_timesteps(schedule, K))}
    )


def likelihood_record(table: Mapping[str, Mapping[int, Estimate]]) -> dict[str, Any]:
    """Return the table as JSON values: ``nll_bits_per_dim`` and ``nll_standard_error``.

    Example:
        >>> likelihood_record({"ocm": {10: Estimate(4.9, None)}})
        {'nll_bits_per_dim': {'ocm': {10: 4.9}}, 'nll_standard_error': {'ocm': {10: None}}}
    """
    fields = {"nll_bits_per_dim": "mean", "nll_standard_error": "standard_error"}
    return {
        key: {name: {K: getattr(row[K], field) for K in row} for name, row in table.items()}
        for key, field in fields.items()
    }
