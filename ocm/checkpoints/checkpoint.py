"""A denoiser with what was learned and fitted about its covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ocm.checkpoints.entries import TEXT, Rule, check_entries, whole
from ocm.covariances import Analytic, LearnedCovariance
from ocm.diffusion.checks import is_number
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.tables import Table
from ocm.images import LARGEST_SIDE


def _is_shape(value: Any) -> bool:
    side = whole(1, LARGEST_SIDE).holds
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(map(side, value))


def _is_range(value: Any) -> bool:
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or (is_pair and all(map(is_number, value)) and value[0] < value[1])


def _are_options(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value.keys() <= OPTIONS.keys():
        return False
    return all(OPTIONS[name].holds(option) for name, option in value.items())


_COLUMNS = ("image_column", "label_column", "caption_column")
OPTIONS = dict.fromkeys(_COLUMNS, TEXT) | {"limit": whole(1, 2**63 - 1)}

# What a checkpoint says of its data, as it is and as JSON.
DATA_RULES = {
    "image_shape": Rule(f"three ints (C, H, W) in [1, {LARGEST_SIDE}]", _is_shape),
    "levels": whole(2, 65536),
    "data": TEXT,
    "x0_range": Rule("None or two finite numbers, the lower one first", _is_range),
    "num_calibration": whole(0, 2**63 - 1),
    "data_options": Rule(f"texts {', '.join(_COLUMNS)} or an int limit, by name", _are_options),
}


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

    Raises:
        ValueError: If what it says of its data is not of these types, or makes no sense.
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

    def __post_init__(self) -> None:
        check_entries(vars(self), DATA_RULES)
