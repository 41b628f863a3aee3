"""Mean and covariance of x0 given x at any sigma, as other samplers and inverse problems need it.

k-diffusion and most inverse-problem code write x = x0 + sigma n (variance exploding). That is
x_t / sqrt(alpha_bar_t) at the level with sigma^2 = beta_bar_t / alpha_bar_t, and x0 given x is x0
given x_t. The backbone and the covariance are asked at the level nearest in log sigma, as
k-diffusion does with ``quantize=True``; the scaling of x and the mean use sigma itself.

    posterior = ocm.x0_given(denoiser, covariance, x, sigma)
    x0 = ocm.posterior_mean_given_measurement(
        posterior.mean, posterior.covariance, y, blur, noise_std=0.05
    )
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ocm.covariances.base import Covariance
from ocm.covariances.operators import PosteriorCovariance
from ocm.diffusion.denoiser import Condition, Denoiser, Prediction
from ocm.diffusion.schedules import Schedule, per_sample
from ocm.sampling.samplers import X0_RANGE


class Posterior(NamedTuple):
    """Mean and covariance of x0 given x.

    Attributes:
        mean: x0_hat, of the shape of x.
        covariance: Cov[x0 | x], an operator on tensors of that shape.
    """

    mean: Tensor
    covariance: PosteriorCovariance


def sigmas(schedule: Schedule) -> Tensor:
    """Return sigma_1 .. sigma_N = sqrt(beta_bar / alpha_bar), float64.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> levels = sigmas(linear())
        >>> round(levels[0].item(), 3), round(levels[-1].item())
        (0.01, 157)
    """
    return schedule.snr[1:].rsqrt()


def nearest_timestep(schedule: Schedule, sigma: Tensor) -> Tensor:
    """Return the timestep in 1 .. N whose sigma is nearest in its logarithm.

    Args:
        schedule: The noise schedule.
        sigma: Any shape. Below sigma_1 it is timestep 1.

    Raises:
        ValueError: If a sigma is not positive, or above twice the largest, where the backbone
            knows nothing (not checked on a GPU, which would have to be waited for).

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> nearest_timestep(linear(), torch.tensor([0.001, 1.0, 150.0]))
        tensor([  1, 259, 995])
    """
    levels = sigmas(schedule).to(sigma.device)
    if sigma.device.type == "cpu" and not bool(((sigma > 0) & (sigma <= 2 * levels[-1])).all()):
        raise ValueError(
            f"sigma must lie in (0, {2 * levels[-1].item():.4g}], twice the largest of the "
            f"schedule, got {sigma.min().item():.4g} .. {sigma.max().item():.4g}"
        )
    distances = (sigma.double().log()[..., None] - levels.log()).abs()
    return distances.argmin(dim=-1) + 1


def x0_given(
    denoiser: Denoiser,
    covariance: Covariance,
    x: Tensor,
    sigma: float | Tensor,
    *,
    x0_range: tuple[float, float] | None = X0_RANGE,
    condition: Condition | None = None,
    sample_offset: int = 0,
) -> Posterior:
    """Return mean and covariance of x0 given x = x0 + sigma n.

    Args:
        denoiser: The denoiser.
        covariance: Any covariance of it.
        x: Shape (B, ...).
        sigma: A number, or a tensor of shape (B,); covariances that take products with the
            Jacobian need one for all samples.
        x0_range: Where the mean is clipped to, and what bounds the covariance; None for data
            without bounds.
        condition: Class labels and guidance (:meth:`ocm.Denoiser.condition`).
        sample_offset: Number of the first sample, for covariances that draw probes.

    Raises:
        ValueError: If ``sigma`` is not positive or far above the schedule's, or is neither one
            number nor one for each sample.

    Example:
        >>> import ocm
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",))
        >>> denoiser = ocm.Denoiser(unet, ocm.linear()).freeze()
        >>> covariance = ocm.Hutchinson(denoiser, num_probes=1)
        >>> posterior = x0_given(denoiser, covariance, torch.zeros(2, 3, 8, 8), 0.5)
        >>> posterior.mean.shape, posterior.covariance.diagonal().shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 3, 8, 8]))
    """
    prediction, p, q = _at_nearest(denoiser, x, sigma, condition, sample_offset)
    # First: the covariance may keep the graph of the evaluation.
    stated = covariance.at(prediction).bounded(x0_range)
    mean = p * prediction.x_t + q * prediction.output
    return Posterior(mean if x0_range is None else mean.clamp(*x0_range), stated)


def mean_of_x0(
    denoiser: Denoiser, x: Tensor, sigma: float | Tensor, *, condition: Condition | None = None
) -> Tensor:
    """Return the mean of x0 given x = x0 + sigma n, not clipped; the arguments of `x0_given`."""
    prediction, p, q = _at_nearest(denoiser, x, sigma, condition, 0)
    return p * prediction.x_t + q * prediction.output


def _at_nearest(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float | Tensor,
    condition: Condition | None,
    sample_offset: int,
) -> tuple[Prediction, Tensor, Tensor]:
    """Return the prediction at x / sqrt(1 + sigma^2) of the nearest level, and sigma's p and q."""
    levels = torch.as_tensor(sigma, dtype=torch.float64, device=_device_of(sigma)).reshape(-1)
    if len(levels) not in (1, len(x)):
        raise ValueError(
            f"sigma must be one number, or one for each of {len(x)} samples, got {len(levels)}"
        )
    nearest = nearest_timestep(denoiser.schedule, levels)
    # Of one sample for each level, to index tables by.
    at_sigma = Schedule("sigma", -torch.log1p(levels**2))
    index = 0 if len(levels) == 1 else torch.arange(len(levels), device=levels.device)
    x_t = per_sample(at_sigma.alpha_bar.sqrt(), index, x) * x
    t = int(nearest) if len(levels) == 1 else nearest.to(x.device)
    prediction = denoiser.predict(x_t, t, condition=condition, sample_offset=sample_offset)
    p, q = (per_sample(table, index, x) for table in at_sigma.x0_from(denoiser.prediction_type))
    return prediction, p, q


def _device_of(sigma: float | Tensor) -> torch.device:
    return sigma.device if isinstance(sigma, Tensor) else torch.device("cpu")
