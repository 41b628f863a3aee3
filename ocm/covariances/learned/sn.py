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

    The squared noise of Bao et al. (ICML 2022, arXiv 2206.07309), with m the posterior mean of
    centred Gaussian data (:meth:`ocm.Parameterisation.gaussian_mean`). In the paper's units
    m = x_t / sqrt(alpha_bar), which makes this (beta_bar / alpha_bar)(g - epsilon^2) with g
    regressing the squared noise. The difference of two second moments may be negative.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.

    Raises:
        ValueError: By ``at`` and ``loss``, if the backbone shows no features; by ``loss``, if its
            output is no posterior mean.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance, images = ocm.SN(denoiser, ocm.make_head(denoiser)), torch.zeros(4, 1, 8, 8)
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> losses = ocm.train_head(covariance, images, settings, progress=False)
        >>> covariance.at(denoiser.predict(images, 500)).bounded((-1.0, 1.0)).diagonal().shape
        torch.Size([4, 1, 8, 8])
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
