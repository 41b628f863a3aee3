"""NPR (Bao et al., 2022, "noise prediction residual"): a head that regresses squared errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ocm.covariances.base import Covariance, from_branches
from ocm.covariances.learned.base import regression_loss, scaled_ratio
from ocm.covariances.learned.parameterisation import BOUNDED, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.noise import noisy


@dataclass(frozen=True)
class NPR(Covariance):
    """Var[x0 | x_t] = c_t ratio(o), with the ratio regressed on (x0 - x0_hat)^2 / c_t.

    The noise prediction residual of Bao et al. (ICML 2022, arXiv 2206.07309): in the paper's units,
    (beta_bar / alpha_bar) g with g regressing (noise - epsilon)^2. The mean is stopped, so the
    minimiser holds the error of the network's mean too.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.
        network_error: As in :class:`ocm.OptimalCovarianceMatching`.

    Raises:
        ValueError: By ``at`` and ``loss``, if the backbone shows no features.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance, images = ocm.NPR(denoiser, ocm.make_head(denoiser)), torch.zeros(4, 1, 8, 8)
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> losses = ocm.train_head(covariance, images, settings, progress=False)
        >>> variance = covariance.at(denoiser.predict(images, 500)).diagonal()
        >>> variance.shape, bool((variance > 0).all())
        (torch.Size([4, 1, 8, 8]), True)
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = BOUNDED
    network_error: float = 0.02

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension."""
        own = prediction.by(self.denoiser)
        return from_branches(own, lambda branch: scaled_ratio(self, branch))

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
        schedule = self.denoiser.schedule
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        with torch.no_grad():
            prediction = self.denoiser.predict(x_t, t, condition=condition)
        ratio = self.parameterisation.ratio((head or self.head)(prediction.features))
        target = (x0 - prediction.x0_hat).square()
        return regression_loss(
            ratio, target, self.parameterisation, self.denoiser, t, self.network_error
        )
