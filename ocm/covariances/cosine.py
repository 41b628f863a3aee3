"""The covariance that is diagonal in the frequencies of the cosine transform.

After covariance-aware sampling (arXiv 2605.13910): natural images are nearly stationary, so their
covariance is nearly diagonal in frequency, and unlike a diagonal over pixels it correlates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import hessdiag
from ocm.covariances.hutchinson import timestep
from ocm.covariances.operators import SpectralCovariance, cosine_diagonal
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class CosineDiagonal:
    """The diagonal of F Cov[x0 | x_t] F^T, F the cosine transform of the last two axes.

    Attributes:
        denoiser: Whose output is differentiated.
        num_probes: Rademacher probes M, in the frequencies; "exact" for D products.
        seed: Seed of the probes.
    """

    denoiser: Denoiser
    num_probes: int | Literal["exact"] = 1
    seed: int = 0

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the estimate; it costs M + 1 passes."""
        denoiser = self.denoiser.conditioned_as(prediction)
        x_t, t = prediction.x_t, timestep(prediction)
        if x_t.dim() < 3:
            raise ValueError(f"x_t must have two axes of positions, got shape {tuple(x_t.shape)}")
        exact = self.num_probes == "exact"
        num_probes = x_t[0].numel() if self.num_probes == "exact" else self.num_probes
        J = hessdiag.estimate(
            denoiser.output_at(t),
            x_t,
            max_probes=num_probes,
            probes=hessdiag.UnitVectors() if exact else hessdiag.Rademacher(),
            basis=hessdiag.dct(),
            seed=self.seed,
            sample_offset=prediction.sample_offset,
            probe_offset=0 if exact else t * num_probes,
        ).diagonal
        c, k = denoiser.covariance_coefficients(t, x_t)
        return cosine_diagonal(c + k * J.to(x_t), x_t.shape)
