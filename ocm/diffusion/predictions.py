"""What a network's output predicts: x0_hat = p x_t + q output, whatever it is.

==================  ==========================================  =================================
prediction type     output                                      x0_hat
==================  ==========================================  =================================
"epsilon"           the noise n                                 (x - sigma n) / alpha
"sample"            x0                                          output
"v_prediction"      (alpha n - sigma x0) / r                    alpha / r^2 x - sigma / r output
"flow_prediction"   n - x0                                      (x - sigma output) / (alpha + sigma)
"edm"               F of EDM's preconditioning                  c alpha x + sqrt(c) sigma F
"trigflow"          F, of the other sign                        c alpha x - sqrt(c) sigma F
==================  ==========================================  =================================

with r^2 = alpha^2 + sigma^2 and c = 1 / (alpha^2 + sigma^2 / data_std^2). On the paths for which
they were made these are v of Salimans and Ho (2022), the velocity of flow matching (Lipman et al.,
2023), c_skip and c_out of EDM (Karras et al., 2022) and cos(s) x - data_std sin(s) F of TrigFlow
(Lu and Song, 2025); on any other they remain well defined. A preconditioned network is shown
sqrt(c) / data_std x_t, every other one x_t itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Of x0_hat = p x_t + q output, and of what the network is shown, input_scale x_t."""

    p: Tensor
    q: Tensor
    input_scale: Tensor


def _epsilon(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(1.0 / alpha, -sigma / alpha, torch.ones_like(alpha))


def _sample(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(torch.zeros_like(alpha), torch.ones_like(alpha), torch.ones_like(alpha))


def _v_prediction(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    squared = alpha**2 + sigma**2
    return Coefficients(alpha / squared, -sigma / squared.sqrt(), torch.ones_like(alpha))


def _flow_prediction(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    total = alpha + sigma
    return Coefficients(1.0 / total, -sigma / total, torch.ones_like(alpha))


def _edm(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    c = 1.0 / (alpha**2 + (sigma / data_std) ** 2)
    return Coefficients(c * alpha, c.sqrt() * sigma, c.sqrt() / data_std)


def _trigflow(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    p, q, input_scale = _edm(alpha, sigma, data_std)
    return Coefficients(p, -q, input_scale)


_TYPES: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "epsilon": _epsilon,
    "sample": _sample,
    "v_prediction": _v_prediction,
    "flow_prediction": _flow_prediction,
    "edm": _edm,
    "trigflow": _trigflow,
}
PREDICTION_TYPES = tuple(_TYPES)
# Of those whose network is shown a scaled x_t.
PRECONDITIONED = ("edm", "trigflow")


def coefficients(
    prediction_type: str, alpha: Tensor, sigma: Tensor, data_std: float = 1.0
) -> Coefficients:
    """Return p, q and the input's scale at x_t = alpha x0 + sigma n.

    Args:
        prediction_type: One of :data:`PREDICTION_TYPES`.
        alpha: Scale of the data, any shape.
        sigma: Scale of the noise, of the same shape.
        data_std: Standard deviation of the data that "edm" and "trigflow" were preconditioned for.

    Raises:
        ValueError: If there is no such type.

    Example:
        >>> half = torch.tensor(0.5)
        >>> p, q, input_scale = coefficients("flow_prediction", half, half)
        >>> p, q
        (tensor(1.), tensor(-0.5000))
    """
    check_prediction_type(prediction_type)
    return _TYPES[prediction_type](alpha, sigma, data_std)


@lru_cache(maxsize=4096)
def numbers(
    prediction_type: str, alpha: float, sigma: float, data_std: float = 1.0
) -> tuple[float, float, float]:
    """Return :func:`coefficients` of one timestep as numbers, which are computed once.

    Example:
        >>> numbers("flow_prediction", 0.5, 0.5)
        (1.0, -0.5, 1.0)
    """
    a, s = (torch.tensor(scale, dtype=torch.float64, device="cpu") for scale in (alpha, sigma))
    p, q, input_scale = coefficients(prediction_type, a, s, data_std)
    return p.item(), q.item(), input_scale.item()


def check_prediction_type(prediction_type: str) -> None:
    """Raise unless ``prediction_type`` is one of :data:`PREDICTION_TYPES`.

    Raises:
        ValueError: If it is not.
    """
    if prediction_type not in _TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(_TYPES)}, got {prediction_type!r}"
        )


def target(
    prediction_type: str,
    alpha: Tensor,
    sigma: Tensor,
    x0: Tensor,
    noise: Tensor,
    data_std: float = 1.0,
) -> Tensor:
    """Return what the network should put out for x_t = alpha x0 + sigma noise.

    It is the output whose x0_hat is x0, (x0 - p x_t) / q, in a form without that division.

    Args:
        prediction_type: One of :data:`PREDICTION_TYPES`.
        alpha: Scale of the data, broadcast to ``x0``.
        sigma: Scale of the noise, broadcast to ``x0``.
        x0: The data.
        noise: Standard normal noise.
        data_std: As in :func:`coefficients`.

    Raises:
        ValueError: If there is no such type.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> target("flow_prediction", 0.5 * one, 0.5 * one, x0=one, noise=zero)
        tensor([-1.])
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_prediction":
        return noise - x0
    # v, and F in the unit of the data: both are (alpha noise - sigma x0) / r there.
    std = 1.0 if prediction_type == "v_prediction" else data_std
    scaled = sigma / std
    v = (alpha * noise - scaled * x0 / std) / (alpha**2 + scaled**2).sqrt()
    return -v if prediction_type == "edm" else v
