"""The variational bound on the likelihood, in bits per dimension.

For a trajectory t_1 < ... < t_K = N the bound on -log2 p(x_0) is the sum of

    KL(q(x_N | x_0) || N(0, I))                                          the prior
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)),  (s, t) = (t_{k-1}, t_k)      a Gaussian step each
    -log p(x_0 | x_{t_1})                                                the decoder.

With p(x_s | x_t) of the covariance-scaled form of :mod:`ocm.samplers` the step's KL needs nothing
but r = SNR(s) - SNR(t), SNR = alpha_bar / beta_bar, since b^2 / beta_tilde(s, t) = r:

    KL = 1/2 [log(1 + r Var) + (1 + r (x_0 - x0_hat)^2) / (1 + r Var) - 1].

The decoder is a Gaussian around x0_hat of variance beta_tilde(1, 2), integrated over the bin of
each grey level, the outermost bins being open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.checks import check_batch
from hessdiag.kernels import normal
from ocm.covariances import Covariance
from ocm.denoiser import Denoiser, Prediction
from ocm.progress import progress_bar
from ocm.samplers import VARIANCE_RANGE, X0_RANGE
from ocm.schedules import reverse_steps

# Of a bin: float32 rounding, and nothing that is a wrong number of levels.
_GRID_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound of each image, in bits per dimension, float64.

    Attributes:
        prior: Shape (B,).
        steps: The Gaussian steps from t_K = N down, shape (B, K - 1).
        decoder: Shape (B,).
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, shape (B,)."""
        return self.prior + self.steps.sum(dim=1) + self.decoder


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    covariance: Covariance,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    levels: int = 256,
    seed: int = 0,
    sample_offset: int = 0,
    progress: bool = False,
) -> BitsPerDim:
    """Bound the negative log-likelihood of images with the given timesteps and covariance.

    x_t is drawn from q(x_t | x_0) with the noise of (seed, sample, t), so that every covariance
    and every K is scored on the same noisy images.

    Args:
        denoiser: The frozen denoiser.
        covariance: States Var[x0 | x_t]; clipped to [0, 1] here, and x0_hat to [-1, 1].
        x0: Images in [-1, 1], shape (B, C, H, W), on the grid of ``levels`` grey levels.
        timesteps: Increasing timesteps in 1 .. N, the last of them N.
        levels: Number of grey levels: bins are 2 / (levels - 1) wide.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If x0 leaves [-1, 1] or the grid, the timesteps do not increase to N, or
            levels < 2.
    """
    check_batch("x0", x0)
    if bool((x0.abs() > 1).any()):
        raise ValueError(f"x0 must lie in [-1, 1], got values up to {x0.abs().max().item():.4g}")
    off_grid = (x0 - quantise(x0, levels)).abs().max().item() if x0.numel() else 0.0
    if off_grid > _GRID_TOLERANCE / (levels - 1):
        raise ValueError(
            f"x0 must lie on the grid of levels = {levels} grey levels, got values {off_grid:.2g} "
            "off it; give the right levels, or pass ocm.quantise(x0, levels)"
        )
    schedule = denoiser.schedule
    *steps, (_, first) = reverse_steps(timesteps)
    if timesteps[-1] != schedule.num_timesteps:
        raise ValueError(f"timesteps must end at N = {schedule.num_timesteps}, got {timesteps[-1]}")
    x0 = x0.to(denoiser.device)
    snr = (schedule.alpha_bar / schedule.beta_bar).tolist()
    terms = []
    for s, t in progress_bar(steps, "bits/dim", unit="step", show=progress):
        x_t, prediction = noisy_prediction(denoiser, x0, t, seed, sample_offset)
        variance = covariance.variance(x_t, t, prediction, sample_offset=sample_offset)
        x0_hat = denoiser.x0_hat(x_t, t, prediction.epsilon).clamp(*X0_RANGE)
        terms.append(
            gaussian_step_kl(
                squared_error=(x0 - x0_hat).double() ** 2,
                variance=variance.clamp(*VARIANCE_RANGE).double(),
                snr_difference=snr[s] - snr[t],
            )
        )
    x_t, prediction = noisy_prediction(denoiser, x0, first, seed, sample_offset)
    x0_hat = denoiser.x0_hat(x_t, first, prediction.epsilon).clamp(*X0_RANGE)
    std = math.sqrt(schedule.beta_tilde(1, 2))
    decoder = -discretised_gaussian_log_prob(x0.double(), x0_hat.double(), std, levels)
    alpha_bar = schedule.alpha_bar[-1].item()
    prior = 0.5 * (alpha_bar * x0.double() ** 2 - alpha_bar - math.log1p(-alpha_bar))
    return BitsPerDim(
        prior=_mean_bits(prior),
        steps=torch.stack([_mean_bits(term) for term in terms], dim=1)
        if terms
        else prior.new_zeros(len(x0), 0),
        decoder=_mean_bits(decoder),
    )


