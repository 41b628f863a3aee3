"""The variational bound on the likelihood, in bits per dimension.

For a trajectory t_1 < ... < t_K = N the bound on -log2 p(x_0) is the sum of

    KL(q(x_N | x_0) || N(0, I))                                          the prior
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)),  (s, t) = (t_{k-1}, t_k)      a Gaussian step each
    -log p(x_0 | x_{t_1})                                                the decoder.

With p(x_s | x_t) of the form of :mod:`ocm.sampling.samplers` the step's KL needs nothing but
r = SNR(s) - SNR(t), SNR = alpha_bar / beta_bar, since b^2 / beta_tilde(s, t) = r. With the
eigenvalues Var_k of Cov[x0 | x_t] in its eigenbasis F, the pixels for a diagonal one, it is the sum
over k of

    1/2 [log(1 + r Var_k) + (1 + r (F (x_0 - x0_hat))_k^2) / (1 + r Var_k) - 1].

The decoder is a Gaussian around x0_hat of variance beta_tilde(1, 2), integrated over the bin of
each grey level, the outermost bins being open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, spectral
from ocm.diffusion.checks import check_finite
from ocm.diffusion.denoiser import Condition, Denoiser, Prediction
from ocm.diffusion.divergences import discretised_gaussian_log_prob, gaussian_step_kl
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.timesteps import reverse_steps, timesteps_of
from ocm.sampling.samplers import X0_RANGE

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
    steps: int | Sequence[int],
    *,
    levels: int = 256,
    condition: Condition | None = None,
    seed: int = 0,
    sample_offset: int = 0,
    progress: bool = False,
) -> BitsPerDim:
    """Bound the negative log-likelihood of images with the given timesteps and covariance.

    x_t is drawn from q(x_t | x_0) with the noise of (seed, sample, t), so that every covariance
    and every K is scored on the same noisy images.

    Args:
        denoiser: The frozen denoiser.
        covariance: States Cov[x0 | x_t], with eigenvalues: clipped here to what images in [-1, 1]
            allow, and x0_hat to [-1, 1].
        x0: Images in [-1, 1], shape (B, C, H, W), on the grid of ``levels`` grey levels.
        steps: Number K of evenly spaced timesteps, or increasing timesteps in 1 .. N, the last of
            them N.
        levels: Number of grey levels: bins are 2 / (levels - 1) wide.
        condition: Class labels of the images, for a denoiser that takes them.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If x0 leaves [-1, 1] or the grid, the timesteps do not increase to N, or
            levels < 2.
        TypeError: If the covariance has no density (Lanczos).
    """
    from tqdm import tqdm

    check_images(x0, levels)
    *noisy_steps, (_, first) = reverse_steps(timesteps_of(denoiser.schedule, steps))

    def predicted(t: int, s: int | None = None) -> Prediction:
        return noisy_prediction(denoiser, x0, t, seed, sample_offset, s=s, condition=condition)

    terms = []
    for s, t in tqdm(noisy_steps, "bits/dim", unit="step", disable=not progress):
        prediction = predicted(t, s)
        stated = spectral(covariance.at(prediction).bounded(X0_RANGE))
        terms.append(step_term(stated, prediction, x0))
    prediction = predicted(first)
    return BitsPerDim(
        prior=prior_term(denoiser, x0),
        steps=torch.stack(terms, dim=1) if terms else torch.zeros(len(x0), 0).double(),
        decoder=decoder_term(prediction, x0, levels),
    )


def check_images(x0: Tensor, levels: int) -> None:
    """Raise unless x0 are images in [-1, 1] on the grid of ``levels`` grey levels.

    Raises:
        ValueError: If they are not, or levels < 2.
    """
    check_finite("x0", x0)
    if bool((x0.abs() > 1).any()):
        raise ValueError(f"x0 must lie in [-1, 1], got values up to {x0.abs().max().item():.4g}")
    off_grid = (x0 - quantise(x0, levels)).abs().max().item() if x0.numel() else 0.0
    if off_grid > _GRID_TOLERANCE / (levels - 1):
        raise ValueError(
            f"x0 must lie on the grid of levels = {levels} grey levels, got values {off_grid:.2g} "
            "off it; give the right levels, or pass ocm.quantise(x0, levels)"
        )


def step_term(covariance: SpectralCovariance, prediction: Prediction, x0: Tensor) -> Tensor:
    """Return the KL of the step from the prediction's t to its s, in bits/dim, shape (B,).

    Args:
        covariance: Cov[x0 | x_t], bounded to what the data allow.
        prediction: At x_t drawn from q(x_t | x_0), with s in 1 .. t - 1.
        x0: The images.
    """
    snr, s, t = prediction.denoiser.schedule.snr, prediction.s, prediction.timestep
    assert s is not None  # the step is known
    error = x0.to(prediction.x_t) - prediction.x0_hat.clamp(*X0_RANGE)
    return _mean_bits(
        gaussian_step_kl(
            squared_error=covariance.basis.analyse(error).double().square(),
            variance=covariance.eigenvalues.double(),
            snr_difference=(snr[s] - snr[t]).item(),
        )
    )


def decoder_term(prediction: Prediction, x0: Tensor, levels: int) -> Tensor:
    """Return -log p(x_0 | x_t1) of the discretised Gaussian, in bits/dim, shape (B,)."""
    x0_hat = prediction.x0_hat.clamp(*X0_RANGE).double()
    std = math.sqrt(prediction.denoiser.schedule.beta_tilde(1, 2))
    return _mean_bits(-discretised_gaussian_log_prob(x0.to(x0_hat), x0_hat, std, levels))


def prior_term(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """Return KL(q(x_N | x_0) || N(0, I)), in bits/dim, shape (B,)."""
    alpha_bar = denoiser.schedule.alpha_bar[-1].item()
    squares = x0.to(denoiser.device).double() ** 2
    return _mean_bits(0.5 * (alpha_bar * squares - alpha_bar - math.log1p(-alpha_bar)))


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


def _mean_bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
