"""What other samplers and inverse problems need: mean and covariance of x0 given x at any sigma.

k-diffusion and most inverse-problem code write x = x0 + sigma n (variance exploding). That is
x_t / sqrt(alpha_bar_t) at the level with sigma^2 = beta_bar_t / alpha_bar_t, and x0 given x is x0
given x_t. The backbone and the covariance are asked at the level nearest in log sigma, as
k-diffusion does with ``quantize=True``; the scaling of x and the mean use sigma itself.

    posterior = ocm.x0_given(denoiser, covariance, x, sigma)
    x0 = ocm.posterior_mean_given_measurement(
        posterior.mean, posterior.covariance, y, blur, noise_std=0.05
    )
    images = k_diffusion.sampling.sample_heun(ocm.KDiffusionDenoiser(denoiser), x, sigmas)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from ocm.covariances.base import Covariance
from ocm.covariances.operators import PosteriorCovariance
from ocm.diffusion.denoiser import Denoiser, Prediction
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
    sample_offset: int = 0,
) -> Posterior:
    """Return mean and covariance of x0 given x = x0 + sigma n.

    Args:
        denoiser: The denoiser; guided if it is :meth:`ocm.Denoiser.conditioned`.
        covariance: Any covariance of it.
        x: Shape (B, ...).
        sigma: A number, or a tensor of shape (B,); covariances that take products with the
            Jacobian need one for all samples.
        x0_range: Where the mean is clipped to, and what bounds the covariance; None for data
            without bounds.
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
    prediction, mean = _prediction(denoiser, x, sigma, sample_offset)
    stated = covariance.at(prediction).bounded(x0_range)
    return Posterior(mean if x0_range is None else mean.clamp(*x0_range), stated)


def _prediction(
    denoiser: Denoiser, x: Tensor, sigma: float | Tensor, sample_offset: int = 0
) -> tuple[Prediction, Tensor]:
    """Return the prediction at x / sqrt(1 + sigma^2) of the nearest level, and sigma's mean."""
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
    prediction = denoiser.predict(x_t, t, sample_offset=sample_offset)
    p, q = at_sigma.x0_from(denoiser.prediction_type)
    mean = per_sample(p, index, x) * x_t + per_sample(q, index, x) * prediction.output
    return prediction, mean


def _device_of(sigma: float | Tensor) -> torch.device:
    return sigma.device if isinstance(sigma, Tensor) else torch.device("cpu")


@dataclass(frozen=True, eq=False)
class KDiffusionDenoiser:
    """A denoiser as k-diffusion's samplers call it: ``model(x, sigma)`` returns x0_hat.

    Attributes:
        denoiser: The denoiser; guided if it is :meth:`ocm.Denoiser.conditioned`.
        x0_range: Where x0_hat is clipped to; None as k-diffusion has it.
    """

    denoiser: Denoiser
    x0_range: tuple[float, float] | None = None

    @property
    def sigma_min(self) -> float:
        """The smallest sigma of the schedule."""
        return sigmas(self.denoiser.schedule)[0].item()

    @property
    def sigma_max(self) -> float:
        """The largest, with which sampling starts: x = sigma_max n."""
        return sigmas(self.denoiser.schedule)[-1].item()

    def get_sigmas(self, n: int) -> Tensor:
        """Return n decreasing sigmas, evenly spaced in t and interpolated in log sigma, and 0.

        Raises:
            TypeError: If n is no int.
            ValueError: If it is not positive.
        """
        check_positive_int("n", n)
        logs = sigmas(self.denoiser.schedule).log()
        places = torch.linspace(len(logs) - 1, 0, n, dtype=torch.float64)
        low, high = logs[places.floor().long()], logs[places.ceil().long()]
        interpolated = torch.lerp(low, high, places.frac()).exp()
        return torch.cat([interpolated, interpolated.new_zeros(1)]).to(self.denoiser.device).float()

    def __call__(self, x: Tensor, sigma: float | Tensor, **ignored: Any) -> Tensor:
        """Return x0_hat given x = x0 + sigma n, differentiable in x.

        Args:
            x: Shape (B, ...).
            sigma: A number, or a tensor of shape (B,).
            ignored: Must be empty: classes and guidance are the denoiser's own condition.

        Raises:
            TypeError: If there are further arguments.
            ValueError: As :func:`x0_given`.
        """
        if ignored:
            raise TypeError(
                f"extra_args must be empty, got {', '.join(ignored)}: use denoiser.conditioned(...)"
            )
        _, mean = _prediction(self.denoiser, x, sigma)
        return mean if self.x0_range is None else mean.clamp(*self.x0_range)


