"""The covariances by the names that commands, checkpoints, tables and pictures use: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ocm.covariances.analytic import fit_analytic, fit_analytic_from_data
from ocm.covariances.channels import ChannelBlocks
from ocm.covariances.cosine import CosineDiagonal
from ocm.covariances.exact import Exact, Full
from ocm.covariances.fixed import Beta, BetaTilde
from ocm.covariances.hutchinson import Hutchinson
from ocm.covariances.lanczos import Lanczos
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.improved_ddpm import ImprovedDDPM, VarianceChannels
from ocm.covariances.learned.maximum_likelihood import MaximumLikelihood
from ocm.covariances.learned.npr import NPR
from ocm.covariances.learned.optimal import OptimalCovarianceMatching
from ocm.covariances.learned.sn import SN

Kind = Literal["fixed", "fitted", "learned", "probes", "exact", "lanczos"]


@dataclass(frozen=True)
class Entry:
    """What is known of a covariance by its name.

    Attributes:
        label: How tables and pictures write it.
        colour: In every picture.
        marker: In every picture, since some share a colour.
        kind: "fixed" is made of the denoiser alone; "fitted" needs a pass over data, "learned" a
            trained head; "probes" takes M products, "exact" D of them; "lanczos" takes k for each
            vector and has no density, so that it can be neither scored nor calibrated.
        make: The class, or what fits it to data.
    """

    label: str
    colour: str
    marker: str
    kind: Kind
    make: Callable[..., Any]


# Okabe and Ito's colours and four of Paul Tol's, which colour-blind readers can tell apart.
NAMES: dict[str, Entry] = {
    "beta": Entry("β", "#E69F00", "s", "fixed", Beta),
    "beta_tilde": Entry("β̃", "#CC79A7", "v", "fixed", BetaTilde),
    "analytic": Entry("analytic", "#56B4E9", "D", "fitted", fit_analytic),
    "analytic_data": Entry("analytic, from data", "#56B4E9", "d", "fitted", fit_analytic_from_data),
    "iddpm": Entry("I-DDPM head", "#882255", "P", "learned", ImprovedDDPM),
    "variance_channels": Entry("learned range", "#882255", "X", "fixed", VarianceChannels),
    "npr": Entry("NPR head", "#D55E00", "<", "learned", NPR),
    "sn": Entry("SN head", "#999933", ">", "learned", SN),
    "ocm": Entry("OCM head", "#0072B2", "o", "learned", OptimalCovarianceMatching),
    "ml": Entry("likelihood head", "#332288", "8", "learned", MaximumLikelihood),
    "hutchinson": Entry("Hutchinson", "#009E73", "^", "probes", Hutchinson),
    "coloring": Entry("coloring", "#009E73", "*", "probes", Hutchinson),
    "exact": Entry("exact diagonal", "#000000", "x", "exact", Exact),
    "blocks": Entry("channel blocks", "#000000", "1", "exact", ChannelBlocks),
    "cosine": Entry("cosine diagonal", "#44AA99", "p", "probes", CosineDiagonal),
    "lanczos": Entry("Lanczos", "#777777", "h", "lanczos", Lanczos),
    "full": Entry("exact full", "#777777", "+", "exact", Full),
}

# What follows the name of a covariance that was calibrated.
CALIBRATED = "_calibrated"


def named(*kinds: Kind) -> list[str]:
    """Return the names of covariances of some kinds, in the order of the table.

    Example:
        >>> named("learned")
        ['iddpm', 'npr', 'sn', 'ocm', 'ml']
    """
    return [name for name, entry in NAMES.items() if entry.kind in kinds]


# The classes of those with a head.
LEARNED: dict[str, Callable[..., LearnedCovariance]] = {
    name: NAMES[name].make for name in named("learned")
}


def has_density(name: str) -> bool:
    """Return whether a covariance can be scored and calibrated.

    Example:
        >>> has_density("full"), has_density("lanczos")
        (True, False)
    """
    return NAMES[name].kind != "lanczos"


def label(name: str) -> str:
    """Return how a covariance is written in tables and pictures.

    Example:
        >>> label("ocm"), label("beta_calibrated"), label("held-out")
        ('OCM head', 'β, calibrated', 'held-out')
    """
    plain = name.removesuffix(CALIBRATED)
    written = NAMES[plain].label if plain in NAMES else plain
    return written if plain == name else f"{written}, calibrated"
