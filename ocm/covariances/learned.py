"""The covariance of Optimal Covariance Matching (Ou et al., ICLR 2025): a head that learned h."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ocm.covariances.from_score import variance_from_h
from ocm.denoiser import Denoiser, Prediction
from ocm.heads import CovarianceHead


@dataclass(frozen=True)
class OptimalCovarianceMatching:
    """Var[x0 | x_t] = (beta_bar / alpha_bar) (1 + h), h from the head: no further backbone pass.

    Attributes:
        denoiser: The denoiser whose features the head reads.
        head: The trained head.
    """

    denoiser: Denoiser
    head: CovarianceHead

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return the variance, of the shape of x_t."""
        return variance_from_h(self.denoiser, t, self.head(prediction.features))