def quantise(x0: Tensor, levels: int = 256) -> Tensor:
    """Round images in [-1, 1] to the grid of ``levels`` grey levels, -1 + 2 k / (levels - 1).

    Raises:
        ValueError: If levels < 2.

    Example:
        >>> quantise(torch.tensor([-1.0, 0.1, 0.9]), levels=3)
        tensor([-1.,  0.,  1.])
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return ((x0 + 1) * (levels - 1) / 2).round() * 2 / (levels - 1) - 1


def noisy_prediction(
    denoiser: Denoiser, x0: Tensor, t: int, seed: int, sample_offset: int = 0
) -> tuple[Tensor, Prediction]:
    """Return x_t drawn from q(x_t | x_0), and the backbone's prediction there."""
    noise = normal(x0.shape, seed, step=t, sample_offset=sample_offset, device=x0.device)
    x_t = denoiser.schedule.diffuse(x0, t, noise)
    return x_t, denoiser.predict(x_t, t)


def _mean_bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2.0)


def gaussian_step_kl(squared_error: Tensor, variance: Tensor, snr_difference: float) -> Tensor:
    """Return the KL divergence of one reverse step, per dimension, in nats.

    Args:
        squared_error: (x_0 - x0_hat)^2.
        variance: Var[x0 | x_t], at least 0, of the same shape or broadcast to it.
        snr_difference: SNR(s) - SNR(t) with SNR = alpha_bar / beta_bar; at least 0.

    Example:
        At the variance that equals the squared error only the logarithm is left:

        >>> gaussian_step_kl(torch.tensor(0.5), torch.tensor(0.5), 2.0)
        tensor(0.3466)
    """
    ratio = 1.0 + snr_difference * variance
    return 0.5 * (ratio.log() + (1.0 + snr_difference * squared_error) / ratio - 1.0)


def discretised_gaussian_log_prob(x0: Tensor, mean: Tensor, std: float, levels: int) -> Tensor:
    """Return log of the mass of N(mean, std^2) on the bin of each grey level x0, in nats.

    Bins are 2 / (levels - 1) wide and centred on the levels of [-1, 1]; the outermost are open.
    The difference of the two tails is taken in logarithms, so that no mass underflows to zero.

    Example:
        >>> x0 = torch.tensor([-1.0, 0.0, 1.0])
        >>> discretised_gaussian_log_prob(x0, torch.zeros(3), 0.5, levels=3).exp()
        tensor([0.1587, 0.6827, 0.1587])
    """
    half_bin = 1.0 / (levels - 1)
    # Mirrored so that the nearer edge is the upper one of the lower tail, where logs are accurate.
    distance = (x0 - mean).abs()
    sign = torch.where(x0 >= mean, 1.0, -1.0)
    nearer = (half_bin - distance) / std
    farther = -(half_bin + distance) / std
    away = sign * x0 >= 1.0 - half_bin  # the open end lies beyond x0, seen from the mean
    towards = -sign * x0 >= 1.0 - half_bin  # the open end lies behind the mean
    upper = torch.special.log_ndtr(torch.where(towards, torch.inf, nearer))
    lower = torch.where(away, -torch.inf, torch.special.log_ndtr(farther))
    log_mass: Tensor = upper + torch.log1p(-torch.exp(lower - upper))
    return log_mass
