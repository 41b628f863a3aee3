"""DDPM, DDIM and all between, at any timesteps and with any covariance of x0 given x_t.

Integrating q(x_s | x_t, x_0) over N(x0_hat, Cov[x0 | x_t]) gives all samplers the same form::

    mean       = a x_t + b x0_hat
    covariance = lambda^2 I + b^2 Cov[x0 | x_t],

with lambda^2 the variance and b the weight of x_0 in their q(x_s | x_t, x_0). On any path
x_t = alpha_t x0 + sigma_t n, every lambda in [0, sigma_s] keeps the moments of x_s given x_0 by
a = sqrt(sigma_s^2 - lambda^2) / sigma_t and b = alpha_s - a alpha_t. With a diagonal covariance
the step is one :func:`hessdiag.kernels.gaussian_step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hessdiag.kernels import StepCoefficients, gaussian_step, normal, seed_tensor
from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import (
    PIXELS,
    PosteriorCovariance,
    SpectralCovariance,
    variance_bound,
)
from ocm.diffusion import draws
from ocm.diffusion.checks import check_range
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import Schedule
from ocm.diffusion.timesteps import reverse_steps, timesteps_of
from ocm.progress import tracked
from ocm.sampling.finite import all_finite, check_step


class ReverseStep(NamedTuple):
    """x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Cov[x0 | x_t]).

    Attributes:
        mean_from_x_t: The factor a.
        mean_from_x0: The factor b.
        noise_variance: lambda^2.
    """

    mean_from_x_t: float
    mean_from_x0: float
    noise_variance: float


Sampler = Callable[[Schedule, float, float], ReverseStep]
"""From (schedule, s, t), s < t, to the step from t to s."""


@runtime_checkable
class Multistep(Protocol):
    """A sampler whose steps look at those before (:class:`ocm.SecondOrder`)."""

    def start(self) -> Callable[..., Tensor]:
        """Return what takes the steps of a run in order: :func:`reverse_step` but for ``step``."""
        ...


# Where images lie.
X0_RANGE = (-1.0, 1.0)


def ddpm(schedule: Schedule, s: float, t: float) -> ReverseStep:
    """Return the DDPM step from t to s (Ho, Jain and Abbeel, 2020), on any path.

    a = alpha_t sigma_s^2 / (alpha_s sigma_t^2),    b = alpha_s (1 - SNR_t / SNR_s),
    lambda^2 = beta_tilde(s, t): the moments of q(x_s | x_t, x_0).

    Args:
        schedule: The path.
        s: Where the step ends, in [0, t); x_0 at 0.
        t: Where it starts, at most N.

    Returns:
        a, b and lambda^2 of x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Cov[x0 | x_t]).

    Raises:
        ValueError: Unless 0 <= s < t <= N.

    Example:
        >>> import ocm
        >>> ocm.ddpm(ocm.linear(), 0, 500).mean_from_x0    # the last step returns x0_hat
        1.0
    """
    lost = schedule.lost(s, t)  # raises unless s < t
    (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = schedule.level(s), schedule.level(t)
    # By the ratio: next to the data the squares alone underflow.
    a = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    return ReverseStep(a, alpha_s * lost, lost * sigma_s**2)


def ddim(schedule: Schedule, s: float, t: float, *, eta: float = 0.0) -> ReverseStep:
    """Return the DDIM step from t to s (Song, Meng and Ermon, 2021), on any path.

    a = sqrt(sigma_s^2 - lambda^2) / sigma_t,    b = alpha_s - a alpha_t,
    lambda^2 = eta^2 beta_tilde(s, t).

    eta = 0 is the step of the probability-flow ODE: Euler's for flow matching. eta = 1 is DDPM's.
    Where x0_hat is clipped, the noise is that of the clipped one, as diffusers has it with
    ``use_clipped_model_output``.

    Args:
        schedule: The path.
        s: Where the step ends, in [0, t); x_0 at 0.
        t: Where it starts, at most N.
        eta: In [0, 1]; ``functools.partial(ocm.ddim, eta=0.5)`` is a sampler.

    Returns:
        As :func:`ddpm`.

    Raises:
        ValueError: Unless 0 <= s < t <= N and eta lies in [0, 1].

    Example:
        >>> import ocm
        >>> ocm.ddim(ocm.linear(), 100, 500).noise_variance
        0.0
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    return _keeping_marginals(schedule, s, t, eta**2 * schedule.beta_tilde(s, t))


