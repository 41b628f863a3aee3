"""DDPM and DDIM with any subset of timesteps and any covariance of x0 given x_t.

Every step is one :func:`hessdiag.kernels.gaussian_step`. Integrating q(x_s | x_t, x_0) over
N(x0_hat, Cov[x0 | x_t]) gives both samplers the same form,

    mean    = a x_t + b x0_hat
    sigma^2 = lambda^2 + b^2 Var[x0 | x_t],

with lambda^2 the variance and b the weight of x_0 in their q(x_s | x_t, x_0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hessdiag.kernels import StepCoefficients, gaussian_step, normal
from hessdiag.kernels.philox import seed_tensor
from ocm.covariances import Covariance
from ocm.denoiser import Denoiser
from ocm.progress import progress_bar
from ocm.schedules import Schedule, reverse_steps

Sampler = Callable[[Schedule, int, int], StepCoefficients]

# Data lie in [-1, 1], where no variance exceeds 1.
X0_RANGE = (-1.0, 1.0)
VARIANCE_RANGE = (0.0, 1.0)


def ddpm(schedule: Schedule, s: int, t: int) -> StepCoefficients:
    """Return the coefficients of a DDPM step from t to s (Ho, Jain and Abbeel, 2020).

    mean = sqrt(alpha_bar_s) beta(s, t) / beta_bar_t x0_hat
           + sqrt(alpha(s, t)) beta_bar_s / beta_bar_t x_t,    lambda^2 = beta_tilde(s, t).

    Raises:
        ValueError: Unless 0 <= s < t <= N.

    Example:
        >>> from ocm.schedules import linear
        >>> ddpm(linear(), 0, 500).mean_from_x0    # the last step returns x0_hat
        1.0
    """
    beta, beta_tilde = schedule.beta(s, t), schedule.beta_tilde(s, t)
    alpha_bar_s = schedule.alpha_bar[s].item()
    beta_bar_s, beta_bar_t = schedule.beta_bar[[s, t]].tolist()
    a = math.sqrt(schedule.alpha(s, t)) * beta_bar_s / beta_bar_t
    b = math.sqrt(alpha_bar_s) * beta / beta_bar_t
    return StepCoefficients(*schedule.x0_from_epsilon(t), a, b, beta_tilde, b**2)


def ddim(schedule: Schedule, s: int, t: int, *, eta: float = 0.0) -> StepCoefficients:
    """Return the coefficients of a DDIM step from t to s (Song, Meng and Ermon, 2021).

    mean = sqrt(alpha_bar_s) x0_hat + sqrt(beta_bar_s - lambda^2) epsilon,
    lambda^2 = eta^2 beta_tilde(s, t), with epsilon = (x_t - sqrt(alpha_bar_t) x0_hat) /
    sqrt(beta_bar_t). With eta = 1 this is the DDPM step.

    Raises:
        ValueError: Unless 0 <= s < t <= N and eta lies in [0, 1].

    Example:
        >>> from ocm.schedules import linear
        >>> ddim(linear(), 100, 500).noise_variance
        0.0
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    noise_variance = eta**2 * schedule.beta_tilde(s, t)
    alpha_bar_s, alpha_bar_t = schedule.alpha_bar[[s, t]].tolist()
    beta_bar_s, beta_bar_t = schedule.beta_bar[[s, t]].tolist()
    a = math.sqrt((beta_bar_s - noise_variance) / beta_bar_t)
    b = math.sqrt(alpha_bar_s) - a * math.sqrt(alpha_bar_t)
    return StepCoefficients(*schedule.x0_from_epsilon(t), a, b, noise_variance, b**2)


def last_step_noise(levels: float) -> float:
    """Return the largest standard deviation of the last noisy step, ``levels * 2/255 sqrt(pi/2)``.

    A Gaussian with it moves a pixel of [-1, 1] by ``levels`` of its 256 grey levels on average
    (Analytic-DPM, Bao et al., 2022, uses 1 or 2).

    Example:
        >>> round(last_step_noise(2), 5)
        0.01966
    """
    if not levels >= 0:
        raise ValueError(f"levels must be at least 0, got {levels}")
    return levels * 2.0 / 255.0 * math.sqrt(math.pi / 2.0)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    covariance: Covariance,
    shape: Sequence[int],
    timesteps: Sequence[int],
    *,
    sampler: Sampler = ddpm,
    seed: int | Tensor = 0,
    sample_offset: int = 0,
    max_last_noise: float | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples with one backbone pass a step, and what the covariance costs.

    The noise follows the random-number contract: sample i is the same in any batch. x0_hat is
    clipped to [-1, 1] and Var[x0 | x_t] to [0, 1]; the last step, to s = 0, adds no noise.

    Args:
        denoiser: The frozen denoiser.
        covariance: States Var[x0 | x_t].
        shape: (B, C, H, W).
        timesteps: Increasing timesteps in 1 .. N, the last of them N.
        sampler: Coefficients of the step from t to s, :func:`ddpm` or :func:`ddim`
            (``functools.partial(ddim, eta=0.5)``).
        seed: Seed of the noise: an integer, or an int64 tensor with one element. With a tensor on
            the GPU the whole loop can be captured in a CUDA graph and replayed with a new seed
            written into it, for a covariance that needs no check of values (not Hutchinson).
        sample_offset: Number of the first sample.
        max_last_noise: Largest standard deviation of the last noisy step (see
            :func:`last_step_noise`); None for no bound.
        progress: Whether to show a progress bar.

    Returns:
        x_0, shape ``shape``, float32, in [-1, 1].

    Raises:
        ValueError: If the timesteps do not increase to N from at least 1.
    """
    schedule, device = denoiser.schedule, denoiser.device
    steps = reverse_steps(timesteps)
    if timesteps[-1] != schedule.num_timesteps:
        raise ValueError(f"timesteps must end at N = {schedule.num_timesteps}, got {timesteps[-1]}")
    seed = seed_tensor(seed, device)
    x = normal(shape, seed, sample_offset=sample_offset, device=device)
    for s, t in progress_bar(steps, "sampling", unit="step", show=progress):
        prediction = denoiser.predict(x, t)
        variance: Tensor | float = 0.0
        coefficients = sampler(schedule, s, t)
        if s > 0:
            variance = covariance.variance(x, t, prediction, sample_offset=sample_offset)
        else:
            coefficients = coefficients._replace(noise_variance=0.0)
        x = gaussian_step(
            x,
            prediction.epsilon,
            variance,
            coefficients,
            seed=seed,
            step=t,
            sample_offset=sample_offset,
            x0_range=X0_RANGE,
            variance_range=VARIANCE_RANGE,
            max_noise_std=max_last_noise if s == timesteps[0] else None,
        )
    return x
