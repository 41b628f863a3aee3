"""I-DDPM (Nichol and Dhariwal, 2021): a head trained by the variational bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.covariances.base import Covariance, from_branches
from ocm.covariances.learned.parameterisation import PAPER, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Branch, Denoiser, Prediction
from ocm.diffusion.divergences import gaussian_step_kl
from ocm.diffusion.noise import noisy
from ocm.diffusion.schedules import Schedule, full_precision, per_sample, rounded


@dataclass(frozen=True)
class ImprovedDDPM(Covariance):
    """The reverse variance interpolated between beta_tilde and beta in its logarithm.

    That of Nichol and Dhariwal (2021, arXiv 2102.09672). For the step from t to s with fraction
    v = (1 + o) / 2::

        sigma^2 = beta(s, t)^v beta_tilde(s, t)^(1 - v),

    which as a statement about x0 is Var = ((beta_bar_t / beta_bar_s)^v - 1) / (SNR(s) - SNR(t)):
    the only covariance here that depends on s. The head is trained on the KL of the steps to
    s = t - 1, with the mean stopped.

    With a ``parameterisation`` of finite ``data_std`` the same bound trains Var = c_t ratio(o).

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.

    Raises:
        ValueError: By ``at`` and ``loss``, if the backbone shows no features.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance = ocm.ImprovedDDPM(denoiser, ocm.make_head(denoiser))
        >>> prediction = denoiser.predict(torch.zeros(2, 1, 8, 8), 500, s=499)
        >>> near, far = (covariance.at(p).diagonal() for p in (prediction, prediction.towards(300)))
        >>> near.shape, bool((near != far).all())    # it depends on s
        (torch.Size([2, 1, 8, 8]), True)
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = PAPER

    @property
    def depends_on_s(self) -> bool:
        """Whether the variance depends on s, as it does in the interpolation."""
        return math.isinf(self.parameterisation.data_std)

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension, for the step to the prediction's s.

        At s = 0, where no interpolation is defined, the variance is its limit v beta_bar_t of
        small steps.
        """

        def variance(branch: Branch) -> Tensor:
            return self._variance(branch, self.head(branch.features))

        return from_branches(prediction.by(self.denoiser), variance)

    def _variance(self, place: Branch | Prediction, output: Tensor) -> Tensor:
        schedule = self.denoiser.schedule
        if math.isfinite(self.parameterisation.data_std):
            return self.parameterisation.variance(schedule, place.t, place.x_t, output)
        return _interpolated(schedule, place, output)

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

        It is the mean KL times N, in nats per dimension, about the bound's sum over timesteps; the
        step from t = 1, which has no interpolation, counts as another from t = 2.
        """
        schedule = self.denoiser.schedule
        t = t.clamp(min=2)
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        with torch.no_grad():
            prediction = self.denoiser.predict(x_t, t, condition=condition)
        variance = self._variance(prediction, (head or self.head)(prediction.features))
        snr_difference = schedule.log_snr(t - 1).exp() - schedule.log_snr(t).exp()
        snr_difference = per_sample(snr_difference, x_t)
        squared_error = (x0 - prediction.x0_hat).square()
        # A variance below -1/r has no step; near it the KL is infinite.
        floor = -0.99 / snr_difference
        kl = gaussian_step_kl(squared_error, torch.maximum(variance, floor), snr_difference)
        return schedule.num_timesteps * kl.mean()


@dataclass(frozen=True)
class VarianceChannels(Covariance):
    """The variance that a backbone learned beside its prediction, as I-DDPM's did.

    Checkpoints of DiT, PixArt and ADM have 2C channels, the last C of which are the o of
    :class:`ImprovedDDPM` (``learned_range`` in diffusers): a baseline that costs nothing.

    Attributes:
        denoiser: Whose backbone has them.

    Raises:
        ValueError: By ``at``, if it has none.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: torch.cat([x, 0 * x], dim=1), ocm.linear())
        >>> prediction = denoiser.predict(torch.zeros(2, 3, 8, 8), 500, s=400)
        >>> ocm.VarianceChannels(denoiser).at(prediction).diagonal().shape
        torch.Size([2, 3, 8, 8])
    """

    denoiser: Denoiser

    @property
    def depends_on_s(self) -> bool:
        """True."""
        return True

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension, for the step to the prediction's s."""
        schedule = self.denoiser.schedule

        def variance(branch: Branch) -> Tensor:
            return _interpolated(schedule, branch, branch.further_channels)

        return from_branches(prediction.by(self.denoiser), variance)


def _interpolated(schedule: Schedule, place: Branch | Prediction, output: Tensor) -> Tensor:
    """Return Var[x0 | x_t] of the step's variance beta^v beta_tilde^(1 - v), v = (1 + o) / 2."""
    s, t, x_t = place.s, place.t, place.x_t
    fraction = (1.0 + full_precision(output)) / 2.0
    before = t - 1 if s is None else s
    if not isinstance(t, Tensor) and not isinstance(before, Tensor):
        return _of_one_step(schedule, before, t, x_t, fraction)
    log_snr = schedule.log_snr(t)
    x_t = full_precision(x_t[:0])  # of which type and number of axes the numbers are
    limit = per_sample(torch.sigmoid(-log_snr), x_t) * fraction
    if not isinstance(before, Tensor) and before == 0:
        return limit
    log_snr_before = schedule.log_snr(before)
    log_beta_bar, log_beta_bar_before = (
        functional.logsigmoid(-value) for value in (log_snr, log_snr_before)
    )
    step_log = per_sample(log_beta_bar - log_beta_bar_before, x_t)
    snr_difference = per_sample(log_snr_before.exp() - log_snr.exp(), x_t)
    variance = torch.expm1(fraction * step_log) / snr_difference
    return torch.where(torch.isfinite(snr_difference), variance, limit)


def _of_one_step(schedule: Schedule, s: float, t: float, x_t: Tensor, fraction: Tensor) -> Tensor:
    """Return the same for a whole batch, by numbers that no device has to be told."""
    fraction = fraction.to(torch.promote_types(fraction.dtype, x_t.dtype))
    level = schedule.level(t)
    change, snr_difference = _changes(schedule.level(s).log_snr, level.log_snr)
    snr_difference = rounded(snr_difference, fraction.dtype)
    if s == 0 or not math.isfinite(snr_difference):
        return rounded(level.beta_bar, fraction.dtype) * fraction
    return torch.expm1(fraction * rounded(change, fraction.dtype)) / snr_difference


@lru_cache(maxsize=4096)
def _changes(log_snr_s: float, log_snr_t: float) -> tuple[float, float]:
    """Return log beta_bar_t / beta_bar_s and SNR(s) - SNR(t)."""
    log_snr = torch.tensor([log_snr_s, log_snr_t], dtype=torch.float64)
    log_beta_bar, snr = functional.logsigmoid(-log_snr), log_snr.exp()
    return (log_beta_bar[1] - log_beta_bar[0]).item(), (snr[0] - snr[1]).item()
