"""Covariances from the score itself, with nothing to train.

By the second-order Tweedie formula Cov[x0 | x_t] = (beta_bar / alpha_bar) (I + beta_bar H), with
H the Hessian of log q(x_t), here the Jacobian of the denoiser's score. The diagonal of H costs M
products with one Hutchinson probe each, or D products exactly.

Near t = N the variance is a small difference, 1 + h, times a large beta_bar / alpha_bar: the
error of the network's Jacobian is amplified, and float32 has no digits left once alpha_bar falls
below 1e-6 or so. Samplers and the likelihood clip the variance to what the data allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import hessdiag
from hessdiag.checks import check_positive_int
from ocm.denoiser import Denoiser, Prediction
from ocm.schedules import per_sample


@dataclass(frozen=True)
class Hutchinson:
    """Var[x0 | x_t] with diag(H) estimated by M Rademacher probes: unbiased, may be negative.

    The probes of different timesteps are different ones of the same seed.

    Attributes:
        denoiser: Whose score is differentiated.
        num_probes: M.
        seed: Seed of the probes.
    """

    denoiser: Denoiser
    num_probes: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("num_probes", self.num_probes)

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return the estimate, of the shape of x_t; it costs M + 1 passes."""
        h = hessdiag.hutchinson(
            self.denoiser.scaled_score(t),
            x_t,
            self.num_probes,
            seed=self.seed,
            sample_offset=sample_offset,
            probe_offset=t * self.num_probes,
        )
        return variance_from_h(self.denoiser, t, h)


@dataclass(frozen=True)
class Exact:
    """Var[x0 | x_t] with diag(H) from D products."""

    denoiser: Denoiser

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return the variance, of the shape of x_t; it costs D + 1 passes."""
        h = hessdiag.exact(self.denoiser.scaled_score(t), x_t)
        return variance_from_h(self.denoiser, t, h)


def variance_from_h(denoiser: Denoiser, t: int, h: Tensor) -> Tensor:
    """Return (beta_bar / alpha_bar) (1 + h), with h = beta_bar diag H."""
    schedule = denoiser.schedule
    return per_sample(schedule.beta_bar / schedule.alpha_bar, t, h) * (1.0 + h)
