"""What covariances with a head share."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ocm.covariances.base import Covariance
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.denoiser import Branch, Condition, Denoiser, Prediction


@runtime_checkable
class LearnedCovariance(Covariance, Protocol):
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

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the variance of each dimension."""
        ...

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
        """Return the loss of the head on a batch, differentiable for the head alone.

        Args:
            x0: Data, shape (B, ...).
            t: Timesteps in 1 .. N, int64 of shape (B,).
            seed: Seed of the noise and the probes.
            sample_offset: Number of samples that training has seen before these.
            condition: Class labels, for a denoiser that takes them.
            head: Called in place of the covariance's own: the same, wrapped for training.
        """
        ...


def scaled_ratio(covariance: LearnedCovariance, branch: Branch) -> Tensor:
    """Return c_t ratio(o), o what the head puts out for the features of the prediction."""
    units, schedule = covariance.parameterisation, covariance.denoiser.schedule
    ratio = units.ratio(covariance.head(branch.features))
    return units.scale(schedule, branch.t, branch.x_t) * ratio


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

    With Cov[x0 | x_t] = c I + k J, A_t = c / c_t multiplies a relative error of the network's
    Jacobian when c_t is the unit. Where it makes the error larger than the variance itself, the
    target says little, and without the weight it would say it loudest. It is large near t = N for
    a network that predicts the noise, or the velocity of a flow; in the papers' units A_t = 1, and
    so is the weight. It is for targets that hold the network's output or its Jacobian.
    """
    t = t.cpu()
    if network_error == 0.0:
        return torch.ones_like(t, dtype=torch.float64)
    p = denoiser.coefficients(t).p
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    c_over_unit = sigma**2 / alpha * p / parameterisation.scale(denoiser.schedule, t)
    # Not a number where alpha = 0 and p = 0: there c, and so A_t, stays finite.
    excess = (c_over_unit - 1.0).clamp(min=0.0).nan_to_num(nan=0.0, posinf=math.inf)
    return 1.0 / (1.0 + (network_error * excess) ** 2)
