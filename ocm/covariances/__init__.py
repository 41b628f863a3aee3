"""Covariances of x0 given x_t: each states Var[x0 | x_t] per dimension, independent of s.

Samplers and the likelihood derive the variance of a reverse step from t to s from it:

    sigma^2 = beta_tilde(s, t) + (alpha_bar_s beta(s, t)^2 / beta_bar_t^2) Var[x0 | x_t].

A new covariance is a small frozen dataclass with a ``variance`` method, in a file of its own.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ocm.covariances.fixed import Beta, BetaTilde
from ocm.covariances.from_score import Exact, Hutchinson
from ocm.covariances.learned import OptimalCovarianceMatching
from ocm.denoiser import Prediction

__all__ = [
    "Beta",
    "BetaTilde",
    "Covariance",
    "Exact",
    "Hutchinson",
    "OptimalCovarianceMatching",
]


class Covariance(Protocol):
    """What samplers and the likelihood ask of a covariance."""

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return Var[x0 | x_t], not clipped.

        Args:
            x_t: Shape (B, C, H, W).
            t: Timestep in 1 .. N.
            prediction: The backbone's prediction at (x_t, t).
            sample_offset: Number of the first sample, for covariances that draw probes.

        Returns:
            A tensor that broadcasts to x_t.
        """
        ...
