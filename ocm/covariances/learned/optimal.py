"""Optimal Covariance Matching (Ou et al., ICLR 2025): a head that learned the diagonal itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

import hessdiag
from hessdiag.kernels import ocm_loss, seed_tensor
from ocm.covariances.base import Covariance, from_branches
from ocm.covariances.learned.base import loss_weight, scaled_ratio
from ocm.covariances.learned.parameterisation import BOUNDED, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.noise import noisy


@dataclass(frozen=True)
class OptimalCovarianceMatching(Covariance):
    """Var[x0 | x_t] = c_t ratio(o), with the ratio regressed on an unbiased estimate of it.

    The method of Ou et al. (ICLR 2025, arXiv 2406.10808). The loss is::

        mean w_t (ratio - (1/M) sum_m v_m * (C v_m) / c_t)^2,    C v = c v + k J^T v,

    with C = Cov[x0 | x_t] of the denoiser (:mod:`ocm.diffusion.denoiser`), w_t of
    :func:`ocm.covariances.learned.base.loss_weight`. In the paper's parameterisation, for a
    network that predicts the noise, ratio = 1 + h and this is its
    (h - v * (beta_bar H v))^2. The gradient is unbiased for every number of probes, since the
    minimiser is the conditional mean.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.
        num_probes: Probes M in each target.
        probes: Their design; M is a multiple of its block.
        mode: "vjp" takes the features and all products from one pass; "jvp" keeps no activations,
            for one pass more and M of forward mode.
        network_error: Relative error of the network's Jacobian, in w_t; 0 for a true score.

    Raises:
        ValueError: By ``at`` and ``loss``, if the backbone shows no features; by ``loss``, if
            ``num_probes`` is no multiple of the design's block, or the output no posterior mean.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser))
        >>> images = torch.zeros(4, 1, 8, 8)
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> losses = ocm.train_head(covariance, images, settings, progress=False)
        >>> ocm.sample(denoiser, covariance, images.shape, steps=5).shape
        torch.Size([4, 1, 8, 8])
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = BOUNDED
    num_probes: int = 1
    probes: hessdiag.ProbeDesign = hessdiag.Rademacher()  # noqa: RUF009, frozen
    mode: Literal["vjp", "jvp"] = "vjp"
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
        """Return the loss; the arguments are those of :meth:`ocm.LearnedCovariance.loss`.

        Raises:
            ValueError: If ``num_probes`` is no multiple of the design's block, or the output is no
                posterior mean.
        """
        denoiser, schedule = self.denoiser, self.denoiser.schedule
        denoiser.check_states_a_mean()
        if not schedule.has_signal(schedule.num_timesteps):
            # Where nothing is left of x0, the Jacobian is no target.
            t = t.clamp(max=schedule.num_timesteps - 1)
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        size, weight = (of(tuple(x_t.shape[1:])) for of in (self._block, self.probes.weight))
        v = self.probes.draw(
            (self.num_probes, *x_t.shape),
            seed_tensor(seed, x_t.device),
            probe_offset=0,
            sample_offset=sample_offset,
            dtype=x_t.dtype,
            device=x_t.device,
        )
        # By a plain loop: in reverse mode one evaluation, whose features the head reads.
        J = denoiser.jacobian(x_t, t, condition, mode=self.mode, batching="loop")
        products = J.products(v)
        ratio = self.parameterisation.ratio((head or self.head)(denoiser.features_in(J.aux)))

        unit = self.parameterisation.scale(schedule, t, x_t)
        c, k = (number / unit for number in denoiser.covariance_coefficients(t, x_t))
        # The two terms of p + q J are of size 1, or p where that is more, and so are their errors.
        largest = denoiser.coefficients(t).p.clamp(min=1.0) / schedule.alpha(t)
        amplification = schedule.sigma(t) ** 2 * largest / self.parameterisation.scale(schedule, t)
        w = loss_weight(amplification, self.network_error).to(x_t)
        if self.probes.is_signs:
            return ocm_loss(
                ratio,
                products,
                seed,
                weight=w,
                scale=k.flatten(),
                shift=c.flatten(),
                sample_offset=sample_offset,
            )
        estimate = (v * products).sum(dim=0) * (weight * size / self.num_probes)
        residual = ratio - (c + k * estimate)
        return (w.reshape(c.shape) * residual.square()).mean()

    def _block(self, sample_shape: tuple[int, ...]) -> int:
        size = self.probes.block_size(sample_shape)
        if self.num_probes < 1 or self.num_probes % size:
            raise ValueError(
                f"num_probes must be a multiple of {size}, a block of {self.probes}, got "
                f"{self.num_probes}"
            )
        return size
