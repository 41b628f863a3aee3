"""The covariance from D products with the Jacobian: its diagonal, or all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hessdiag
from ocm.covariances.hutchinson import timestep
from ocm.covariances.operators import SpectralCovariance, diagonal, full
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class Exact:
    """The diagonal Var[x0 | x_t] of the denoiser's own covariance."""

    denoiser: Denoiser

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the diagonal; it costs D + 1 passes."""
        denoiser = self.denoiser.conditioned_as(prediction)
        x_t, t = prediction.x_t, timestep(prediction)
        c, k = denoiser.covariance_coefficients(t, x_t)
        J = hessdiag.exact(denoiser.output_at(t), x_t)
        return diagonal(c + k * J, x_t.shape)


@dataclass(frozen=True)
class Full:
    """The whole Cov[x0 | x_t], the symmetric part of a learned Jacobian.

    It takes D^2 numbers and an eigendecomposition for each sample.
    """

    denoiser: Denoiser

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the covariance; it costs D + 1 passes."""
        denoiser = self.denoiser.conditioned_as(prediction)
        x_t, t = prediction.x_t, timestep(prediction)
        c, k = (number.reshape(1, 1, 1) for number in denoiser.covariance_coefficients(t, x_t))
        J = hessdiag.jacobian(denoiser.output_at(t), x_t)
        identity = torch.eye(J.shape[1], dtype=J.dtype, device=J.device)
        return full(c * identity + k * J, x_t.shape)
