"""The two variances of DDPM (Ho, Jain and Abbeel, 2020), which look at nothing but t.

They are stated there for the reverse step. Taken back to x0 by
Var = (sigma^2 - beta_tilde) beta_bar_t^2 / (alpha_bar_s beta(s, t)^2), both are independent of s:
sigma^2 = beta_tilde(s, t) means Var = 0, and sigma^2 = beta(s, t) means Var = beta_bar_t, since::

    beta(s, t) - beta_tilde(s, t) = beta(s, t) (beta_bar_t - beta_bar_s) / beta_bar_t
                                  = alpha_bar_s beta(s, t)^2 / beta_bar_t.

This is of paths with r^2 = alpha^2 + sigma^2 = 1. On another path the variance of the step is
r_s^2 / r_t^2 times that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocm.covariances.base import Covariance, constant
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.denoiser import Denoiser, Prediction, check_denoiser


@dataclass(frozen=True)
class Beta(Covariance):
    """The variance beta(s, t) of q(x_t | x_s): Var[x0 | x_t] = beta_bar_t, that of N(0, I) data.

    Of Ho, Jain and Abbeel (2020); it costs nothing.

    Attributes:
        denoiser: Whose schedule it is.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(2, 1, 4, 4), 500)
        >>> ocm.Beta(denoiser).at(prediction).diagonal()    # broadcast to the shape of x_t
        tensor([[[[0.5000]]]])
    """

    denoiser: Denoiser

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return beta_bar_t I."""
        check_denoiser(self.denoiser)
        schedule, t = self.denoiser.schedule, prediction.t
        if isinstance(t, Tensor):
            return constant(torch.sigmoid(-schedule.log_snr(t)), prediction)
        return constant(schedule.level(t).beta_bar, prediction)


@dataclass(frozen=True)
class BetaTilde(Covariance):
    """The variance beta_tilde(s, t) of q(x_s | x_t, x_0): Var[x0 | x_t] = 0.

    Of Ho, Jain and Abbeel (2020). It takes x0_hat for x0.

    Attributes:
        denoiser: Whose schedule it is.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> ocm.sample(denoiser, ocm.BetaTilde(denoiser), (2, 1, 4, 4), steps=5).shape
        torch.Size([2, 1, 4, 4])
    """

    denoiser: Denoiser

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return zero."""
        return constant(0.0, prediction)
