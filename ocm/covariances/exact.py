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
        c, k, J = prediction.covariance_terms
        return diagonal(c + k * hessdiag.exact(J), prediction.x_t.shape)


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
        c, k, J = prediction.covariance_terms
        matrix = hessdiag.jacobian(J)
        identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        c, k = (number.reshape(-1, 1, 1) for number in (c, k))
        return full(c * identity + k * matrix, prediction.x_t.shape)
