"""What samplers and the likelihood ask of a covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ocm.covariances.operators import PosteriorCovariance, SpectralCovariance, diagonal
from ocm.diffusion.denoiser import Branch, Prediction
from ocm.diffusion.schedules import full_precision, per_sample


class Covariance(Protocol):
    """A statement of Cov[x0 | x_t]; a class of your own has the method ``at``, and derives from it.

    Attributes:
        depends_on_s: Whether it is a statement about one step, which depends on its end s.

    Example:
        One variance for all, which samplers and the bound take like any other:

        >>> import torch, ocm
        >>> class Constant(ocm.Covariance):
        ...     def at(self, prediction):
        ...         variance = torch.full_like(prediction.x_t, 0.1)
        ...         return ocm.SpectralCovariance(variance, prediction.x_t.shape)
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> ocm.sample(denoiser, Constant(), (2, 1, 4, 4), steps=5).shape
        torch.Size([2, 1, 4, 4])
    """

    @property
    def depends_on_s(self) -> bool:
        """False; True for :class:`ocm.ImprovedDDPM`, and for what is made of it."""
        return False

    def at(self, prediction: Prediction) -> PosteriorCovariance:
        """Return Cov[x0 | x_t], not clipped.

        Args:
            prediction: The backbone's prediction at (x_t, t).
        """
        ...


def check_covariance(covariance: object) -> None:
    """Raise unless ``covariance`` states one, by its method ``at``.

    Raises:
        TypeError: If it does not.

    Example:
        >>> check_covariance("beta")
        Traceback (most recent call last):
        ...
        TypeError: covariance must state Cov[x0 | x_t], as ocm.Hutchinson(...) does, got 'beta'
    """
    if isinstance(covariance, type) or not callable(getattr(covariance, "at", None)):
        raise TypeError(
            f"covariance must state Cov[x0 | x_t], as ocm.Hutchinson(...) does, got {covariance!r}"
        )


def from_branches(
    prediction: Prediction, variance: Callable[[Branch], Tensor]
) -> SpectralCovariance:
    """Return the diagonal covariance of ``variance``, combined over the branches of a guidance."""
    return diagonal(over_branches(prediction, variance), prediction.x_t.shape)


def over_branches(prediction: Prediction, variance: Callable[[Branch], Tensor]) -> Tensor:
    """Return ``variance``, combined over the branches of a guidance."""
    (weight, branch), *others = prediction.branches
    combined = variance(branch) if not others else weight * variance(branch)
    for weight, branch in others:
        combined = combined + weight * variance(branch)
    return combined


def constant(variance: float | Tensor, prediction: Prediction) -> SpectralCovariance:
    """Return the covariance variance I, for one number or one for each sample."""
    # In float32 at least: in float16 those of little noise would be zero.
    like = full_precision(prediction.x_t[:0])
    return diagonal(per_sample(variance, like), prediction.x_t.shape)
