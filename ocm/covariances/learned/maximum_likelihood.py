"""A head trained by the bound on the likelihood of the few-step chains that will be taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.kernels import normal
from ocm.covariances.base import Covariance, from_branches
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.npr import NPR
from ocm.covariances.learned.optimal import OptimalCovarianceMatching
from ocm.covariances.learned.parameterisation import BOUNDED, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion import draws
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Branch, Denoiser, Prediction
from ocm.diffusion.divergences import (
    decoder_std,
    discretised_gaussian_log_prob,
    gaussian_step_kl,
)
from ocm.diffusion.noise import noisy
from ocm.diffusion.schedules import full_precision, per_sample
from ocm.diffusion.timesteps import SPACINGS, reverse_steps


@dataclass(frozen=True)
class MaximumLikelihood(Covariance):
    """Var[x0 | x_t] = c_t ratio(o), trained to maximise the bound of chains of few steps.

    A sample trains one term of the bound (:mod:`ocm.sampling.likelihood`) of one chain of K steps,
    weighted by K. With the mean stopped, and r = SNR(s) - SNR(t) of the step from t to s, it is::

        1/2 [log(1 + r Var) + (1 + r (x0 - x0_hat)^2) / (1 + r Var) - 1],

    or for the decoder, s = 0, -log p(x0 | x_t): the mass of N(x0_hat, Var) on the bin of a grey
    level, or its density. The minimiser holds the error of the network's mean, as NPR's does, and
    weighs it as a chain is scored: the head states what the few steps need, whatever the denoiser
    has not learned. I-DDPM trains on steps between neighbours among N instead, and interpolates in
    logarithms.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means. Without a sign the bound is undefined below
            -1 / r; there the variance counts as just above it.
        step_counts: Numbers of steps K of the chains, in turn.
        spacings: Of their timesteps, keys of :data:`ocm.diffusion.timesteps.SPACINGS`, in turn.
        levels: Grey levels of the images, as in :func:`ocm.bits_per_dim`; None for continuous data.
        x0_range: Where x0_hat is clipped to; None for data without bounds.

    Raises:
        ValueError: If there are no step counts or spacings, or one that is not known.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance = ocm.MaximumLikelihood(denoiser, ocm.make_head(denoiser), step_counts=(10,))
        >>> images = ocm.quantise(torch.zeros(4, 1, 8, 8))
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> losses = ocm.train_head(covariance, images, settings, progress=False)
        >>> ocm.bits_per_dim(denoiser, covariance, images, steps=10).total.shape
        torch.Size([4])
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = BOUNDED
    step_counts: tuple[int, ...] = (5, 10, 25, 50)
    spacings: tuple[str, ...] = ("even", "trailing")
    levels: int | None = 256
    x0_range: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        N = self.denoiser.schedule.num_timesteps
        if not self.step_counts or not all(1 <= K <= N for K in self.step_counts):
            raise ValueError(
                f"step_counts must hold numbers in 1 .. {N:.0f}, got {self.step_counts}"
            )
        if not self.spacings or not set(self.spacings) <= set(SPACINGS):
            raise ValueError(f"spacings must be some of {', '.join(SPACINGS)}, got {self.spacings}")

    @staticmethod
    def of(covariance: LearnedCovariance, **options: Any) -> MaximumLikelihood:
        """Return the covariance that trains the head of another on, as that of OCM or NPR.

        The head is the same object, in the same units; ``options`` are further attributes. Heads
        of other covariances put out something else, SN's a second moment, and are refused.

        Raises:
            ValueError: If the covariance is neither OCM's nor NPR's.
        """
        if not isinstance(covariance, (OptimalCovarianceMatching, NPR)):
            raise ValueError(
                f"covariance must state c_t ratio(o), as OCM's and NPR's do, got "
                f"{type(covariance).__name__}, whose head puts out something else"
            )
        return MaximumLikelihood(
            covariance.denoiser, covariance.head, covariance.parameterisation, **options
        )

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension."""
        own = prediction.by(self.denoiser)
        return from_branches(own, lambda branch: self._variance(branch, self.head))

    # What another basis than the pixels replaces, and the decoder below.

    def _output(self, branch: Branch, head: nn.Module) -> Tensor:
        output: Tensor = head(branch.features)
        return output

    def _analysed(self, error: Tensor) -> Tensor:
        return error

    def _variance(self, branch: Branch, head: nn.Module) -> Tensor:
        return self._scaled(branch, self._output(branch, head))

    def _scaled(self, branch: Branch, output: Tensor) -> Tensor:
        units, schedule = self.parameterisation, self.denoiser.schedule
        return units.variance(schedule, branch.t, branch.x_t, output)

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

        Which chain a sample takes is drawn by its number, and t / N is the place in it.
        """
        schedule = self.denoiser.schedule
        s, t, K = (of.to(x0.device) for of in self._steps(t, seed, sample_offset))
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        with torch.no_grad():
            prediction = self.denoiser.predict(x_t, t, condition=condition)
        x0_hat = full_precision(prediction.x0_hat)
        if self.x0_range is not None:
            x0_hat = x0_hat.clamp(*self.x0_range)
        squared_error = self._analysed(x0.to(x0_hat) - x0_hat).square()
        variance = self._variance(prediction.branches[-1][1], head or self.head)

        decodes = s == 0
        # The SNR of s = 0 is infinite; what stands for it there is not looked at.
        snr = schedule.log_snr(torch.where(decodes, t, s)).exp() - schedule.log_snr(t).exp()
        r = per_sample(snr, x_t)
        # A variance below -1/r has no step; near it the KL is infinite.
        terms = gaussian_step_kl(squared_error, torch.maximum(variance, -0.99 / r), r)
        if bool(decodes.any()):
            terms[decodes] = self._decoded(
                x0[decodes].to(x0_hat), x0_hat[decodes], variance[decodes]
            ).to(terms)
        return (per_sample(K, x_t) * terms).mean()

    def _decoded(self, x0: Tensor, x0_hat: Tensor, variance: Tensor) -> Tensor:
        """Return -log p(x0 | x_t) of a Gaussian of each dimension, in nats."""
        if self.levels is not None:
            std = decoder_std(variance, self.levels)
            return -discretised_gaussian_log_prob(x0, x0_hat, std, self.levels)
        variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
        terms = (x0 - x0_hat).square() / variance + variance.log() + math.log(2.0 * math.pi)
        return 0.5 * terms

    def _steps(self, t: Tensor, seed: int, sample_offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the step (s, t) of each sample and the K of its chain, on the CPU."""
        schedule = self.denoiser.schedule
        chains = [
            reverse_steps(SPACINGS[spacing](schedule, K))
            for spacing in self.spacings
            for K in self.step_counts
        ]
        z = normal((len(t), 1), seed, step=draws.CHAINS, sample_offset=sample_offset, device="cpu")
        which = (torch.special.ndtr(z[:, 0].double()) * len(chains)).long().tolist()
        # Whole timesteps 1 .. N stand for the N intervals below them.
        half = 0.0 if schedule.is_continuous else 0.5
        places = ((t.double().cpu() - half) / schedule.num_timesteps).clamp(max=1 - 1e-9).tolist()
        taken = [chains[i] for i in which]
        steps = [chain[-1 - int(u * len(chain))] for chain, u in zip(taken, places, strict=True)]
        dtype = torch.float64 if schedule.is_continuous else torch.int64
        s, t = torch.tensor(steps, dtype=dtype).T
        return s, t, torch.tensor([len(chain) for chain in taken])
