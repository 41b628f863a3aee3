"""A denoiser with what was learned and fitted about its covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ocm.covariances import Analytic, LearnedCovariance
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.tables import Table


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained denoiser, with what was learned and fitted about its covariance.

    Attributes:
        denoiser: The denoiser; frozen when it was loaded.
        image_shape: (C, H, W) of a sample.
        levels: Grey levels of the images it was trained on.
        data: Name of the data set.
        learned: Covariances with a trained head, by name.
        analytic: Analytic covariances by name.
        calibrations: Weights of :class:`ocm.Calibrated` by the name of the covariance.
        x0_range: Where the data lie; None for data without bounds: latents.
        num_calibration: How many of the training images, the last ones, nothing was trained on:
            they are there for calibrations.
        data_options: Arguments of :func:`ocm.data.load` that give the same images again.
    """

    denoiser: Denoiser
    image_shape: tuple[int, int, int]
    levels: int
    data: str
    learned: Mapping[str, LearnedCovariance] = field(default_factory=dict)
    analytic: Mapping[str, Analytic] = field(default_factory=dict)
    calibrations: Mapping[str, Table] = field(default_factory=dict)
    x0_range: tuple[float, float] | None = (-1.0, 1.0)
    num_calibration: int = 0
    data_options: Mapping[str, str | int] = field(default_factory=dict)
