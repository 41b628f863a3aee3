"""The two variances of DDPM (Ho, Jain and Abbeel, 2020), which look at nothing but t.

They are stated there for the reverse step. Taken back to x0 by
Var = (sigma^2 - beta_tilde) beta_bar_t^2 / (alpha_bar_s beta(s, t)^2), both are independent of s:
sigma^2 = beta_tilde(s, t) means Var = 0, and sigma^2 = beta(s, t) means Var = beta_bar_t, since

    beta(s, t) - beta_tilde(s, t) = beta(s, t) (beta_bar_t - beta_bar_s) / beta_bar_t
                                  = alpha_bar_s beta(s, t)^2 / beta_bar_t.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ocm.denoiser import Prediction
from ocm.schedules import Schedule, per_sample


@dataclass(frozen=True)
class Beta:
    """The variance beta(s, t) of q(x_t | x_s): Var[x0 | x_t] = beta_bar_t."""

    schedule: Schedule

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return beta_bar_t, shape (1, 1, 1, 1)."""
        return per_sample(self.schedule.beta_bar, t, x_t)


@dataclass(frozen=True)
class BetaTilde:
    """The variance beta_tilde(s, t) of q(x_s | x_t, x_0): Var[x0 | x_t] = 0."""

    def variance(
        self, x_t: Tensor, t: int, prediction: Prediction, *, sample_offset: int = 0
    ) -> Tensor:
        """Return zero, shape (1, 1, 1, 1)."""
        return x_t.new_zeros([1] * x_t.dim())
