"""Mixtures of Gaussians in the plane, where the true covariance is known, and networks on them."""

from ocm.mixtures.mixture import Mixture, correlated_mixture, nine_gaussians
from ocm.mixtures.networks import (
    POINTS,
    MixtureBackbone,
    PointHead,
    PointNetwork,
    mixture_denoiser,
    point_denoiser,
    point_head,
)

__all__ = [
    "POINTS",
    "Mixture",
    "MixtureBackbone",
    "PointHead",
    "PointNetwork",
    "correlated_mixture",
    "mixture_denoiser",
    "nine_gaussians",
    "point_denoiser",
    "point_head",
]