def posterior_mean_given_measurement(
    mean: Tensor,
    covariance: PosteriorCovariance,
    measurement: Tensor,
    operator: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor] | None = None,
    *,
    noise_std: float | Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Tensor:
    """Return E[x0 | x_t, y] for y = A x0 + noise_std n and x0 given x_t ~ N(x0_hat, C).

    x0_hat + C A^T u, (A C A^T + noise_std^2 I) u = y - A x0_hat, with u by conjugate gradients,
    so that any linear A and any covariance will do. The step of PiGDM (Song et al., 2023) and
    DiffPIR (Zhu et al., 2023) with C = r^2 I, and of TMPD (Boys et al., 2023) with the covariance
    of x0.

    Args:
        mean: x0_hat, shape (B, ...).
        covariance: C, positive semi-definite: ``bounded``, as :func:`x0_given` returns it.
        measurement: y, shape (B, ...).
        operator: A, from the shape of ``mean`` to that of ``measurement``.
        adjoint: A^T; None takes it by reverse-mode differentiation.
        noise_std: Standard deviation of the noise, a number or a tensor that broadcasts to y.
        tolerance: Norm of the residual of u, relative to that of y - A x0_hat, for each sample.
        max_iterations: Of conjugate gradients, each one A, one A^T and one product with C.

    Returns:
        Shape of ``mean``. A UserWarning says where ``max_iterations`` were not enough.

    Raises:
        ValueError: If A(0) is not 0, shapes do not fit, ``noise_std`` is negative, or C is not
            positive semi-definite.
        TypeError: If ``max_iterations`` is no int.

    Example:
        >>> from ocm.covariances.operators import diagonal
        >>> C = diagonal(torch.tensor([[1.0, 4.0]]), torch.Size([1, 2]))
        >>> y, ones = torch.tensor([[5.0]]), lambda x: x.sum(dim=1, keepdim=True)
        >>> posterior_mean_given_measurement(torch.zeros(1, 2), C, y, ones, noise_std=0.0)
        tensor([[1., 4.]])
    """
    check_positive_int("max_iterations", max_iterations)
    if not bool((torch.as_tensor(noise_std) >= 0).all()):
        raise ValueError(f"noise_std must be at least 0, got {noise_std}")
    residual = measurement - operator(mean)
    if residual.shape != measurement.shape or len(measurement) != len(mean):
        raise ValueError(
            f"measurement must have the shape of operator(mean), one for each of {len(mean)} "
            f"samples, got {tuple(measurement.shape)}"
        )
    nothing = torch.zeros_like(mean)
    transposed = _transposed(operator, nothing) if adjoint is None else adjoint
    at_zero = operator(nothing)
    if bool((at_zero != 0).any()):
        raise ValueError(
            "operator must be linear, and it maps 0 to values up to "
            f"{at_zero.abs().max().item():.3g}: take its offset off the measurement"
        )
    noise_variance = noise_std**2

    def spread(u: Tensor) -> Tensor:
        return covariance.multiply(transposed(u))

    u = _conjugate_gradients(
        lambda u: operator(spread(u)) + noise_variance * u, residual, tolerance, max_iterations
    )
    return mean + spread(u)


def _transposed(operator: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """Return A^T of a linear operator."""
    pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(operator, at)[1]
    return lambda u: pull(u)[0]


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Return u of ``multiply(u)`` = b for each sample of a batch."""

    def dot(v: Tensor, w: Tensor) -> Tensor:
        return (v * w).flatten(1).sum(dim=1).reshape(-1, *[1] * (b.dim() - 1))

    u, r, p = torch.zeros_like(b), b, b
    squared = dot(r, r)
    enough = tolerance**2 * squared
    for _ in range(max_iterations):
        searching = squared > enough
        if not bool(searching.any()):
            return u
        product = multiply(p)
        curvature = dot(p, product)
        if bool((searching & (curvature <= 0)).any()):
            raise ValueError(
                "covariance must be positive semi-definite, and A C A^T + noise_std^2 I positive: "
                f"it takes a value of {curvature.min().item():.3g}. Use covariance.bounded(...), "
                "and a noise_std above 0 where measurements repeat each other"
            )
        # Samples that are done stay where they are.
        step = torch.where(searching, squared / curvature, 0.0)
        u = u + step * p
        r = r - step * product
        previous, squared = squared, torch.where(searching, dot(r, r), squared)
        p = torch.where(searching, r + squared / previous * p, p)
    if bool((squared > enough).any()):
        reached = (squared / dot(b, b)).max().sqrt().item()
        warnings.warn(
            f"conjugate gradients reached a relative residual of {reached:.2g} in {max_iterations} "
            f"iterations, not {tolerance:.2g}: raise max_iterations, or noise_std",
            UserWarning,
            stacklevel=3,
        )
    return u