def renoised(schedule: Schedule, s: float, t: float, *, noise: float = 1.0) -> ReverseStep:
    """Return the step from t to s with lambda = noise sigma_s: any share of the noise is new.

    noise = 0 is the step of the ODE, :func:`ddim`'s. noise = 1 forgets x_t but for x0_hat, as
    ``stochastic_sampling`` of diffusers' flow matching and consistency models do. On a flow the
    DDPM step lies between them.

    Args:
        schedule: The path.
        s: Where the step ends, in [0, t); x_0 at 0.
        t: Where it starts, at most N.
        noise: In [0, 1].

    Returns:
        As :func:`ddpm`.

    Raises:
        ValueError: Unless 0 <= s < t <= N and noise lies in [0, 1].

    Example:
        >>> import ocm
        >>> ocm.renoised(ocm.flow(), 400, 800)
        ReverseStep(mean_from_x_t=0.0, mean_from_x0=0.6, noise_variance=0.16000000000000003)
    """
    if not 0.0 <= noise <= 1.0:
        raise ValueError(f"noise must lie in [0, 1], got {noise}")
    schedule.beta_tilde(s, t)  # raises unless s < t
    return _keeping_marginals(schedule, s, t, (noise * schedule.level(s).sigma) ** 2)


def _keeping_marginals(
    schedule: Schedule, s: float, t: float, noise_variance: float
) -> ReverseStep:
    """Return the step of this lambda^2 whose x_s, given x_0, has its own mean and variance."""
    (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = schedule.level(s), schedule.level(t)
    a = math.sqrt(max(sigma_s**2 - noise_variance, 0.0)) / sigma_t
    return ReverseStep(a, alpha_s - a * alpha_t, noise_variance)


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
    steps: int | Sequence[float],
    *,
    sampler: Sampler | Multistep = ddpm,
    condition: Condition | None = None,
    seed: int | Tensor = 0,
    sample_offset: int = 0,
    x0_range: tuple[float, float] | None = X0_RANGE,
    max_last_noise: float | None = None,
    noise_at_end: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """Draw samples with one evaluation of the backbone a step, and what the covariance costs.

    Each step draws x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Cov[x0 | x_t]), with the sampler's a,
    b and lambda^2. The noise follows the random-number contract: sample i is the same in any batch
    and on any number of processes. x0_hat is clipped to ``x0_range`` and Cov[x0 | x_t] to what it
    allows. The last step, to s = 0, returns x0_hat unless noise is asked for.

    Args:
        denoiser: The frozen denoiser.
        covariance: States Cov[x0 | x_t].
        shape: (B, ...).
        steps: Number K of evenly spaced timesteps, or increasing timesteps in (0, N]
            (:mod:`ocm.diffusion.timesteps`). Sampling starts from noise at the last of them.
        sampler: The step from t to s, :func:`ddpm`, :func:`ddim` or :func:`renoised`
            (``functools.partial(ddim, eta=0.5)``); or :class:`ocm.SecondOrder`.
        condition: Class labels of the samples, and guidance (:meth:`ocm.Denoiser.condition`).
        seed: Seed of the noise: an integer, or an int64 tensor with one element. With a tensor on
            the GPU the whole loop can be captured in a CUDA graph and replayed with a new seed
            written into it (:func:`capture`).
        sample_offset: Number of the first sample.
        x0_range: Where the data lie; None for data without bounds, latents say.
        max_last_noise: Largest standard deviation of the last noisy step (see
            :func:`ocm.sampling.samplers.last_step_noise`); None for no bound.
        noise_at_end: Whether x_0 is drawn from N(x0_hat, Cov[x0 | x_t]) rather than its mean:
            samples then have the variance of the data from few steps too, where a diagonal
            covariance is white noise on each of them.
        dtype: Type of the samples between steps and at the end.
        progress: Whether to show a progress bar.

    Returns:
        x_0, shape ``shape``.

    Raises:
        TypeError: If the covariance states none, or ``dtype`` is of integers.
        ValueError: If there are more steps than N, or the timesteps do not increase from above 0
            to at most N; or a bound is negative, NaN or not in order.
        FloatingPointError: If samples are not finite, naming t and whether it is the backbone or
            the covariance that is not. A GPU is waited for once, at the end.

    Example:
        >>> import ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = ocm.sample(denoiser, ocm.Beta(denoiser), (64, 1, 4, 4), steps=3, x0_range=None)
        >>> x0.shape, abs(x0.std().item() - 1) < 0.1
        (torch.Size([64, 1, 4, 4]), True)
    """
    check_options(denoiser, covariance, sampler, x0_range, dtype)
    if max_last_noise is not None and not max_last_noise >= 0.0:
        raise ValueError(f"max_last_noise must be at least 0, got {max_last_noise}")
    timesteps = timesteps_of(denoiser.schedule, steps)
    seed = seed_tensor(seed, denoiser.device)

    def run(watched: bool) -> Tensor:
        x = starting_noise(denoiser, shape, timesteps[-1], seed, sample_offset).to(dtype)
        take = sampler.start() if isinstance(sampler, Multistep) else partial(_step_of, sampler)
        for s, t in tracked(reverse_steps(timesteps), "sampling", shown=progress):
            prediction = denoiser.predict(
                x, t, s=s, condition=condition, sample_offset=sample_offset
            )
            stated = covariance.at(prediction) if s > 0 or noise_at_end else None
            x = take(
                prediction,
                stated,
                seed=seed,
                x0_range=x0_range,
                max_noise_std=max_last_noise if s == timesteps[0] else None,
            )
            if watched:
                check_step(x, prediction, covariance, stated)
        return x

    x = run(watched=False)
    # One look at the end, since no step heals NaN; the same run again then says where it began.
    if not all_finite(x):
        run(watched=True)
        raise FloatingPointError(
            "samples must be finite, got NaN or infinite ones that the same seed did not give "
            "again: is the backbone in training mode?"
        )
    return x


def check_options(
    denoiser: Denoiser,
    covariance: Covariance,
    sampler: Sampler | Multistep,
    x0_range: tuple[float, float] | None,
    dtype: torch.dtype,
) -> None:
    """Raise unless these are arguments of a sampling loop.

    Raises:
        TypeError: If one is of another kind, or ``dtype`` is of integers.
        ValueError: If the range is not in order.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser must be an ocm.Denoiser, got {type(denoiser).__name__}")
    if isinstance(sampler, type) or not (callable(sampler) or isinstance(sampler, Multistep)):
        raise TypeError(
            f"sampler must be ocm.ddpm, ocm.ddim or another of its kind, got {sampler!r}"
        )
    check_covariance(covariance)
    check_range("x0_range", x0_range)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type of torch, got {dtype}")


def check_reverse_step(step: object) -> None:
    """Raise unless ``step`` is one, of finite numbers and a variance that is not negative.

    Raises:
        TypeError: If it is no tuple of three.
        ValueError: If a number is not finite, or the variance negative.

    Example:
        >>> check_reverse_step(ReverseStep(0.5, 0.5, -1.0))
        Traceback (most recent call last):
        ...
        ValueError: sampler must return finite a, b and lambda^2 >= 0, got 0.5, 0.5, -1.0
    """
    if not isinstance(step, tuple) or len(step) != 3:
        raise TypeError(f"sampler must return an ocm.sampling.samplers.ReverseStep, got {step!r}")
    a, b, noise_variance = step
    if not (math.isfinite(a) and math.isfinite(b) and 0.0 <= noise_variance < math.inf):
        raise ValueError(
            f"sampler must return finite a, b and lambda^2 >= 0, got {a}, {b}, {noise_variance}"
        )


def _step_of(
    sampler: Sampler, prediction: Prediction, covariance: PosteriorCovariance | None, **options: Any
) -> Tensor:
    """Return x_s by a sampler that looks at x_t alone."""
    assert prediction.s is not None  # the step is known
    step = sampler(prediction.denoiser.schedule, prediction.s, prediction.timestep)
    return reverse_step(prediction, covariance, step, **options)


def starting_noise(
    denoiser: Denoiser, shape: Sequence[int], t: float, seed: int | Tensor, sample_offset: int
) -> Tensor:
    """Return noise of the standard deviation that x_t has for data of variance 1."""
    schedule, device = denoiser.schedule, denoiser.device
    z = normal(shape, seed, step=draws.START, sample_offset=sample_offset, device=device)
    return z * math.hypot(*schedule.level(t)[:2])


def reverse_step(
    prediction: Prediction,
    covariance: PosteriorCovariance | None,
    step: ReverseStep,
    *,
    seed: int | Tensor,
    x0_range: tuple[float, float] | None = X0_RANGE,
    max_noise_std: float | None = None,
) -> Tensor:
    """Return x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Cov[x0 | x_t]).

    Args:
        prediction: The prediction at (x_t, t).
        covariance: Cov[x0 | x_t], or None for a step without noise.
        step: That of a sampler.
        seed: Seed of the noise, of which this is draw ``ocm.diffusion.draws.of_level(t)``.
        x0_range: Where x0_hat is clipped to, and what bounds the covariance; None for no bounds.
        max_noise_std: Largest standard deviation of the noise, in any direction; None for no bound.

    Raises:
        TypeError: If the step is none.
        ValueError: If it is not finite.
    """
    check_reverse_step(step)
    x_t, offset = prediction.x_t, prediction.sample_offset
    draw = draws.of_level(prediction.timestep)
    a, b, noise_variance = step
    p, q, _ = prediction.denoiser.numbers(prediction.timestep)
    coefficients = StepCoefficients(p, q, a, b, noise_variance, b**2)
    if isinstance(covariance, SpectralCovariance) and covariance.basis is PIXELS:
        bound = variance_bound(x0_range)
        return gaussian_step(
            x_t,
            prediction.output,
            covariance.eigenvalues,
            coefficients,
            seed=seed,
            step=draw,
            sample_offset=offset,
            x0_range=x0_range,
            variance_range=(0.0, bound),
            max_noise_std=max_noise_std,
        )
    without_noise = coefficients._replace(noise_variance=0.0, noise_from_variance=0.0)
    mean = gaussian_step(
        x_t, prediction.output, 0.0, without_noise, seed=seed, step=draw, x0_range=x0_range
    )
    if covariance is None:
        return mean
    reverse = covariance.bounded(x0_range).affine(b**2, noise_variance)
    if max_noise_std is not None:
        reverse = reverse.clamped(0.0, max_noise_std**2)
    z = normal(x_t.shape, seed, step=draw, sample_offset=offset, device=x_t.device)
    return mean + reverse.noise(z.to(x_t)).to(x_t)


def capture(
    denoiser: Denoiser,
    covariance: Covariance,
    shape: Sequence[int],
    steps: int | Sequence[float],
    **options: Any,
) -> Callable[[int], Tensor]:
    """Capture the whole sampling loop in a CUDA graph, and return seed -> samples.

    Each call replays the graph, without the launches of a single kernel from Python. It works for
    covariances that read no value back to the host: the fixed, analytic and learned ones.

    Args:
        denoiser: The frozen denoiser, on a CUDA device.
        covariance: As in :func:`sample`.
        shape: As in :func:`sample`.
        steps: As in :func:`sample`.
        options: The other arguments of :func:`sample` but seed and progress.

    Returns:
        From a seed to samples of ``shape``, those that :func:`sample` draws with it.

    Raises:
        ValueError: If the denoiser is not on a CUDA device.
        FloatingPointError: In a replay, as :func:`sample`.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> unet = small_unet((1, 8, 8), width=8)
        >>> if torch.cuda.is_available():
        ...     denoiser = ocm.Denoiser(unet.cuda(), ocm.linear()).freeze()
        ...     draw = ocm.capture(denoiser, ocm.Beta(denoiser), (16, 1, 8, 8), steps=10)
        ...     assert draw(1).shape == draw(2).shape == (16, 1, 8, 8)
    """
    if denoiser.device.type != "cuda":
        raise ValueError(f"denoiser must be on a CUDA device, got {denoiser.device}")
    device = denoiser.device
    seed = torch.zeros((), dtype=torch.int64, device=device)

    def draw() -> Tensor:
        return sample(denoiser, covariance, shape, steps, seed=seed, **options)

    # Streams are of the current device; that of torch.cuda.graph would be of the first one used.
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels, which a capture must not
            draw()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            images = draw()

    def replay(value: int) -> Tensor:
        with torch.cuda.device(device):
            seed.copy_(seed_tensor(value, device))
            graph.replay()
            replayed = images.clone()
        if not all_finite(replayed):
            draw()  # raises, and says where
        return replayed

    return replay
