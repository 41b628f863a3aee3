"""The terms of the bound: the KL of a Gaussian step and the mass of a Gaussian on a bin."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a bin, the least standard deviation of a decoder.
_LEAST_STD = 0.1


def gaussian_step_kl(
    squared_error: Tensor, variance: Tensor, snr_difference: float | Tensor
) -> Tensor:
    """Return the KL divergence of one reverse step, per dimension, in nats.

    Args:
        squared_error: (x_0 - x0_hat)^2.
        variance: Var[x0 | x_t], at least 0, of the same shape or broadcast to it.
        snr_difference: SNR(s) - SNR(t) with SNR = alpha_bar / beta_bar; at least 0.

    Example:
        At the variance that equals the squared error only the logarithm is left:

        >>> gaussian_step_kl(torch.tensor(0.5), torch.tensor(0.5), 2.0)
        tensor(0.3466)
    """
    ratio = 1.0 + snr_difference * variance
    return 0.5 * (ratio.log() + (1.0 + snr_difference * squared_error) / ratio - 1.0)


def decoder_std(variance: Tensor, levels: int) -> Tensor:
    """Return the standard deviation of a decoder, at least a tenth of a bin of grey levels.

    An estimate that was clipped at zero states a certainty that no image can bear out.

    Example:
        >>> decoder_std(torch.tensor([0.0, 0.25]), levels=3)
        tensor([0.1000, 0.5000])
    """
    return variance.clamp(min=(_LEAST_STD * 2 / (levels - 1)) ** 2).sqrt()


def discretised_gaussian_log_prob(
    x0: Tensor, mean: Tensor, std: float | Tensor, levels: int
) -> Tensor:
    """Return log of the mass of N(mean, std^2) on the bin of each grey level x0, in nats.

    Bins are 2 / (levels - 1) wide and centred on the levels of [-1, 1]; the outermost are open.
    The difference of the two tails is taken in logarithms, so that no mass underflows to zero.

    Example:
        >>> x0 = torch.tensor([-1.0, 0.0, 1.0])
        >>> discretised_gaussian_log_prob(x0, torch.zeros(3), 0.5, levels=3).exp()
        tensor([0.1587, 0.6827, 0.1587])
    """
    half_bin = 1.0 / (levels - 1)
    # Mirrored so that the nearer edge is the upper one of the lower tail, where logs are accurate.
    distance = (x0 - mean).abs()
    sign = torch.where(x0 >= mean, 1.0, -1.0)
    nearer = (half_bin - distance) / std
    farther = -(half_bin + distance) / std
    away = sign * x0 >= 1.0 - half_bin  # the open end lies beyond x0, seen from the mean
    towards = -sign * x0 >= 1.0 - half_bin  # the open end lies behind the mean
    upper = torch.special.log_ndtr(torch.where(towards, torch.inf, nearer))
    lower = torch.where(away, -torch.inf, torch.special.log_ndtr(farther))
    log_mass: Tensor = upper + torch.log1p(-torch.exp(lower - upper))
    return log_mass
