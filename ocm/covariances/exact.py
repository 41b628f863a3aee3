"""The covariance from D products with the Jacobian: its diagonal, or all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, diagonal, full
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class Exact(Covariance):
    """The diagonal Var[x0 | x_t] of the denoiser's own covariance.

    Attributes:
        denoiser: Whose output is differentiated.
    """

    denoiser: Denoiser

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the diagonal, by D products."""
        prediction = prediction.by(self.denoiser)
        c, k = prediction.covariance_coefficients
        J = hessdiag.exact(prediction.jacobian)
        return diagonal(c + k * J, prediction.x_t.shape)


@dataclass(frozen=True)
class Full(Covariance):
    """The whole Cov[x0 | x_t], the symmetric part of a learned Jacobian.

    It takes D^2 numbers and an eigendecomposition for each sample.

    Attributes:
        denoiser: Whose output is differentiated.
    """

    denoiser: Denoiser

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the covariance, by D products."""
        prediction = prediction.by(self.denoiser)
        c, k = (number.reshape(-1, 1, 1) for number in prediction.covariance_coefficients)
        J = hessdiag.jacobian(prediction.jacobian)
        identity = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
        return full(c * identity + k * J, prediction.x_t.shape)
