"""What the covariances of a checkpoint need from a pass over data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.unfinished import NOT_KEPT, Parts
from ocm.covariances import Analytic, Covariance, calibrate
from ocm.covariances.names import NAMES, named
from ocm.diffusion.tables import Table


def fitted(
    checkpoint: Checkpoint,
    x0: Tensor,
    names: Sequence[str],
    steps: Sequence[tuple[float, float]],
    *,
    calibrated: Sequence[str] = (),
    labels: Tensor | None = None,
    settings: CovarianceSettings | None = None,
    seed: int = 0,
    batch_size: int = 256,
    parts: Parts = NOT_KEPT,
    progress: bool = False,
) -> Checkpoint:
    """Return the checkpoint with what its covariances need from training data.

    Args:
        checkpoint: The denoiser.
        x0: Training data, shape (n, ...).
        names: Covariances that will be used; the analytic ones among them are fitted.
        steps: The steps (s, t) that will be taken.
        calibrated: Covariances to calibrate.
        labels: Class of each sample, for a denoiser that takes them.
        settings: For covariances that take products.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        parts: Where every table is kept once it is fitted, and taken from.
        progress: Whether to show a progress bar.
    """
    # By timestep from 1 on, so that every trajectory lies within.
    timesteps = sorted({1, *(t for _, t in steps)})
    options: dict[str, Any] = {
        "labels": labels,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress,
    }
    denoiser = checkpoint.denoiser
    bounds: dict[str, Any] = {"x0_range": checkpoint.x0_range}

    def variances(name: str) -> dict[str, Any]:
        bounded = {} if name == "analytic" else bounds
        found = NAMES[name].make(denoiser, x0, timesteps, **bounded, **options)
        return dict(found.scaled_variances.to_json())

    def calibration(name: str, covariance: Covariance) -> dict[str, Any]:
        places = steps if covariance.depends_on_s else timesteps
        label = f"calibration of {name}"
        found = calibrate(denoiser, covariance, x0, places, label=label, **bounds, **options)
        return found.weights.to_json()

    analytic = dict(checkpoint.analytic)
    for name in named("fitted"):
        if name in names or name in calibrated:
            table = parts.json(f"variances of {name}", partial(variances, name))
            analytic[name] = Analytic(denoiser, Table.from_json(table))
    checkpoint = replace(checkpoint, analytic=analytic)
    calibrations = dict(checkpoint.calibrations)
    for name in calibrated:
        covariance = build_covariance(name, checkpoint, settings)
        table = parts.json(f"calibration of {name}", partial(calibration, name, covariance))
        calibrations[name] = Table.from_json(table)
    return replace(checkpoint, calibrations=calibrations)
