"""What covariances with a head share."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ocm.covariances.base import Covariance
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Branch, Denoiser, Prediction


@runtime_checkable
class LearnedCovariance(Covariance, Protocol):
    """A covariance whose head is trained by a loss of its own.

    A class of your own derives from :class:`ocm.Covariance` and has the five members below, the
    first three as fields or properties. :func:`ocm.train_head` trains its head by ``loss``, and
    samplers and bounds call ``at``.

    Example:
        A head trained by the Gaussian likelihood of x0 around x0_hat:

        >>> import torch, ocm
        >>> from ocm.diffusion.noise import noisy
        >>> from ocm.training.small_unet import small_unet
        >>> class Likelihood(ocm.Covariance):
        ...     parameterisation = ocm.BOUNDED
        ...     def __init__(self, denoiser, head):
        ...         self.denoiser, self.head = denoiser, head
        ...     def variance(self, prediction, head):
        ...         units, output = self.parameterisation, head(prediction.features)
        ...         schedule = self.denoiser.schedule
        ...         return units.variance(schedule, prediction.t, prediction.x_t, output)
        ...     def at(self, prediction):
        ...         variance = self.variance(prediction, self.head)
        ...         return ocm.SpectralCovariance(variance, prediction.x_t.shape)
        ...     def loss(self, x0, t, *, seed, sample_offset, condition=None, head=None):
        ...         x_t, _ = noisy(self.denoiser.schedule, x0, t, seed, sample_offset)
        ...         prediction = self.denoiser.predict(x_t, t, condition=condition)
        ...         variance = self.variance(prediction, head or self.head)
        ...         return ((x0 - prediction.x0_hat).square() / variance + variance.log()).mean()
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> covariance = Likelihood(denoiser, ocm.make_head(denoiser))
        >>> isinstance(covariance, ocm.LearnedCovariance)
        True
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> len(ocm.train_head(covariance, torch.zeros(4, 1, 8, 8), settings, progress=False))
        2
    """

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
    return units.variance(schedule, branch.t, branch.x_t, covariance.head(branch.features))


def regression_loss(
    ratio: Tensor,
    target: Tensor,
    parameterisation: Parameterisation,
    denoiser: Denoiser,
    t: Tensor,
    network_error: float = 0.0,
) -> Tensor:
    """Return the mean of w_t (ratio - target / c_t)^2 for a target that holds x0_hat.

    w_t is that of :func:`loss_weight`. x0_hat errs by about sigma, times p where that is above 1.
    """
    schedule = denoiser.schedule
    scale = parameterisation.scale(schedule, t, target)
    size = schedule.sigma(t) * denoiser.coefficients(t).p.clamp(min=1.0)
    amplification = size**2 / parameterisation.scale(schedule, t)
    weight = loss_weight(amplification, network_error).to(target)
    weight = weight.reshape(-1, *[1] * (target.dim() - 1))
    return (weight * (ratio - target / scale).square()).mean()


def loss_weight(amplification: Tensor, network_error: float) -> Tensor:
    """Return 1 / (1 + (network_error (A_t - 1))^2), of the shape of A_t.

    A_t multiplies the network's error in a target whose unit is c_t. Where it makes the error
    larger than the variance itself, the target says little, and without the weight it would say it
    loudest. For a network that predicts the noise A_t = sigma^2 / (alpha^2 c_t) of all targets,
    which is 1 in the papers' units, and so is the weight; below 1 nothing is amplified.
    """
    if network_error == 0.0:
        return torch.ones_like(amplification)
    return 1.0 / (1.0 + (network_error * (amplification - 1.0).clamp(min=0.0)) ** 2)
