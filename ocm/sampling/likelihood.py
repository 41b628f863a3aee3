"""The variational bound on the likelihood, in bits per dimension.

For a trajectory t_1 < ... < t_K = N the bound on -log2 p(x_0) is the sum of::

    KL(q(x_N | x_0) || N(0, (alpha_N^2 + sigma_N^2) I))                  the prior
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)),  (s, t) = (t_{k-1}, t_k)      a Gaussian step each
    -log p(x_0 | x_{t_1})                                                the decoder.

With p(x_s | x_t) of the form of :mod:`ocm.sampling.samplers` the step's KL needs nothing but
r = SNR(s) - SNR(t), since b^2 / beta_tilde(s, t) = r, on every path. With the
eigenvalues Var_k of Cov[x0 | x_t] in its eigenbasis F, the pixels for a diagonal one, it is the sum
over k of::

    1/2 [log(1 + r Var_k) + (1 + r (F (x_0 - x0_hat))_k^2) / (1 + r Var_k) - 1].

The decoder of images is a Gaussian of each dimension around x0_hat, integrated over the bin of each
grey level, the outermost bins being open. Its variance is the stated Var[x0 | x_t1], with at least
a tenth of a bin as standard deviation; the papers' is beta_tilde(1, 2) for every covariance
(:data:`Decoder`). For continuous data it is the density of N(x0_hat, Cov[x0 | x_t1]); with the
exact covariance of Gaussian data every term is exact, and the bound is the likelihood itself for
any K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import PosteriorCovariance, SpectralCovariance, spectral
from ocm.diffusion.checks import check_finite, check_positive_int, check_range, floating
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.divergences import (
    decoder_std,
    discretised_gaussian_log_prob,
    gaussian_step_kl,
)
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.schedules import full_precision
from ocm.diffusion.timesteps import reverse_steps, timesteps_of
from ocm.progress import tracked
from ocm.sampling.finite import all_finite, check_step
from ocm.sampling.samplers import X0_RANGE

Decoder = Literal["stated", "beta_tilde"]
"""The variance of the decoder: that of the covariance at t_1, or the papers' beta_tilde(1, 2)."""

# Of a bin: float32 rounding, and nothing that is a wrong number of levels.
_GRID_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound of each image, in bits per dimension, float64.

    Attributes:
        prior: Shape (B,).
        steps: The Gaussian steps from t_K = N down, shape (B, K - 1).
        decoder: Shape (B,).

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = ocm.quantise(torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4))
        >>> bits = ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, steps=5)
        >>> bits.prior.shape, bits.steps.shape, bits.decoder.shape
        (torch.Size([2]), torch.Size([2, 4]), torch.Size([2]))
        >>> bool((bits.total == bits.prior + bits.steps.sum(dim=1) + bits.decoder).all())
        True
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
    steps: int | Sequence[float],
    *,
    levels: int | None = 256,
    decoder: Decoder = "stated",
    x0_range: tuple[float, float] | None = X0_RANGE,
    condition: Condition | None = None,
    seed: int = 0,
    sample_offset: int = 0,
    progress: bool = False,
) -> BitsPerDim:
    """Bound the negative log-likelihood of images with the given timesteps and covariance.

    The variational bound of Ho, Jain and Abbeel (2020), whose terms are in
    :mod:`ocm.sampling.likelihood`. x_t is drawn from q(x_t | x_0) with the noise of (seed, sample,
    t), so that every covariance and every K is scored on the same noisy images.

    Args:
        denoiser: The frozen denoiser.
        covariance: States Cov[x0 | x_t], with eigenvalues.
        x0: Images in [-1, 1], shape (B, C, H, W), on the grid of ``levels`` grey levels; or any
            data, shape (B, ...), for ``levels=None``.
        steps: Number K of evenly spaced timesteps, or increasing timesteps up to N.
        levels: Number of grey levels: bins are 2 / (levels - 1) wide. None for continuous data,
            whose density is bounded.
        decoder: Whose variance the decoder of images takes: "stated", or "beta_tilde" as in the
            papers' tables.
        x0_range: Where x0_hat is clipped to, and what bounds the covariance; None for data without
            bounds.
        condition: Class labels of the images, for a denoiser that takes them.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        progress: Whether to show a progress bar.

    Returns:
        The terms for each image; ``total`` is an upper bound on -log2 p(x0) / D, in expectation
        over the noise.

    Raises:
        ValueError: If x0 leaves [-1, 1] or the grid, the timesteps do not increase to N, or
            levels < 2; or x0 is not finite; or the decoder of continuous data is not "stated".
        TypeError: If the covariance has no density (Lanczos).
        FloatingPointError: If the bound is not finite, naming t and whether it is the backbone or
            the covariance that is not.

    Example:
        Standard normal data, whose entropy is log2(2 pi e) / 2 = 2.05 bits a dimension:

        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> exact = ocm.Beta(denoiser)
        >>> bits = ocm.bits_per_dim(denoiser, exact, x0, steps=3, levels=None, x0_range=None)
        >>> abs(bits.total.mean().item() - 2.05) < 0.1
        True
    """
    check_covariance(covariance)
    check_range("x0_range", x0_range)
    if levels is None:
        check_finite("x0", x0)
        if decoder != "stated":
            raise ValueError(f"decoder must be 'stated' for continuous data, got {decoder!r}")
    else:
        check_images(x0, levels)
    x0 = full_precision(x0)  # errors are as small as the noise
    timesteps = timesteps_of(denoiser.schedule, steps)
    *noisy_steps, (_, first) = reverse_steps(timesteps)
    if timesteps[-1] != denoiser.schedule.num_timesteps:
        raise ValueError(
            f"steps must end at N = {denoiser.schedule.num_timesteps}, where x_N is noise to "
            f"the prior, got {timesteps[-1]}"
        )

    def predicted(t: float, s: float | None = None) -> Prediction:
        return noisy_prediction(denoiser, x0, t, seed, sample_offset, s=s, condition=condition)

    def term(t: float, s: float | None, watched: bool = False) -> Tensor:
        """Return the term of the step from t to s, or that of the decoder where s is None."""
        prediction = predicted(t, s)
        stated = spectral(covariance.at(prediction).bounded(x0_range))
        if s is not None:
            bits = step_term(stated, prediction, x0, x0_range)
        elif levels is None:
            bits = density_term(stated, prediction, x0, x0_range)
        else:
            bits = decoder_term(stated, prediction, x0, levels, decoder)
        if watched:
            check_step(bits, prediction, covariance, stated)
        return bits

    terms = [term(t, s) for s, t in tracked(noisy_steps, "bits/dim", shown=progress)]
    bits = BitsPerDim(
        prior=prior_term(denoiser, x0),
        steps=torch.stack(terms, dim=1) if terms else torch.zeros(len(x0), 0).double(),
        decoder=term(first, None),
    )
    if not all_finite(bits.total):
        for s, t in [*noisy_steps, (None, first)]:
            term(t, s, watched=True)
    return bits


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


