"""What samplers and the likelihood ask of a covariance, and what learned ones share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.operators import PosteriorCovariance, SpectralCovariance, diagonal
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import Schedule, per_sample


class Covariance(Protocol):
    """A statement of Cov[x0 | x_t]."""

    def at(self, prediction: Prediction, *, s: int | None = None) -> PosteriorCovariance:
        """Return Cov[x0 | x_t], not clipped.

        Args:
            prediction: The backbone's prediction at (x_t, t).
            s: Where the reverse step goes; None for t - 1. Only :class:`ImprovedDDPM` looks at it.
        """
        ...


@runtime_checkable
class LearnedCovariance(Protocol):
    """A covariance whose head is trained by a loss of its own."""

    @property
    def denoiser(self) -> Denoiser:
        """The frozen denoiser."""
        ...

    @property
    def head(self) -> nn.Module:
        """The network on the denoiser's features."""
        ...

    @property
    def parameterisation(self) -> Parameterisation:
        """What the head's output means."""
        ...

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the variance of each dimension."""
        ...

    def loss(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        seed: int,
        sample_offset: int,
        labels: Tensor | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Return the loss of the head on a batch, differentiable for the head alone.

        Args:
            x0: Data, shape (B, ...).
            t: Timesteps in 1 .. N, int64 of shape (B,).
            seed: Seed of the noise and the probes.
            sample_offset: Number of samples that training has seen before these.
            labels: Class labels, for a denoiser that takes them.
            head: Called in place of the covariance's own: the same, wrapped for training.
        """
        ...


def looks_at_s(covariance: Covariance) -> bool:
    """Return whether a covariance depends on the end s of the step, which few do."""
    return bool(getattr(covariance, "looks_at_s", False))


def from_branches(
    prediction: Prediction, variance: Callable[[Prediction], Tensor]
) -> SpectralCovariance:
    """Return the diagonal covariance of ``variance``, combined over the branches of a guidance."""
    shape = prediction.x_t.shape
    if not prediction.branches:
        return diagonal(variance(prediction), shape)
    combined = [weight * variance(branch) for weight, branch in prediction.branches]
    return diagonal(combined[0] + combined[1], shape)


def scaled_ratio(covariance: LearnedCovariance, prediction: Prediction) -> Tensor:
    """Return c_t ratio(o), o what the head puts out for the features of the prediction."""
    units, schedule = covariance.parameterisation, covariance.denoiser.schedule
    ratio = units.ratio(covariance.head(prediction.features))
    return units.scale(schedule, prediction.t, prediction.x_t) * ratio


def regression_loss(
    ratio: Tensor,
    target: Tensor,
    parameterisation: Parameterisation,
    denoiser: Denoiser,
    t: Tensor,
    network_error: float = 0.0,
) -> Tensor:
    """Return the mean of w_t (ratio - target / c_t)^2, with the weight of :func:`loss_weight`."""
    scale = parameterisation.scale(denoiser.schedule, t, target)
    weight = loss_weight(parameterisation, denoiser, t, network_error).to(target)
    weight = weight.reshape(-1, *[1] * (target.dim() - 1))
    return (weight * (ratio - target / scale).square()).mean()


def loss_weight(
    parameterisation: Parameterisation, denoiser: Denoiser, t: Tensor, network_error: float
) -> Tensor:
    """Return 1 / (1 + (network_error (A_t - 1))^2), float64 of the shape of t.

    A_t multiplies the errors of a network that predicts the noise when their unit is c_t
    (:meth:`ocm.Parameterisation.amplification`). Where it makes them larger than
    the variance itself, the target says little, and without the weight it would say it loudest.
    In the papers' parameterisation A_t = 1, and so is the weight. It is for targets that hold the
    network's output or its Jacobian; a network that predicts x0 or v amplifies nothing.
    """
    if denoiser.prediction_type != "epsilon":
        network_error = 0.0
    excess = parameterisation.amplification(denoiser.schedule, t.cpu()) - 1.0
    return (1.0 / (1.0 + (network_error * excess) ** 2)).to(t.device)


def reverse_variance(schedule: Schedule, s: int, t: int, variance: Tensor) -> Tensor:
    """Return beta_tilde(s, t) + (alpha_bar_s beta(s, t)^2 / beta_bar_t^2) Var[x0 | x_t].

    The variance of DDPM's reverse step from t to s, for 0 <= s < t <= N.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> schedule, t = linear(), 500
        >>> beta_bar = schedule.beta_bar[t]
        >>> bool((reverse_variance(schedule, 400, t, beta_bar) / schedule.beta(400, t)) - 1 < 1e-9)
        True
    """
    return schedule.beta_tilde(s, t) + _weight(schedule, s, t) * variance


def variance_of_x0(schedule: Schedule, s: int, t: int, sigma_squared: Tensor) -> Tensor:
    """Return (sigma^2 - beta_tilde(s, t)) beta_bar_t^2 / (alpha_bar_s beta(s, t)^2).

    The variance of x0 that gives DDPM's reverse step from t to s the variance sigma^2.

    Example:
        >>> import torch
        >>> from ocm.diffusion.schedules import linear
        >>> there = reverse_variance(linear(), 400, 500, torch.tensor(0.3))
        >>> variance_of_x0(linear(), 400, 500, there)
        tensor(0.3000)
    """
    return (sigma_squared - schedule.beta_tilde(s, t)) / _weight(schedule, s, t)


def _weight(schedule: Schedule, s: int, t: int) -> float:
    beta, beta_bar = schedule.beta(s, t), schedule.beta_bar[t].item()
    return schedule.alpha_bar[s].item() * beta**2 / beta_bar**2


def constant(table: Tensor, prediction: Prediction) -> SpectralCovariance:
    """Return the covariance table[t] I."""
    return diagonal(per_sample(table, prediction.t, prediction.x_t), prediction.x_t.shape)
