"""Continuous data from images of grey levels, and what their density says of the images.

The density p is that of y = x_t1 / alpha_t1 = x0 + s n, s = sigma / alpha at the first timestep.
For any q(y | x0), and P(x0 | y) that sums to one over all images::

    log P(x0) >= E_q [ log p(y) + log P(x0 | y) - log q(y | x0) ],

and the logarithm of the mean of exp over several draws of y lies between the two (Burda, Grosse and
Salakhutdinov, 2016). With b = 1 / (levels - 1), half a bin, the choices are

=====================  =================================  =======================================
name                   q(y | x0)                          P(x0 | y)
=====================  =================================  =======================================
"uniform"              uniform within b of x0             1: y is rounded
"truncated_normal"     N(x0, s^2) within b of x0          1: y is rounded
"decoder"              N(x0, s^2), as x_t1 is drawn       mass of N(x0_hat, Var[x0 | x_t1]) on bins
=====================  =================================  =======================================

The first is that of Theis, van den Oord and Bethge (2016). The second is the noise that the model
was trained on, cut off at the bins ("variational-free", Zheng et al., 2023), and pays where s is
about b / 3: where s is smaller it leaves most of a bin out. The third is the decoder of
:func:`ocm.bits_per_dim`, for a path whose first timestep has more noise than a bin is wide.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Dequantisation = Literal["uniform", "truncated_normal", "decoder"]
DEQUANTISATIONS = get_args(Dequantisation)


class Dequantised(NamedTuple):
    """A draw of y.

    Attributes:
        y: Shape (B, ...), float64.
        log_weight: -log q(y | x0), shape (B,).
    """

    y: Tensor
    log_weight: Tensor


def dequantise(
    x0: Tensor, noise: Tensor, name: Dequantisation, *, levels: int, std: float
) -> Dequantised:
    """Return a draw of y.

    Args:
        x0: Images on the grid of levels, shape (B, ...).
        noise: Standard normal numbers of that shape.
        name: Of q.
        levels: Number of grey levels.
        std: The standard deviation s.

    Raises:
        ValueError: If the name is unknown.

    Example:
        Uniform noise has no other weight than the bins:

        >>> y, log_weight = dequantise(
        ...     torch.zeros(1, 4), torch.randn(1, 4), "uniform", levels=3, std=0.1
        ... )
        >>> bool((y.abs() <= 0.5).all()), log_weight
        (True, tensor([0.], dtype=torch.float64))
    """
    if name not in DEQUANTISATIONS:
        raise ValueError(
            f"dequantisation must be one of {', '.join(DEQUANTISATIONS)}, got {name!r}"
        )
    x0, noise, half_bin = x0.double(), noise.double(), 1.0 / (levels - 1)
    features = x0[:1].numel()
    if name == "uniform":
        # Between the ends, where rounding may have reached them.
        u = torch.special.ndtr(noise).clamp(1e-12, 1 - 1e-12)
        y = x0 + half_bin * (2 * u - 1)
        return Dequantised(y, y.new_full((len(x0),), features * math.log(2 * half_bin)))
    log_mass = 0.0
    if name == "truncated_normal":
        tau = torch.tensor(half_bin / std, dtype=torch.float64)
        mass = torch.erf(tau / math.sqrt(2))
        low = torch.special.ndtr(-tau)
        # The same normal numbers at their quantiles within the bin.
        inside = torch.special.ndtri(low + torch.special.ndtr(noise) * mass)
        noise, log_mass = inside.clamp(-tau, tau), mass.log().item()
    own = 0.5 * noise.square().flatten(1).sum(1)
    constant = features * (0.5 * math.log(2 * math.pi) + math.log(std) + log_mass)
    return Dequantised(x0 + std * noise, own + constant)