def step_term(
    covariance: SpectralCovariance,
    prediction: Prediction,
    x0: Tensor,
    x0_range: tuple[float, float] | None = X0_RANGE,
) -> Tensor:
    """Return the KL of the step from the prediction's t to its s, in bits/dim, shape (B,).

    Args:
        covariance: Cov[x0 | x_t], bounded to what the data allow.
        prediction: At x_t drawn from q(x_t | x_0), with 0 < s < t.
        x0: The images.
        x0_range: Where x0_hat is clipped to.
    """
    schedule, s, t = prediction.denoiser.schedule, prediction.s, prediction.timestep
    assert s is not None  # the step is known
    return _mean_bits(
        gaussian_step_kl(
            squared_error=_squared_errors(covariance, prediction, x0, x0_range),
            variance=covariance.eigenvalues.double(),
            snr_difference=(schedule.log_snr(s).exp() - schedule.log_snr(t).exp()).item(),
        )
    )


def density_term(
    covariance: SpectralCovariance,
    prediction: Prediction,
    x0: Tensor,
    x0_range: tuple[float, float] | None,
) -> Tensor:
    """Return -log N(x0; x0_hat, Cov[x0 | x_t1]), in bits/dim, shape (B,)."""
    variance = covariance.eigenvalues.double()
    squared_error = _squared_errors(covariance, prediction, x0, x0_range)
    terms = squared_error / variance + variance.log() + math.log(2 * math.pi)
    # No variance at all gives every other x0 a density of 0.
    return _mean_bits(0.5 * torch.where(variance > 0, terms, torch.inf))


def _squared_errors(
    covariance: SpectralCovariance,
    prediction: Prediction,
    x0: Tensor,
    x0_range: tuple[float, float] | None,
) -> Tensor:
    """Return the squared errors of x0_hat in the eigenbasis, float64."""
    x0_hat = prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)
    error: Tensor = covariance.basis.analyse(x0.to(x0_hat) - x0_hat)
    return error.double().square()


def decoder_term(
    covariance: PosteriorCovariance | None,
    prediction: Prediction,
    x0: Tensor,
    levels: int,
    decoder: Decoder = "stated",
) -> Tensor:
    """Return -log p(x_0 | x_t1) of the discretised Gaussian, in bits/dim, shape (B,).

    Args:
        covariance: Cov[x0 | x_t1], whose diagonal counts, bounded to what the data allow; None for
            "beta_tilde", which does not look at it.
        prediction: At x_t1.
        x0: The images.
        levels: Number of grey levels.
        decoder: Whose variance is taken.

    Raises:
        ValueError: If the decoder is of neither name.
    """
    x0_hat = prediction.x0_hat.clamp(*X0_RANGE).double()
    if decoder == "stated":
        assert covariance is not None  # by the contract above
        std = decoder_std(covariance.diagonal().double(), levels)
    elif decoder == "beta_tilde":
        std = x0_hat.new_tensor(prediction.denoiser.schedule.beta_tilde(1, 2)).sqrt()
    else:
        raise ValueError(f"decoder must be 'stated' or 'beta_tilde', got {decoder!r}")
    return _mean_bits(-discretised_gaussian_log_prob(x0.to(x0_hat), x0_hat, std, levels))


def prior_term(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """Return KL(q(x_N | x_0) || N(0, prior_std^2 I)), in bits/dim, shape (B,)."""
    alpha_bar = denoiser.schedule.alpha_bar[-1].item()
    squares = x0.to(denoiser.device).double() ** 2
    return _mean_bits(0.5 * (alpha_bar * squares - alpha_bar - math.log1p(-alpha_bar)))


def quantise(x0: Tensor, levels: int = 256) -> Tensor:
    """Round images in [-1, 1] to the grid of ``levels`` grey levels, -1 + 2 k / (levels - 1).

    Args:
        x0: Images in [-1, 1], of any shape.
        levels: Number of grey levels, at least 2.

    Returns:
        The nearest grey levels, of the shape of x0.

    Raises:
        TypeError: If levels is no int, or x0 no floating-point tensor.
        ValueError: If levels < 2.

    Example:
        >>> import torch, ocm
        >>> ocm.quantise(torch.tensor([-1.0, 0.1, 0.9]), levels=3)
        tensor([-1.,  0.,  1.])
    """
    check_positive_int("levels", levels)
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return ((floating("x0", x0) + 1) * (levels - 1) / 2).round() * 2 / (levels - 1) - 1


def _mean_bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2.0)
