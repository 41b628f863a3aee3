"""Mixtures of Gaussians, where the true covariance is known, and their denoiser."""

from ocm.mixtures.mixture import Mixture, correlated_mixture, nine_gaussians
from ocm.mixtures.networks import POINTS, MixtureBackbone, mixture_denoiser

__all__ = [
    "POINTS",
    "Mixture",
    "MixtureBackbone",
    "correlated_mixture",
    "mixture_denoiser",
    "nine_gaussians",
]
