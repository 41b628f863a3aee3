"""What the covariances of a checkpoint need from a pass over data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances import calibrate
from ocm.covariances.names import NAMES, named


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
    analytic = dict(checkpoint.analytic)
    for name in named("fitted"):
        if name in names or name in calibrated:
            bounds = {} if name == "analytic" else {"x0_range": checkpoint.x0_range}
            fit = NAMES[name].make
            analytic[name] = fit(checkpoint.denoiser, x0, timesteps, **bounds, **options)
    checkpoint = replace(checkpoint, analytic=analytic)
    calibrations = dict(checkpoint.calibrations)
    for name in calibrated:
        covariance = build_covariance(name, checkpoint, settings)
        calibrations[name] = calibrate(
            checkpoint.denoiser,
            covariance,
            x0,
            steps if covariance.depends_on_s else timesteps,
            x0_range=checkpoint.x0_range,
            label=f"calibration of {name}",
            **options,
        ).weights
    return replace(checkpoint, calibrations=calibrations)
