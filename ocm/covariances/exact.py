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
    """The diagonal Var[x0 | x_t] of the denoiser's own covariance, by D products at every t.

    It is that of (sigma^2 / alpha) d x0_hat / d x_t, by Tweedie's formula.

    Attributes:
        denoiser: Whose output is differentiated.

    Raises:
        ValueError: By ``at``, if the denoiser's output is no posterior mean, or x_t holds no signal
            and the denoiser no ``data_covariance``.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(1, 1, 2, 2), 500)
        >>> ocm.Exact(denoiser).at(prediction).diagonal()
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
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

    It takes D products, and D^2 numbers and an eigendecomposition for each sample.

    Attributes:
        denoiser: Whose output is differentiated.

    Raises:
        ValueError: By ``at``, as :class:`ocm.Exact`, or if the matrix is not finite.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> C = ocm.Full(denoiser).at(denoiser.predict(torch.ones(1, 1, 2, 2), 500))
        >>> C.solve(torch.ones(1, 1, 2, 2)).round(decimals=3)    # C^-1 v
        tensor([[[[2., 2.],
                  [2., 2.]]]])
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
