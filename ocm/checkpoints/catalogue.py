"""The covariances by the names that the command line and reports use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import hessdiag
from ocm.checkpoints.checkpoint import LEARNED, Checkpoint
from ocm.covariances import (
    Analytic,
    Beta,
    BetaTilde,
    Calibrated,
    ChannelBlocks,
    CosineDiagonal,
    Covariance,
    Exact,
    Full,
    Hutchinson,
    Lanczos,
    calibrate,
    fit_analytic,
    fit_analytic_from_data,
)
from ocm.covariances.base import looks_at_s

# Fitted on data by timestep; the arguments of both are the same.
ANALYTIC: dict[str, Callable[..., Analytic]] = {
    "analytic": fit_analytic,
    "analytic_data": fit_analytic_from_data,
}

# What stands behind the name of a covariance that was calibrated.
CALIBRATED = "_calibrated"


@dataclass(frozen=True)
class CovarianceSettings:
    """What the covariances that take products need.

    Attributes:
        num_probes: Probes M of ``hutchinson``, ``coloring`` and ``cosine``.
        num_products: Products k of ``lanczos``.
        seed: Seed of the probes.
    """

    num_probes: int = 8
    num_products: int = 3
    seed: int = 0


Builder = Callable[[Checkpoint, CovarianceSettings], Covariance]


def _learned(name: str) -> Builder:
    def build(checkpoint: Checkpoint, settings: CovarianceSettings) -> Covariance:
        if name not in checkpoint.learned:
            raise ValueError(
                f"covariance {name!r} needs a trained head, and this checkpoint has "
                f"{', '.join(checkpoint.learned) or 'none'}; `ocm train --head {name}` trains it"
            )
        return checkpoint.learned[name]

    return build


def _analytic(name: str) -> Builder:
    def build(checkpoint: Checkpoint, settings: CovarianceSettings) -> Covariance:
        if name not in checkpoint.analytic:
            raise ValueError(
                f"covariance {name!r} needs a pass over data, which this checkpoint has not seen; "
                "`ocm calibrate` makes it"
            )
        return checkpoint.analytic[name]

    return build


def _coloring(checkpoint: Checkpoint, settings: CovarianceSettings) -> Covariance:
    probes = hessdiag.Coloring(settings.num_probes)
    return Hutchinson(checkpoint.denoiser, settings.num_probes, settings.seed, probes)


COVARIANCES: dict[str, Builder] = {
    "beta": lambda checkpoint, settings: Beta(checkpoint.denoiser.schedule),
    "beta_tilde": lambda checkpoint, settings: BetaTilde(),
    **{name: _analytic(name) for name in ANALYTIC},
    **{name: _learned(name) for name in LEARNED},
    "hutchinson": lambda checkpoint, settings: Hutchinson(
        checkpoint.denoiser, settings.num_probes, settings.seed
    ),
    "coloring": _coloring,
    "exact": lambda checkpoint, settings: Exact(checkpoint.denoiser),
    "blocks": lambda checkpoint, settings: ChannelBlocks(checkpoint.denoiser),
    "cosine": lambda checkpoint, settings: CosineDiagonal(
        checkpoint.denoiser, settings.num_probes, settings.seed
    ),
    "lanczos": lambda checkpoint, settings: Lanczos(checkpoint.denoiser, settings.num_products),
    "full": lambda checkpoint, settings: Full(checkpoint.denoiser),
}

# Known through products with vectors alone, so that there is no density to fit or to score.
WITHOUT_DENSITY = ("lanczos",)

# Take a product for each of the D dimensions; left out of what is scored by default beyond this.
OF_D_PRODUCTS = ("exact", "blocks", "full")
_MOST_PRODUCTS = 1024


def build_covariance(
    name: str, checkpoint: Checkpoint, settings: CovarianceSettings | None = None
) -> Covariance:
    """Return the covariance of that name for a checkpoint.

    Args:
        name: A name of :data:`COVARIANCES`, or one followed by "_calibrated".
        checkpoint: The denoiser, and what was learned and fitted about it.
        settings: For covariances that take products.

    Raises:
        ValueError: If there is none of that name, or it needs a head, a pass over data or a
            calibration that the checkpoint has not got.
    """
    settings = settings or CovarianceSettings()
    plain = name.removesuffix(CALIBRATED)
    if plain not in COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {name!r}")
    covariance = COVARIANCES[plain](checkpoint, settings)
    if plain == name:
        return covariance
    if plain in WITHOUT_DENSITY:
        raise ValueError(f"covariance {plain!r} has no density, and so nothing to calibrate")
    if plain not in checkpoint.calibrations:
        raise ValueError(
            f"covariance {name!r} needs a calibration, and this checkpoint has "
            f"{', '.join(checkpoint.calibrations) or 'none'}; `ocm calibrate` fits it"
        )
    return Calibrated((covariance,), checkpoint.calibrations[plain], checkpoint.x0_range)


def available(checkpoint: Checkpoint) -> list[str]:
    """Return the names whose covariance this checkpoint can state, in the order of the catalogue.

    Left out are heads that were not trained, and blocks over a single channel, which are the exact
    diagonal.
    """
    channels = checkpoint.image_shape[0]
    return [
        name
        for name in COVARIANCES
        if (name not in LEARNED or name in checkpoint.learned)
        and (name != "blocks" or channels > 1)
    ]


def affordable(checkpoint: Checkpoint) -> list[str]:
    """Return those of :func:`available` that cost less than a thousand products for a sample."""
    features = math.prod(checkpoint.image_shape)
    return [
        n for n in available(checkpoint) if features <= _MOST_PRODUCTS or n not in OF_D_PRODUCTS
    ]


def fitted(
    checkpoint: Checkpoint,
    x0: Tensor,
    names: Sequence[str],
    steps: Sequence[tuple[int, int]],
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
        steps: The steps (s, t) that will be taken; those to s = 0 need nothing.
        calibrated: Covariances to calibrate.
        labels: Class of each sample, for a denoiser that takes them.
        settings: For covariances that take products.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        progress: Whether to show a progress bar.
    """
    # By timestep from 1 on, so that every trajectory lies within; by step where there is noise.
    timesteps = sorted({1, *(t for _, t in steps)})
    steps = [(s, t) for s, t in steps if s > 0]
    options: dict[str, Any] = {
        "labels": labels,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress,
    }
    analytic = dict(checkpoint.analytic)
    for name in ANALYTIC:
        if name in names or name in calibrated:
            bounds = {} if name == "analytic" else {"x0_range": checkpoint.x0_range}
            fit = ANALYTIC[name]
            analytic[name] = fit(checkpoint.denoiser, x0, timesteps, **bounds, **options)
    checkpoint = replace(checkpoint, analytic=analytic)
    calibrations = dict(checkpoint.calibrations)
    for name in calibrated:
        covariance = build_covariance(name, checkpoint, settings)
        calibrations[name] = calibrate(
            checkpoint.denoiser,
            covariance,
            x0,
            steps if looks_at_s(covariance) else timesteps,
            x0_range=checkpoint.x0_range,
            label=f"calibration of {name}",
            **options,
        ).weights
    return replace(checkpoint, calibrations=calibrations)
