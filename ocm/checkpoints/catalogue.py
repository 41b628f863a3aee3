"""The covariances of a checkpoint by name: which it can state, and how each is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hessdiag
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances import Calibrated, Covariance
from ocm.covariances.names import CALIBRATED, NAMES, has_density, named


@dataclass(frozen=True)
class CovarianceSettings:
    """What the covariances that take products need.

    Attributes:
        num_probes: Probes M of ``hutchinson``, ``coloring`` and ``cosine``.
        lanczos_probes: Products k of ``lanczos`` for each vector.
        seed: Seed of the probes.
    """

    num_probes: int = 8
    lanczos_probes: int = 3
    seed: int = 0


def build_covariance(
    name: str, checkpoint: Checkpoint, settings: CovarianceSettings | None = None
) -> Covariance:
    """Return the covariance of that name for a checkpoint.

    Args:
        name: A name of :data:`ocm.covariances.names.NAMES`, or one followed by "_calibrated".
        checkpoint: The denoiser, and what was learned and fitted about it.
        settings: For covariances that take products.

    Raises:
        ValueError: If there is none of that name, or it needs a head, a pass over data or a
            calibration that the checkpoint has not got.
    """
    plain = name.removesuffix(CALIBRATED)
    if plain not in NAMES:
        raise ValueError(f"covariance must be one of {', '.join(NAMES)}, got {name!r}")
    covariance = _plain(plain, checkpoint, settings or CovarianceSettings())
    if plain == name:
        return covariance
    if not has_density(plain):
        raise ValueError(f"covariance {plain!r} has no density, and so nothing to calibrate")
    weights = _of(checkpoint.calibrations, plain, "a calibration; `ocm calibrate` fits it")
    return Calibrated((covariance,), weights, checkpoint.x0_range)


def _plain(name: str, checkpoint: Checkpoint, settings: CovarianceSettings) -> Covariance:
    entry, denoiser = NAMES[name], checkpoint.denoiser
    covariance: Covariance
    if entry.kind == "learned":
        missing = (
            f"a trained head, which `ocm train --denoiser PATH --head {name}` makes; beta, "
            "hutchinson and coloring need none"
        )
        covariance = _of(checkpoint.learned, name, missing)
    elif entry.kind == "fitted":
        missing = "a pass over data; `ocm calibrate` makes it"
        covariance = _of(checkpoint.analytic, name, missing)
    elif entry.kind == "probes":
        design = {"probes": hessdiag.Coloring(settings.num_probes)} if name == "coloring" else {}
        covariance = entry.make(denoiser, settings.num_probes, settings.seed, **design)
    elif entry.kind == "lanczos":
        covariance = entry.make(denoiser, settings.lanczos_probes)
    else:
        covariance = entry.make(denoiser)
    return covariance


def _of(found: Mapping[str, Any], name: str, missing: str) -> Any:
    if name not in found:
        has = ", ".join(found) or "none"
        raise ValueError(f"covariance {name!r} needs {missing}; this checkpoint has that of {has}")
    return found[name]


def available(checkpoint: Checkpoint) -> list[str]:
    """Return the names whose covariance this checkpoint can state, in the order of the table.

    Left out are heads that were not trained, blocks over a single channel, which are the exact
    diagonal, and variance channels that a backbone has not got.
    """
    own = set() if checkpoint.denoiser.states_variance else {"variance_channels"}
    untrained = set(named("learned")) - set(checkpoint.learned)
    single = {"blocks"} if checkpoint.image_shape[0] == 1 else set()
    return [name for name in NAMES if name not in untrained | single | own]


def preferred(checkpoint: Checkpoint) -> str:
    """Return the name of the covariance that is sampled with where none is named.

    Raises:
        ValueError: If the checkpoint has no head.
    """
    for name in ("ml", "ocm", "npr", "sn", "iddpm"):
        if name in checkpoint.learned:
            return name
    raise ValueError(
        "covariance must be named for a checkpoint without a trained head: beta, hutchinson and "
        "coloring need none, and `ocm train --denoiser PATH --head ml` trains one"
    )


def affordable(checkpoint: Checkpoint) -> list[str]:
    """Return those of :func:`available` that do not take a product for every feature."""
    return [name for name in available(checkpoint) if name not in named("exact")]


def num_products(name: str, checkpoint: Checkpoint, settings: CovarianceSettings) -> int:
    """Return how many Jacobian products a covariance takes for a sample at a timestep."""
    products = {
        "probes": settings.num_probes,
        "lanczos": settings.lanczos_probes,
        "exact": math.prod(checkpoint.image_shape),
    }
    return products.get(NAMES[name].kind, 0)
