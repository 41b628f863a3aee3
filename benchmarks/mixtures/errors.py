"""The error of a covariance's diagonal on a mixture, where the true one is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixtures.mixture import Mixture
from ocm.covariances import Covariance
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule

# Of half of the points; the other half is drawn with the noise of q.
_WIDENING = 2.0


@dataclass(frozen=True, eq=False)
class WeightedPoints:
    """Points that stand for q(x_t), with the posterior covariance at each.

    Attributes:
        x_t: Shape (n, d), float32.
        weights: Sum to 1, float64, shape (n,).
        covariance: Cov[x0 | x_t], float64, shape (n, d, d).
        t: Timestep.
    """

    x_t: Tensor
    weights: Tensor
    covariance: Tensor
    t: int

    @property
    def variance(self) -> Tensor:
        """The diagonal, shape (n, d)."""
        return self.covariance.diagonal(dim1=1, dim2=2)


def weighted_points(
    mixture: Mixture, schedule: Schedule, t: int, count: int, seed: int = 0
) -> WeightedPoints:
    """Draw points that estimate means over q(x_t) with little variance.

    Between the components of a mixture the posterior variance is large and q is small: few draws
    of q decide its mean square. Half of the points are therefore drawn with twice the noise, and
    each has the weight q / ((q + q_wide) / 2), at most 2 (multiple importance sampling by the
    balance heuristic; Veach and Guibas, 1995).

    Args:
        mixture: The data.
        schedule: The noise schedule.
        t: Timestep in 1 .. N.
        count: Number of points, at least 2.
        seed: Seed of data and noise.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> from mixtures.mixture import nine_gaussians
        >>> points = weighted_points(nine_gaussians(), linear(), 300, 4000)
        >>> round(points.weights.sum().item(), 9)
        1.0
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    x0 = mixture.sample(count, seed).double()
    # The points of a timestep are no others' with more noise.
    generator = torch.Generator().manual_seed(seed * (schedule.num_timesteps + 1) + t)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    noise[count // 2 :] *= _WIDENING
    x_t = schedule.diffuse(x0, t, noise).float()
    alpha_bar, beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
    identity = torch.eye(mixture.num_features).double()
    wide = Mixture(
        alpha_bar.sqrt() * mixture.means,
        alpha_bar * mixture.covariances + _WIDENING**2 * beta_bar * identity,
        mixture.weights,
    )
    log_ratio = wide.log_density(x_t, 0, schedule) - mixture.log_density(x_t, t, schedule)
    weights = 2.0 / (1.0 + log_ratio.exp())
    covariance = mixture.posterior_covariance(x_t, t, schedule)
    return WeightedPoints(x_t, weights / weights.sum(), covariance, t)


class VarianceError(NamedTuple):
    """Mean squared error of a variance, and what it is compared with.

    Attributes:
        mse: E (Var - Var_true)^2, over q(x_t) and dimensions.
        mean_squared_variance: E Var_true^2.
    """

    mse: float
    mean_squared_variance: float

    @property
    def relative(self) -> float:
        """The first over the second."""
        return self.mse / self.mean_squared_variance


@torch.no_grad()
def variance_error(
    covariance: Covariance,
    denoiser: Denoiser,
    points: WeightedPoints,
    dtype: torch.dtype = torch.float32,
) -> VarianceError:
    """Return the error of the variance as stated, before anything is clipped.

    Args:
        covariance: States Cov[x0 | x_t].
        denoiser: Whose prediction the covariance reads.
        points: Where.
        dtype: Of x_t; float64 for a true score, without a head, leaves the error of probes alone.
    """
    prediction = denoiser.predict(points.x_t.to(denoiser.device, dtype), points.t)
    stated = covariance.at(prediction).diagonal().double().cpu()
    squares = (stated - points.variance).square().mean(dim=1)
    size = points.variance.square().mean(dim=1)
    return VarianceError((points.weights @ squares).item(), (points.weights @ size).item())


@torch.no_grad()
def score_error(denoiser: Denoiser, mixture: Mixture, points: WeightedPoints) -> float:
    """Return E|score - score_true|^2 over E|score_true|^2, over q(x_t)."""
    prediction = denoiser.predict(points.x_t.to(denoiser.device), points.t)
    schedule = denoiser.schedule
    alpha_bar, beta_bar = schedule.alpha_bar[points.t], schedule.beta_bar[points.t]
    x0_hat = prediction.x0_hat.double().cpu()
    score = (alpha_bar.sqrt() * x0_hat - points.x_t.double()) / beta_bar
    true = mixture.score(points.x_t, points.t, schedule)
    squares = (score - true).square().sum(dim=1)
    return ((points.weights @ squares) / (points.weights @ true.square().sum(dim=1))).item()


def off_diagonal_share(points: WeightedPoints) -> float:
    """Return the energy off the diagonal, E sum_{i != j} C_ij^2 over E sum_ij C_ij^2."""
    total = points.weights @ points.covariance.square().sum(dim=(1, 2))
    return (1.0 - points.weights @ points.variance.square().sum(dim=1) / total).item()
