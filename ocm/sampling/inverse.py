"""x0 given x_t and a linear measurement of it, by any covariance, and samplers made of it.

With y = A x0 + noise_std n, r = y - A x0_hat and x0 given x_t of covariance C, every method has::

    E[x0 | x_t, y] = x0_hat + C A^T u,

and they differ by C and by the u that weighs r:

=================================  =========  ==================================================
method                             C          u
=================================  =========  ==================================================
MMPS (Rozet et al., 2024)          products   (A C A^T + noise_std^2 I)^-1 r
TMPD (Boys et al., 2023)           products   r / (row sums of A C A^T + noise_std^2)
PiGDM (Song et al., 2023)          products   as MMPS, with beta_bar I for C in the inverse
DiffPIR (Zhu et al., 2023)         r^2 I      (A C A^T + noise_std^2 I)^-1 r
DPS (Chung et al., 2023)           products   r / ‖r‖ times a length that is chosen by hand
=================================  =========  ==================================================

"Products" are those with the Jacobian of the network, of :class:`ocm.Lanczos` or :class:`ocm.Full`:
for (alpha / sigma^2) C A^T u is the gradient of u^T A x0_hat for x_t, which the papers write. So
DPS goes the way of the first of MMPS's conjugate gradients, which knows its length. Where C is
diagonal in both places nothing but A is left to solve for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hessdiag.kernels import normal, seed_tensor
from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import PosteriorCovariance
from ocm.diffusion import draws
from ocm.diffusion.checks import check_batch, check_number, check_positive_int
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.timesteps import reverse_steps, timesteps_of
from ocm.sampling.finite import all_finite, check_stated, check_step
from ocm.sampling.samplers import (
    X0_RANGE,
    Sampler,
    check_options,
    check_reverse_step,
    ddpm,
    starting_noise,
)


def posterior_mean_given_measurement(
    mean: Tensor,
    covariance: PosteriorCovariance,
    measurement: Tensor,
    operator: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor] | None = None,
    *,
    noise_std: float | Tensor,
    weighting: PosteriorCovariance | Literal["row_sums"] | float | None = None,
    tolerance: float | None = 1e-4,
    max_iterations: int = 200,
) -> Tensor:
    """Return E[x0 | x_t, y] for y = A x0 + noise_std n and x0 given x_t ~ N(x0_hat, C).

    x0_hat + C A^T u, (A C A^T + noise_std^2 I) u = y - A x0_hat, with u by conjugate gradients,
    so that any linear A and any covariance will do. The table above says whose step it is.

    A draw takes no more than the mean: the same function of a draw of x0 given x_t in the place of
    x0_hat, and of y with new noise, has mean E[x0 | x_t, y] and covariance Cov[x0 | x_t, y]
    (:func:`sample_given_measurement` does so).

    Args:
        mean: x0_hat, shape (B, ...).
        covariance: C, positive semi-definite: ``bounded``, as :func:`x0_given` returns it.
        measurement: y, shape (B, ...).
        operator: A, from the shape of ``mean`` to that of ``measurement``.
        adjoint: A^T; None takes it by reverse-mode differentiation.
        noise_std: Standard deviation of the noise, a number or a tensor that broadcasts to y.
        weighting: What weighs r: None for C; "row_sums" for TMPD, which stands for an A C A^T
            without negative entries: sums below 0 count by their size; a number z for DPS, of
            u = z r / ‖r‖; or a covariance that takes the place of C in the equation of u, as in
            PiGDM. One with smaller eigenvalues than C, such as its diagonal, overshoots.
        tolerance: Norm of the residual of u, relative to that of y - A x0_hat, for each sample.
            None takes ``max_iterations`` as they are: where C is a network's that errs, one or two
            are better than the solution, which amplifies its errors.
        max_iterations: Of conjugate gradients, each one A, one A^T and one product with C.

    Returns:
        Shape of ``mean``.

    Warns:
        UserWarning: Where ``max_iterations`` were not enough for ``tolerance``.

    Raises:
        ValueError: If A(0) is not 0, the adjoint is not that of A, shapes do not fit, the
            measurement is not finite, ``noise_std`` or a number as ``weighting`` is negative, C is
            not positive semi-definite, ``weighting`` is another name, or ``tolerance`` is not in
            [0, 1).
        TypeError: If ``max_iterations`` is no int, or an argument is no tensor of floating point.
        FloatingPointError: If the result is not finite.

    Example:
        >>> import torch, ocm
        >>> from ocm.covariances.operators import diagonal
        >>> C = diagonal(torch.tensor([[1.0, 4.0]]), torch.Size([1, 2]))
        >>> y, ones = torch.tensor([[5.0]]), lambda x: x.sum(dim=1, keepdim=True)
        >>> ocm.posterior_mean_given_measurement(torch.zeros(1, 2), C, y, ones, noise_std=0.0)
        tensor([[1., 4.]])
    """
    check_positive_int("max_iterations", max_iterations)
    if tolerance is not None:
        check_number("tolerance", tolerance)
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
    _check_noise(noise_std, measurement)
    _check_weighting(weighting)
    if not callable(getattr(covariance, "multiply", None)):
        raise TypeError(
            "covariance must be one of a posterior, as Posterior.covariance, got "
            f"{type(covariance).__name__}"
        )
    check_batch("mean", mean)
    measured = operator(mean)
    if not isinstance(measured, Tensor):
        raise TypeError(f"operator must return a tensor, got {type(measured).__name__}")
    if measured.shape != measurement.shape or measured.shape[:1] != mean.shape[:1]:
        raise ValueError(
            f"measurement must have the shape of operator(mean), one for each of {len(mean)} "
            f"samples, got {tuple(measurement.shape)} for {tuple(measured.shape)}"
        )
    residual = measurement - measured
    if not bool(torch.isfinite(residual).all()):
        raise ValueError(
            "measurement and operator(mean) must be finite, got NaN or infinity in "
            f"{int((~torch.isfinite(residual)).sum())} of {residual.numel()} differences"
        )
    nothing = torch.zeros_like(mean)
    transposed = _transposed(operator, nothing) if adjoint is None else adjoint
    at_zero = operator(nothing)
    if bool((at_zero != 0).any()):
        raise ValueError(
            "operator must be linear, and it maps 0 to values up to "
            f"{at_zero.abs().max().item():.3g}: take its offset off the measurement"
        )
    _check_adjoint(mean, measured, residual, transposed(residual))
    noise_variance = noise_std**2
    if isinstance(weighting, (int, float)):
        u = weighting * residual * _dot(residual, residual).clamp(min=1e-30).rsqrt()
    elif isinstance(weighting, str):
        sums = operator(covariance.multiply(transposed(torch.ones_like(residual))))
        weights = sums.abs() + noise_variance
        u = torch.where(weights == 0, 0.0, residual / weights)  # a row of zeros measures nothing
    else:
        inner = covariance if weighting is None else weighting
        u = _conjugate_gradients(
            lambda u: operator(inner.multiply(transposed(u))) + noise_variance * u,
            residual,
            tolerance,
            max_iterations,
        )
    result = mean + covariance.multiply(transposed(u))
    if not all_finite(result):
        raise FloatingPointError(
            "E[x0 | x_t, y] must be finite, got NaN or infinity, of a mean, a covariance or a "
            "measurement that is not finite itself"
        )
    return result


@torch.no_grad()
def sample_given_measurement(
    denoiser: Denoiser,
    covariance: Covariance,
    measurement: Tensor,
    operator: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor] | None = None,
    *,
    noise_std: float | Tensor,
    shape: Sequence[int],
    steps: int | Sequence[float],
    weighting: Covariance | Literal["row_sums"] | float | None = None,
    draw_x0: bool = True,
    sampler: Sampler = ddpm,
    condition: Condition | None = None,
    seed: int | Tensor = 0,
    sample_offset: int = 0,
    x0_range: tuple[float, float] | None = X0_RANGE,
    tolerance: float | None = 1e-4,
    max_iterations: int = 200,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw samples of x0 given y = A x0 + noise_std n, from any denoiser and covariance.

    :func:`ocm.sample` with E[x0 | x_t, y] and Cov[x0 | x_t, y] in the place of x0_hat and C::

        x_s ~ N(a x_t + b E[x0 | x_t, y], lambda^2 I + b^2 Cov[x0 | x_t, y]),

    which is q(x_s | x_t, y) for Gaussian data, in any number of steps. Of the papers' methods the
    covariance of the step is lambda^2 I; ``draw_x0=False`` is that. Their samples spread less than
    the truth is uncertain, the more so the fewer the steps.

    Args:
        denoiser: The frozen denoiser.
        covariance: States C. :class:`ocm.Lanczos` takes k products wherever C is applied, which is
            ``max_iterations`` + 1 times a step, and once more for a draw.
        measurement: y, shape (B, ...); repeated for several draws of x0 given the same.
        operator: A, from ``shape`` to that of ``measurement``.
        adjoint: A^T; None takes it by reverse-mode differentiation.
        noise_std: Standard deviation of the noise, a number or a tensor that broadcasts to y.
        shape: (B, ...).
        steps: As in :func:`ocm.sample`.
        weighting: What weighs the misfit: None for C; "row_sums" for TMPD; a number for DPS, the
            length of its steps in x_s; or a covariance, :class:`ocm.Beta` for PiGDM.
        draw_x0: Whether x0 is drawn from its distribution given x_t and y, at the last step too,
            or is the mean.
        sampler: As in :func:`ocm.sample`.
        condition: As in :func:`ocm.sample`.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        x0_range: Where x0_hat is clipped to, and what bounds C; None for data without bounds.
        tolerance: As in :func:`posterior_mean_given_measurement`; None for a network that errs.
        max_iterations: As in :func:`posterior_mean_given_measurement`.
        dtype: Type of the samples.

    Returns:
        x_0, shape ``shape``.

    Raises:
        ValueError: As :func:`ocm.sample` and :func:`posterior_mean_given_measurement`; or for draws
            by DPS, whose steps have no covariance.
        FloatingPointError: If what the backbone or a covariance says at a timestep is not finite.

    Warns:
        UserWarning: Where ``max_iterations`` were not enough for ``tolerance``.

    Example:
        Images of standard normal pixels, given that the mean of all pixels is 1:

        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> samples = ocm.sample_given_measurement(
        ...     denoiser, ocm.Beta(denoiser), torch.ones(8, 1, 1, 1),
        ...     lambda x: x.mean(dim=(2, 3), keepdim=True),
        ...     noise_std=0.0, shape=(8, 1, 4, 4), steps=3, x0_range=None)
        >>> bool((samples.mean(dim=(2, 3)) - 1).abs().max() < 1e-3), samples.std().item() > 0.8
        (True, True)
    """
    if isinstance(weighting, (int, float)) and draw_x0:
        raise ValueError(
            f"draw_x0 must be False for steps of a length, got weighting = {weighting}: no "
            "covariance of x0 given x_t and y belongs to them"
        )
    check_options(denoiser, covariance, sampler, x0_range, dtype)
    _check_noise(noise_std, measurement)
    if weighting is None or isinstance(weighting, (str, int, float)):
        _check_weighting(weighting)
    else:
        check_covariance(weighting)
    schedule, timesteps = denoiser.schedule, timesteps_of(denoiser.schedule, steps)
    seed = seed_tensor(seed, denoiser.device)
    x = starting_noise(denoiser, shape, timesteps[-1], seed, sample_offset).to(dtype)

    def z(like: Tensor, draw: int) -> Tensor:
        return normal(
            like.shape, seed, step=draw, sample_offset=sample_offset, device=like.device
        ).to(like)

    for s, t in reverse_steps(timesteps):
        prediction = denoiser.predict(x, t, s=s, condition=condition, sample_offset=sample_offset)
        # First: the covariance may keep the graph of the evaluation.
        C = covariance.at(prediction).bounded(x0_range)
        check_stated(prediction, covariance, C)
        step = sampler(schedule, s, t)
        check_reverse_step(step)
        a, b, noise_variance = step
        weighs: PosteriorCovariance | Literal["row_sums"] | float | None
        if isinstance(weighting, (int, float)):  # x_s moves by that times -d|r|/dx_t
            weighs = weighting * (schedule.alpha(t) / schedule.sigma(t) ** 2).item() / b
        elif weighting is None or isinstance(weighting, str):
            weighs = weighting
        else:
            weighs = weighting.at(prediction).bounded(x0_range)
            check_stated(prediction, weighting, weighs)
        x0, y, level = prediction.x0_hat, measurement, draws.of_level(t)
        x0 = x0 if x0_range is None else x0.clamp(*x0_range)
        if draw_x0:
            x0 = x0 + C.noise(z(x0, draws.X0 + level))
            y = y - noise_std * z(y, draws.MEASUREMENT + level)
        x0 = posterior_mean_given_measurement(
            x0,
            C,
            y,
            operator,
            adjoint,
            noise_std=noise_std,
            weighting=weighs,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        x = (a * x + b * x0 + math.sqrt(noise_variance) * z(x, level)).to(dtype)
        check_step(x, prediction, covariance, C)
    return x


def _check_noise(noise_std: object, measurement: object) -> None:
    """Raise unless ``noise_std`` is a standard deviation of noise in ``measurement``."""
    if not isinstance(measurement, Tensor):
        raise TypeError(f"measurement must be a tensor, got {type(measurement).__name__}")
    if not isinstance(noise_std, (int, float, Tensor)):
        kind = type(noise_std).__name__
        raise TypeError(f"noise_std must be a number or a tensor, got {noise_std!r} of type {kind}")
    if isinstance(noise_std, Tensor):
        pairs = zip(reversed(noise_std.shape), reversed(measurement.shape), strict=False)
        if noise_std.dim() > measurement.dim() or any(n not in (1, full) for n, full in pairs):
            raise ValueError(
                f"noise_std must broadcast to the measurement, {tuple(measurement.shape)}, got "
                f"{tuple(noise_std.shape)}"
            )
    if not bool((torch.as_tensor(noise_std) >= 0).all()):
        raise ValueError(f"noise_std must be at least 0, got {noise_std}")


def _check_weighting(weighting: object) -> None:
    """Raise unless ``weighting`` is one of :func:`posterior_mean_given_measurement`."""
    if weighting is None or callable(getattr(weighting, "multiply", None)):
        return
    if isinstance(weighting, str):
        if weighting != "row_sums":
            raise ValueError(f"weighting must be 'row_sums' if it is a name, got {weighting!r}")
        return
    check_number("weighting", weighting)
    assert isinstance(weighting, (int, float))
    if weighting < 0:
        raise ValueError(f"weighting must be at least 0 if it is a length, got {weighting}")


# What an inner product may be off by, relative to the norms in it: an adjoint that is wrong is so
# by a part of the whole, and rounding in half precision or TF32 is less.
_MOST_OFF = 0.02


def _check_adjoint(mean: Tensor, measured: Tensor, u: Tensor, back: object) -> None:
    """Raise unless (A m)^T u = m^T (A^T u), as it is for a linear A and its adjoint."""
    if not isinstance(back, Tensor) or back.shape != mean.shape:
        got = tuple(back.shape) if isinstance(back, Tensor) else type(back).__name__
        raise ValueError(
            f"adjoint must map measurements to the shape of mean, {tuple(mean.shape)}, got {got}"
        )
    pairs = [
        (v.double().flatten(1), w.double().flatten(1)) for v, w in ((measured, u), (mean, back))
    ]
    one, other = ((v * w).sum(dim=1) for v, w in pairs)
    size = torch.maximum(*(v.norm(dim=1) * w.norm(dim=1) for v, w in pairs))
    if bool(((one - other).abs() > _MOST_OFF * size).any()):
        raise ValueError(
            "operator must be linear and adjoint its transpose: (A m)^T u and m^T (A^T u) differ "
            f"by up to {(one - other).abs().max().item():.3g}"
        )


def _transposed(operator: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """Return A^T of a linear operator."""
    pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(operator, at)[1]
    return lambda u: pull(u)[0]


def _dot(v: Tensor, w: Tensor) -> Tensor:
    """Return the inner product of each sample, of shape (B, 1, ...)."""
    return (v * w).flatten(1).sum(dim=1).reshape(-1, *[1] * (v.dim() - 1))


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    b: Tensor,
    tolerance: float | None,
    max_iterations: int,
) -> Tensor:
    """Return u of ``multiply(u)`` = b for each sample of a batch."""
    u, r, p = torch.zeros_like(b), b, b
    squared = _dot(r, r)
    enough = 0.0 * squared if tolerance is None else tolerance**2 * squared
    for _ in range(max_iterations):
        searching = ~(squared <= enough)  # NaN is not enough
        if not bool(searching.any()):
            return u
        product = multiply(p)
        curvature = _dot(p, product)
        if bool((searching & ~(curvature > 0)).any()):
            raise ValueError(
                "covariance must be positive semi-definite, and A C A^T + noise_std^2 I positive: "
                f"it takes a value of {curvature.min().item():.3g}. Use covariance.bounded(...), "
                "and a noise_std above 0 where measurements repeat each other"
            )
        # Samples that are done stay where they are.
        step = torch.where(searching, squared / curvature, 0.0)
        u = u + step * p
        r = r - step * product
        previous, squared = squared, torch.where(searching, _dot(r, r), squared)
        p = torch.where(searching, r + squared / previous * p, p)
    if tolerance is not None and bool((squared > enough).any()):
        reached = (squared / _dot(b, b)).max().sqrt().item()
        warnings.warn(
            f"conjugate gradients reached a relative residual of {reached:.2g} in {max_iterations} "
            f"iterations, not {tolerance:.2g}: raise max_iterations, or noise_std",
            UserWarning,
            stacklevel=3,
        )
    return u
