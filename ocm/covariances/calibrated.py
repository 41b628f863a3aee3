"""Calibration: two numbers for each timestep that make any covariance fit the errors of the mean.

A covariance describes a perfect mean; a learned mean errs, and where few steps are taken a variance
that is too small in a few dimensions dominates the bound. So::

    Cov' = a_t Cov + b_t I,    a_t, b_t >= 0,

with both chosen to maximise the Gaussian likelihood of x0 around x0_hat on training data, best on
images that the denoiser itself was not trained on. b_t is then a measure of the mean's error. For a
covariance that depends on the end s of a step (I-DDPM's) there are two numbers for each step
(s, t). Several diagonal covariances may be mixed, sum_j a_tj Cov_j + b_t I, by the same fit.

Samplers and the bound clamp the result to what data allow, like any covariance. That cuts it off
only for a mean that errs by more than half of the data's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import (
    PIXELS,
    PosteriorCovariance,
    SpectralCovariance,
    diagonal,
    spectral,
)
from ocm.diffusion.checks import check_range, check_samples, check_timesteps
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.draws import FITTING
from ocm.diffusion.noise import labelled, noisy_prediction
from ocm.diffusion.tables import Table
from ocm.progress import tracked

_MOST_ITERATIONS = 2000
_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Calibrated(Covariance):
    """sum_j a_tj Cov_j + b_t I, as :func:`ocm.calibrate` fits it.

    Attributes:
        covariances: What is calibrated; each is bounded to what data in ``x0_range`` allow first.
        weights: a_t1 .. a_tn and b_t by timestep or step, shape (rows, n + 1).
        x0_range: Where the data lie, or None.

    Raises:
        ValueError: If there is not one weight for each covariance and the shift, or one is
            negative.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> weights = ocm.diffusion.tables.Table({500: [2.0, 0.1]})
        >>> covariance = ocm.Calibrated((ocm.Beta(denoiser),), weights, x0_range=None)
        >>> covariance.at(denoiser.predict(torch.ones(2, 1, 4, 4), 500)).diagonal()    # 2 Cov + 0.1
        tensor([[[[1.1000]]]])
    """

    covariances: tuple[Covariance, ...]
    weights: Table
    x0_range: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if self.weights.values.shape[1] != len(self.covariances) + 1:
            raise ValueError(
                f"weights must have {len(self.covariances) + 1} columns, one for each covariance "
                f"and the shift, got {self.weights.values.shape[1]}"
            )
        if bool((self.weights.values < 0).any()):
            least = self.weights.values.min().item()
            raise ValueError(f"weights must be at least 0, got {least:.3g}")

    @property
    def depends_on_s(self) -> bool:
        """Whether one of the covariances depends on the end s of the step."""
        return any(covariance.depends_on_s for covariance in self.covariances)

    def at(self, prediction: Prediction) -> PosteriorCovariance:
        """Return the calibrated covariance; it costs what the covariances in it cost.

        Raises:
            TypeError: If one of several is no diagonal covariance.
        """
        *scales, shift = self.weights.numbers(prediction.s, prediction.timestep)
        parts = [c.at(prediction).bounded(self.x0_range) for c in self.covariances]
        if len(parts) == 1:
            return parts[0].affine(scales[0], shift)
        variances = [_pixels(part).eigenvalues for part in parts]
        mixed = sum(scale * variance for scale, variance in zip(scales, variances, strict=True))
        assert isinstance(mixed, Tensor)
        return diagonal(mixed + shift, prediction.x_t.shape)


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    covariances: Covariance | Sequence[Covariance],
    x0: Tensor,
    timesteps: Sequence[float] | Sequence[tuple[float, float]],
    *,
    labels: Tensor | None = None,
    x0_range: tuple[float, float] | None = (-1.0, 1.0),
    seed: int = 0,
    batch_size: int = 256,
    label: str = "calibration",
    progress: bool = False,
) -> Calibrated:
    """Fit a calibration a_t Cov + b_t I to data, by the Gaussian likelihood of x0 around x0_hat.

    Args:
        denoiser: The frozen denoiser.
        covariances: One covariance with eigenvalues, or several diagonal ones to be mixed.
        x0: Training data, shape (n, ...); a few hundred images are enough.
        timesteps: Where to fit; between them both numbers are interpolated. Pairs (s, t) fit each
            step by itself, for a covariance that depends on s.
        labels: Class of each sample, for a denoiser that takes them.
        x0_range: Where the data lie: x0_hat is clipped to it and each covariance bounded, as
            samplers and the likelihood do; None for data without bounds.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        label: What the progress bar calls it.
        progress: Whether to show a progress bar.

    Returns:
        The calibrated covariance.

    Raises:
        TypeError: If a covariance has no eigenvalues to fit (Lanczos), or one of several is no
            diagonal; or x0 is no floating-point tensor.
        ValueError: If a covariance depends on s and there are no steps (s, t); or x0 is empty or
            not finite, or there are no covariances or timesteps.

    Example:
        A covariance of zero, of standard normal data, gets the error of the mean as b_t:

        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> covariance = ocm.calibrate(denoiser, ocm.BetaTilde(denoiser), x0, [500], x0_range=None)
        >>> abs(covariance.at(denoiser.predict(x0, 500)).diagonal().max().item() - 0.5) < 0.05
        True
    """
    check_samples(x0, labels, batch_size)
    check_range("x0_range", x0_range)
    several = tuple(covariances) if isinstance(covariances, Sequence) else (covariances,)
    if not several:
        raise ValueError("covariances must hold at least one covariance, got none")
    for covariance in several:
        check_covariance(covariance)
    timesteps = check_timesteps(timesteps)
    by_step = any(isinstance(t, tuple) for t in timesteps)
    if not by_step and any(covariance.depends_on_s for covariance in several):
        raise ValueError(
            "timesteps must be the steps (s, t) that will be taken, for a covariance that depends "
            "on s, got timesteps t alone"
        )
    given = {t if isinstance(t, tuple) else (None, t) for t in timesteps}
    steps = sorted(given, key=lambda step: (step[1], step[0] or 0))
    rows: dict[Any, list[float]] = {}
    for s, t in tracked(steps, label, shown=progress):
        terms: list[Tensor] = []
        errors: list[Tensor] = []
        for first in range(0, len(x0), batch_size):
            batch = x0[first : first + batch_size].to(denoiser.device)
            condition = labelled(denoiser, labels, first, len(batch))
            prediction = noisy_prediction(
                denoiser, batch, t, seed, first, s=s, condition=condition, draw=FITTING
            )
            parts = [spectral(c.at(prediction).bounded(x0_range)) for c in several]
            if len(parts) > 1:
                parts = [_pixels(part) for part in parts]
            x0_hat = prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)
            error = parts[0].basis.analyse(batch - x0_hat)
            errors.append(error.double().square().flatten())
            variances = [part.eigenvalues.expand(error.shape) for part in parts]
            terms.append(torch.stack([v.double().flatten() for v in variances]))
        weights = fit_variance_components(torch.cat(terms, dim=1), torch.cat(errors))
        rows[t if s is None else (s, t)] = weights.tolist()
    return Calibrated(several, Table(rows), x0_range)


def fit_variance_components(variances: Tensor, squared_errors: Tensor) -> Tensor:
    """Maximise the likelihood of errors of variance sum_j a_j variance_j + b over a, b >= 0.

    The negative log-likelihood, mean of log v_i + e_i^2 / v_i, is the Itakura-Saito divergence of
    v from e^2 up to a constant, which the multiplicative updates of nonnegative matrix
    factorisation never increase (Févotte and Idier, 2011)::

        a_j <- a_j sqrt(sum_i variance_ji e_i^2 / v_i^2  /  sum_i variance_ji / v_i).

    Args:
        variances: At least 0, shape (n, number of errors).
        squared_errors: Shape (number of errors,).

    Returns:
        a_1 .. a_n and b, float64.

    Example:
        >>> variances = torch.tensor([[1.0, 1.0, 4.0, 4.0]]).double()
        >>> fit_variance_components(variances, 2.0 * variances[0] + 1.0).round(decimals=2)
        tensor([2., 1.], dtype=torch.float64)
    """
    terms = torch.cat([variances, torch.ones_like(squared_errors)[None]]).double()
    squared_errors = squared_errors.double()
    # Starting from equal parts of the mean squared error, whatever the size of the terms.
    size = squared_errors.mean().clamp(min=1e-30)
    terms_size = terms.mean(dim=1).clamp(min=1e-30)
    a = size / (len(terms) * terms_size)
    for _ in range(_MOST_ITERATIONS):
        inverse = 1.0 / (a @ terms).clamp(min=1e-12 * size)
        change = (terms @ (squared_errors * inverse**2) / (terms @ inverse)).sqrt()
        # A term that is zero everywhere has no scale to find.
        change = torch.where(terms.sum(dim=1) > 0, change, 0.0)
        following = a * change
        done = ((following - a) * terms_size).abs().sum() < _TOLERANCE * size
        a = following
        if bool(done):
            break
    return a


def _pixels(covariance: PosteriorCovariance) -> SpectralCovariance:
    part = spectral(covariance)
    if part.basis is not PIXELS:
        raise TypeError("covariances must be diagonal to be mixed, got one in another basis")
    return part
