"""Results that are not finite: which step made them so, and whether backbone or covariance did."""

from __future__ import annotations

import torch
from torch import Tensor

from ocm.covariances.base import Covariance
from ocm.covariances.operators import PosteriorCovariance, SpectralCovariance
from ocm.diffusion.denoiser import Prediction


def all_finite(x: Tensor) -> bool:
    """Return whether all numbers are finite, or cannot be looked at.

    A tensor of a GPU is waited for. Those without data, and those of a CUDA graph that is being
    captured, cannot be looked at.

    Example:
        >>> all_finite(torch.tensor([1.0, float("nan")]))
        False
    """
    if x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return bool(torch.isfinite(x).all())


def check_stated(
    prediction: Prediction, covariance: Covariance, stated: PosteriorCovariance | None
) -> None:
    """Raise unless the backbone's output and the stated variances are finite.

    Args:
        prediction: At (x_t, t).
        covariance: Which is named.
        stated: What it states there; None for a step without it. Only of eigenvalues that are
            known can be said whether they are finite.

    Raises:
        FloatingPointError: If they are not, naming which and t.
    """
    _check("backbone must put out finite numbers", prediction.output, prediction.t)
    if isinstance(stated, SpectralCovariance):
        name = described(covariance)
        _check(f"{name} must state finite variances", stated.eigenvalues, prediction.t)


def check_step(
    result: Tensor,
    prediction: Prediction,
    covariance: Covariance,
    stated: PosteriorCovariance | None,
) -> None:
    """Raise unless what came of a step is finite; the other arguments are of :func:`check_stated`.

    Raises:
        FloatingPointError: If it is not, naming t and what else is not finite there.
    """
    if all_finite(result):
        return
    check_stated(prediction, covariance, stated)
    between = ""
    if isinstance(stated, SpectralCovariance) and stated.eigenvalues.numel():
        low, high = (bound.item() for bound in stated.eigenvalues.aminmax())
        between = f", where {described(covariance)} states variances of {low:.3g} .. {high:.3g}"
    _check("the result of a step must be finite", result, prediction.t, between)


def described(covariance: Covariance) -> str:
    """Return the name of a covariance, with that of its head.

    Example:
        >>> from ocm.covariances.learned.npr import NPR
        >>> described(NPR(denoiser=None, head=torch.nn.Identity()))
        'NPR with the head Identity'
    """
    name = type(covariance).__name__
    parts = getattr(covariance, "covariances", ())
    if parts:
        return f"{name} of {', '.join(map(described, parts))}"
    head = getattr(covariance, "head", None)
    return name if head is None else f"{name} with the head {type(head).__name__}"


def _check(wanted: str, values: Tensor, t: float | Tensor, more: str = "") -> None:
    infinite = int((~torch.isfinite(values)).sum())
    if infinite:
        raise FloatingPointError(
            f"{wanted}, got {infinite} NaN or infinite of {values.numel()} values at t = {t}{more}"
        )
