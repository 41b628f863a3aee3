"""Which noise levels a few-step process visits.

A trajectory is an increasing list of timesteps t_1 < ... < t_K, most often up to N. Whoever takes
``steps`` takes one of these, or the number K of evenly spaced ones, whose last step starts at t = 1
and adds no noise worth the name: moments come out right, and bounds need it. Images of few steps
look better with trailing ones, which spend no step there, though their last step, to x0_hat,
loses variance; ``ocm sample`` takes them.

===============================  ================================================================
:func:`even_timesteps`           from 1 to N
:func:`trailing_timesteps`       N / K, 2 N / K .. N, as diffusers' "trailing"
:func:`leading_timesteps`        1, N / K + 1 .. N (K - 1) / K + 1, as diffusers' "leading"
:func:`quadratic_timesteps`      closer at little noise
:func:`optimal_timesteps`        of the least likelihood bound
:func:`timesteps_at`             at sigmas of one's own, shifted (:func:`shifted`) or not
===============================  ================================================================

On a discrete schedule they are whole, on a continuous path any numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.schedules import Schedule


def timesteps_of(schedule: Schedule, steps: int | Sequence[float]) -> list[float]:
    """Return the timesteps of an argument ``steps``: K evenly spaced ones, or those given.

    Raises:
        TypeError: If it is neither, or one of them is not whole on a discrete schedule.
        ValueError: If K lies outside 1 .. N, or the timesteps do not increase within (0, N].

    Example:
        >>> import ocm
        >>> timesteps_of(ocm.linear(), 3), timesteps_of(ocm.linear(), [10, 1000])
        ([1, 500, 1000], [10, 1000])
    """
    if isinstance(steps, int):
        return even_timesteps(schedule, steps)
    is_sequence = isinstance(steps, Iterable) and not isinstance(steps, str)
    if not is_sequence or (isinstance(steps, Tensor) and steps.dim() != 1):
        raise TypeError(f"steps must be an int, or a sequence of timesteps, got {steps!r}")
    timesteps = [t.item() if isinstance(t, Tensor) else t for t in steps]
    reverse_steps(timesteps)  # raises unless they increase
    for t in timesteps:
        schedule.check(t)
    return timesteps


def even_timesteps(schedule: Schedule, K: int) -> list[float]:
    """Return K evenly spaced timesteps 1 = t_1 < ... < t_K = N, or [N] for K = 1.

    t_k = 1 + (k - 1) (N - 1) / (K - 1), rounded on a discrete schedule, as in Analytic-DPM (Bao et
    al., 2022).

    Args:
        schedule: Whose N it is.
        K: Number of timesteps, 1 .. N.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N.

    Example:
        >>> import ocm
        >>> ocm.even_timesteps(ocm.linear(), 5)
        [1, 251, 500, 750, 1000]
    """
    N = _checked(schedule, K)
    if K == 1:
        return [N]
    stride = (N - 1) / (K - 1)
    # The last one is N itself, whatever the rounding of the strides.
    return _fitted(schedule, [*(1 + k * stride for k in range(K - 1)), N])


def trailing_timesteps(schedule: Schedule, K: int) -> list[float]:
    """Return t_k = k N / K, rounded on a discrete schedule: "trailing" of diffusers.

    The last step, from t_1, is as long as the others, so that x0_hat is taken where there is noise.

    Args:
        schedule: Whose N it is.
        K: Number of timesteps, 1 .. N.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N.

    Example:
        >>> import ocm
        >>> ocm.trailing_timesteps(ocm.linear(), 5)
        [200, 400, 600, 800, 1000]
    """
    N = _checked(schedule, K)
    return _fitted(schedule, [N - k * (N / K) for k in range(K)][::-1])


def leading_timesteps(schedule: Schedule, K: int, offset: int = 0) -> list[float]:
    """Return t_k = 1 + (k - 1) (N // K) + ``offset``: "leading" of diffusers, which misses N.

    Args:
        schedule: Whose N it is.
        K: Number of timesteps, 1 .. N.
        offset: diffusers' ``steps_offset``; whole on a discrete schedule.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N, or the offset leads out of it.

    Example:
        >>> import ocm
        >>> ocm.leading_timesteps(ocm.linear(), 5)
        [1, 201, 401, 601, 801]
    """
    N = _checked(schedule, K)
    stride = N / K if schedule.is_continuous else N // K
    timesteps = [1 + k * stride + offset for k in range(K)]
    is_whole = schedule.is_continuous or offset % 1 == 0
    if not (is_whole and 1 <= timesteps[0] <= timesteps[-1] <= N):
        raise ValueError(f"offset must keep the timesteps in 1 .. {N}, got {offset}")
    return timesteps


def timesteps_at(schedule: Schedule, sigmas: Sequence[float] | Tensor) -> list[float]:
    """Return the increasing timesteps of a continuous path where sigma_t is each of ``sigmas``.

    A last sigma of 0, as schedulers of diffusers keep it, is left out.

    Args:
        schedule: A continuous path: of flow matching, EDM, ...
        sigmas: Scales of the noise in any order, above 0 and at most that of N.

    Raises:
        ValueError: If the schedule is discrete, or a sigma lies elsewhere.

    Example:
        >>> import ocm
        >>> ocm.timesteps_at(ocm.flow(), ocm.shifted([1.0, 0.5], 3.0))
        [750.0, 1000.0]
    """
    if not schedule.is_continuous:
        raise ValueError(
            f"schedule must be continuous, got {schedule.name!r}, whose timesteps are whole"
        )
    wanted = torch.as_tensor(sigmas, dtype=torch.float64)
    wanted = wanted[wanted != 0].sort().values
    N = schedule.num_timesteps
    most = schedule.sigma(N).item()
    if not len(wanted) or not bool((wanted > 0).all()) or wanted[-1] > most * (1 + 1e-6):
        raise ValueError(f"sigmas must lie in (0, {most:.6g}], got {list(sigmas)}")
    timesteps: list[float] = schedule.timestep_where(schedule.sigma, wanted).tolist()
    return timesteps


def shifted(sigmas: Sequence[float] | Tensor, shift: float) -> Tensor:
    """Return sigmas of a flow moved towards noise, shift sigma / (1 + (shift - 1) sigma).

    The static shift of SD3 (Esser et al., 2024); the dynamic one of Flux is that of
    :func:`dynamic_shift`.

    Args:
        sigmas: In [0, 1].
        shift: Above 0; 1 changes nothing.

    Raises:
        ValueError: If the shift is not positive, or a sigma lies elsewhere.

    Example:
        >>> import ocm
        >>> ocm.shifted([1.0, 0.5], 3.0)
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, got {shift}")
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError(
            f"sigmas must lie in [0, 1], got {sigmas.min().item():.4g} .. {sigmas.max().item():.4g}"
        )
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(
    num_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Return exp(mu), mu linear in the number of tokens of an image, as Flux's pipelines take it.

    e^mu / (e^mu + 1 / sigma - 1), the shift of diffusers' ``use_dynamic_shifting``, is
    ``shifted(sigma, e^mu)``. The defaults are those of Flux.

    Args:
        num_tokens: Tokens of the image that is sampled.
        base_tokens: Where mu is ``base_shift``.
        max_tokens: Where mu is ``max_shift``; mu goes on beyond it.
        base_shift: mu of ``base_tokens``.
        max_shift: mu of ``max_tokens``.

    Raises:
        ValueError: If ``num_tokens`` is not positive, or ``base_tokens`` not below ``max_tokens``.

    Example:
        >>> import ocm
        >>> round(ocm.dynamic_shift(4096), 3)    # exp(1.15)
        3.158
        >>> ocm.shifted([1.0, 0.5], ocm.dynamic_shift(256)).round(decimals=3)
        tensor([1.0000, 0.6220], dtype=torch.float64)
    """
    if not (0 < num_tokens < math.inf and 0 < base_tokens < max_tokens):
        raise ValueError(
            "num_tokens must be positive, and base_tokens below max_tokens, got "
            f"{num_tokens}, {base_tokens} and {max_tokens}"
        )
    place = (num_tokens - base_tokens) / (max_tokens - base_tokens)
    return math.exp(base_shift + place * (max_shift - base_shift))


def reverse_steps(timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """Return the steps (s, t) of the reverse process, from the noisiest t down to s = 0.

    Args:
        timesteps: Increasing timesteps above 0.

    Raises:
        ValueError: If they do not increase from above 0.

    Example:
        >>> reverse_steps([1, 500, 1000])
        [(500, 1000), (1, 500), (0, 1)]
    """
    pairs: list[tuple[float, float]] = list(zip([0, *timesteps], timesteps, strict=False))
    if not pairs or not all(s < t for s, t in pairs):
        raise ValueError(f"timesteps must increase from above 0, got {list(timesteps)}")
    return pairs[::-1]


def quadratic_timesteps(schedule: Schedule, K: int) -> list[float]:
    """Return K timesteps 1 = t_1 < ... < t_K = N whose spacing grows linearly, or [N] for K = 1.

    t_k = round(1 + (N - 1) ((k - 1) / (K - 1))^2), as in DDIM (Song, Meng and Ermon, 2021) but
    up to N; where two of them would coincide the later ones move up.

    Args:
        schedule: Whose N it is.
        K: Number of timesteps, 1 .. N.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N.

    Example:
        >>> import ocm
        >>> ocm.quadratic_timesteps(ocm.linear(), 5)
        [1, 63, 251, 563, 1000]
    """
    N = _checked(schedule, K)
    if K == 1:
        return [N]
    timesteps: list[float] = [1]
    for k in range(1, K):
        place = round(1 + (N - 1) * (k / (K - 1)) ** 2)
        timesteps.append(max(place, timesteps[-1] + 1))
    return timesteps


def optimal_timesteps(schedule: Schedule, variances: Tensor, K: int) -> list[float]:
    """Return the K timesteps 1 = t_1 < ... < t_K = N that minimise the bound, or [N] for K = 1.

    With the optimal covariance the expected KL of the step from t to s is, per dimension::

        1/2 log(1 + (SNR(s) - SNR(t)) Var_t),    SNR = alpha_bar / beta_bar,

    and dynamic programming finds the path of least sum (Analytic-DPM, Bao et al., 2022, with one
    variance for each timestep).

    Args:
        schedule: The noise schedule.
        variances: Var_t = E Var[x0 | x_t], the mean over dimensions and data, for t = 1 .. N:
            those of :class:`ocm.Analytic`, say; shape (N,).
        K: Number of timesteps.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N, or ``variances`` is of another shape or negative.

    Example:
        A variance that is largest at low noise draws the timesteps there:

        >>> import ocm
        >>> schedule = ocm.linear()
        >>> ocm.optimal_timesteps(schedule, schedule.beta_bar[1:] * 0.1, 3)[1] < 500
        True
    """
    N = _checked(schedule, K)
    variances = torch.as_tensor(variances)
    fits = variances.shape == (N,) and bool(((variances >= 0) & variances.isfinite()).all())
    if not fits:
        minimum = variances.min().item() if variances.numel() else math.nan
        raise ValueError(
            f"variances must be {N} finite numbers of at least 0, got shape "
            f"{tuple(variances.shape)} with minimum {minimum:.3g}"
        )
    if K == 1:
        return [N]
    snr = schedule.snr[1:]
    # cost[s, t], infinite unless s < t; row and column 0 are timestep 1.
    cost = 0.5 * torch.log1p((snr[:, None] - snr).clamp(min=0) * variances.double().cpu())
    cost += torch.full_like(cost, math.inf).tril()
    least = torch.full((N,), math.inf, dtype=torch.float64)
    least[0] = 0.0
    origins = []
    for _ in range(K - 1):
        least, origin = (least[:, None] + cost).min(dim=0)
        origins.append(origin)
    path = [N - 1]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return [t + 1 for t in reversed(path)]


# By name, those that take a schedule and K alone.
SPACINGS: dict[str, Callable[[Schedule, int], list[float]]] = {
    "even": even_timesteps,
    "trailing": trailing_timesteps,
    "leading": leading_timesteps,
    "quadratic": quadratic_timesteps,
}


def _fitted(schedule: Schedule, timesteps: list[float]) -> list[float]:
    return timesteps if schedule.is_continuous else [round(t) for t in timesteps]


def _checked(schedule: Schedule, K: int) -> int:
    """Return N, if K timesteps fit into it."""
    check_positive_int("K", K)
    if K > schedule.num_timesteps:
        raise ValueError(f"K must lie in 1 .. {schedule.num_timesteps}, got {K}")
    return schedule.num_timesteps
