"""SN (Bao et al., 2022, "squared noise"): a head that regresses second moments of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ocm.covariances.base import Covariance, from_branches
from ocm.covariances.learned.base import regression_loss, scaled_ratio
from ocm.covariances.learned.parameterisation import BOUNDED, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Branch, Denoiser, Prediction
from ocm.diffusion.noise import noisy
from ocm.diffusion.schedules import full_precision


@dataclass(frozen=True)
class SN(Covariance):
    """Var[x0 | x_t] = c_t ratio(o) - (x0_hat - m)^2, the ratio regressed on (x0 - m)^2 / c_t.

    m is the posterior mean of centred Gaussian data
    (:meth:`ocm.Parameterisation.gaussian_mean`). In the paper's units
    m = x_t / sqrt(alpha_bar), which makes this (beta_bar / alpha_bar)(g - epsilon^2) with g
    regressing the squared noise. The difference of two second moments may be negative.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = BOUNDED

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension."""
        return from_branches(prediction.by(self.denoiser), self._variance)

    def _variance(self, branch: Branch) -> Tensor:
        schedule, t, x_t = self.denoiser.schedule, branch.t, branch.x_t
        # Before x0_hat is rounded to the type of x_t: the difference is as small as the noise.
        x0_hat = branch.denoiser.x0_hat(full_precision(x_t), t, full_precision(branch.output))
        offset = x0_hat - self.parameterisation.gaussian_mean(schedule, t, x_t)
        return scaled_ratio(self, branch) - offset.square()

    def loss(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        seed: int,
        sample_offset: int,
        condition: Condition | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Return the loss; the arguments are those of :meth:`ocm.LearnedCovariance.loss`."""
        self.denoiser.check_states_a_mean()
        schedule = self.denoiser.schedule
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        with torch.no_grad():
            features = self.denoiser.predict(x_t, t, condition=condition).features
        ratio = self.parameterisation.ratio((head or self.head)(features))
        target = (x0 - self.parameterisation.gaussian_mean(schedule, t, x_t)).square()
        return regression_loss(ratio, target, self.parameterisation, self.denoiser, t)
