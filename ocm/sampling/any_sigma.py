"""Mean and covariance of x0 given x at any sigma, as other samplers and inverse problems need it.

k-diffusion and most inverse-problem code write x = x0 + sigma n (variance exploding). That is
x_t / alpha_t at the level of sigma = sigma_t / alpha_t, and x0 given x is x0 given x_t. On a
discrete schedule the backbone and the covariance are asked at the level nearest in log sigma, as
k-diffusion does with ``quantize=True``; the scaling of x and the mean use sigma itself::

    posterior = ocm.x0_given(denoiser, covariance, x, sigma)
    x0 = ocm.posterior_mean_given_measurement(
        posterior.mean, posterior.covariance, y, blur, noise_std=0.05
    )
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import PosteriorCovariance
from ocm.diffusion.checks import check_batch, check_range
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.predictions import coefficients
from ocm.diffusion.schedules import Schedule, full_precision, per_sample
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
    """Return sigma_t / alpha_t for t = 1 .. N, float64; infinite where there is no signal.

    Example:
        >>> import ocm
        >>> levels = sigmas(ocm.linear())
        >>> round(levels[0].item(), 3), round(levels[-1].item())
        (0.01, 157)
    """
    return schedule.sigmas_on_devices.at(torch.device("cpu"))[0].clone()


def timestep_at(schedule: Schedule, sigma: Tensor) -> Tensor:
    """Return the timestep of a sigma: of a discrete schedule that nearest in its logarithm.

    Args:
        schedule: The path.
        sigma: Of x = x0 + sigma n, any shape. Below sigma_1 a discrete schedule has timestep 1.

    Raises:
        ValueError: If a sigma is not positive, or above twice the largest, where the backbone
            knows nothing (not checked on a GPU, which would have to be waited for).

    Example:
        >>> import ocm
        >>> timestep_at(ocm.linear(), torch.tensor([0.001, 1.0, 150.0]))
        tensor([  1, 259, 995])
        >>> timestep_at(ocm.flow(), torch.tensor([1.0]))
        tensor([500.], dtype=torch.float64)
    """
    (levels,) = schedule.sigmas_on_devices.at(sigma.device)
    if sigma.device.type == "cpu" and not bool(((sigma > 0) & (sigma <= 2 * levels[-1])).all()):
        raise ValueError(
            f"sigma must lie in (0, {2 * levels[-1].item():.4g}], twice the largest of the "
            f"schedule, got {sigma.min().item():.4g} .. {sigma.max().item():.4g}"
        )
    if schedule.is_continuous:
        return schedule.timestep_of(-2.0 * sigma.double().log())
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
        TypeError: If x is no floating-point tensor, or the covariance states none.
        ValueError: If ``sigma`` is not positive or far above the schedule's, or is neither one
            number nor one for each sample; or ``x0_range`` is not in order.

    Example:
        >>> import torch, ocm
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",))
        >>> denoiser = ocm.Denoiser(unet, ocm.linear()).freeze()
        >>> covariance = ocm.Hutchinson(denoiser, num_probes=1)
        >>> posterior = ocm.x0_given(denoiser, covariance, torch.zeros(2, 3, 8, 8), 0.5)
        >>> posterior.mean.shape, posterior.covariance.diagonal().shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 3, 8, 8]))
    """
    check_covariance(covariance)
    check_range("x0_range", x0_range)
    prediction, p, q = _at_nearest(denoiser, x, sigma, condition, sample_offset)
    # First: the covariance may keep the graph of the evaluation.
    stated = covariance.at(prediction).bounded(x0_range)
    mean = _mean(prediction, p, q)
    return Posterior(mean if x0_range is None else mean.clamp(*x0_range), stated)


def mean_of_x0(
    denoiser: Denoiser, x: Tensor, sigma: float | Tensor, *, condition: Condition | None = None
) -> Tensor:
    """Return the mean of x0 given x = x0 + sigma n, not clipped; the arguments of `x0_given`."""
    prediction, p, q = _at_nearest(denoiser, x, sigma, condition, 0)
    return _mean(prediction, p, q)


def _mean(prediction: Prediction, p: Tensor, q: Tensor) -> Tensor:
    """Return p x_t + q output in the type of x_t, whatever p is."""
    x_t, output = full_precision(prediction.x_t), full_precision(prediction.output)
    return (p * x_t + q * output).to(prediction.x_t)


def _at_nearest(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float | Tensor,
    condition: Condition | None,
    sample_offset: int,
) -> tuple[Prediction, Tensor, Tensor]:
    """Return the prediction at alpha x of sigma's level, and p and q of its x0_hat."""
    check_batch("x", x)
    if not isinstance(sigma, (int, float, Tensor)):
        raise TypeError(f"sigma must be a number or a tensor, got {type(sigma).__name__}")
    device = getattr(sigma, "device", "cpu")
    levels = torch.as_tensor(sigma, dtype=torch.float64, device=device).reshape(-1)
    if len(levels) not in (1, len(x)):
        raise ValueError(
            f"sigma must be one number, or one for each of {len(x)} samples, got {len(levels)}"
        )
    schedule = denoiser.schedule
    t = timestep_at(schedule, levels)
    if schedule.is_continuous:
        alpha, sigma_t = schedule.alpha(t), schedule.sigma(t)
    else:  # at sigma itself, beside the level
        alpha = (1.0 + levels**2).rsqrt()
        sigma_t = levels * alpha
    p, q, _ = coefficients(denoiser.prediction_type, alpha, sigma_t, schedule.data_std)
    if len(levels) == 1:
        p, q, alpha = p[0].cpu(), q[0].cpu(), alpha[0].cpu()
    wide = full_precision(x)
    x_t = (per_sample(alpha, wide) * wide).to(x)
    timestep = t.item() if len(t) == 1 else t.to(x.device)
    prediction = denoiser.predict(x_t, timestep, condition=condition, sample_offset=sample_offset)
    return prediction, per_sample(p, wide), per_sample(q, wide)
