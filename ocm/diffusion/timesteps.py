"""Which of the N noise levels a few-step process visits: even, quadratic, or chosen for a bound.

A trajectory is an increasing list of timesteps t_1 < ... < t_K = N. Whoever takes ``steps`` takes
one of these, or the number K of evenly spaced ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.schedules import Schedule


def timesteps_of(schedule: Schedule, steps: int | Sequence[int]) -> list[int]:
    """Return the timesteps of an argument ``steps``: K evenly spaced ones, or those given.

    Raises:
        TypeError: If it is neither.
        ValueError: If K lies outside 1 .. N, or the timesteps do not increase from at least 1 to N.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> timesteps_of(linear(), 3), timesteps_of(linear(), [10, 1000])
        ([1, 500, 1000], [10, 1000])
    """
    if isinstance(steps, int):
        return even_timesteps(schedule, steps)
    timesteps = list(steps)
    reverse_steps(timesteps)  # raises unless they increase
    if timesteps[-1] != schedule.num_timesteps:
        raise ValueError(
            f"steps must be a number, or timesteps that end at N = {schedule.num_timesteps}, got "
            f"{timesteps[-1]}"
        )
    return timesteps


def even_timesteps(schedule: Schedule, K: int) -> list[int]:
    """Return K evenly spaced timesteps 1 = t_1 < ... < t_K = N, or [N] for K = 1.

    t_k = round(1 + (k - 1) (N - 1) / (K - 1)), as in Analytic-DPM (Bao et al., 2022).

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> even_timesteps(linear(), 5)
        [1, 251, 500, 750, 1000]
    """
    num_timesteps = schedule.num_timesteps
    _check_number(num_timesteps, K)
    if K == 1:
        return [num_timesteps]
    stride = (num_timesteps - 1) / (K - 1)
    return [round(1 + k * stride) for k in range(K)]


def reverse_steps(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    """Return the steps (s, t) of the reverse process, from the noisiest t down to s = 0.

    Args:
        timesteps: Increasing timesteps, the first at least 1.

    Raises:
        ValueError: If they do not increase from at least 1.

    Example:
        >>> reverse_steps([1, 500, 1000])
        [(500, 1000), (1, 500), (0, 1)]
    """
    pairs = list(zip([0, *timesteps], timesteps, strict=False))
    if not pairs or any(s >= t for s, t in pairs):
        raise ValueError(f"timesteps must increase from at least 1, got {list(timesteps)}")
    return pairs[::-1]


def quadratic_timesteps(schedule: Schedule, K: int) -> list[int]:
    """Return K timesteps 1 = t_1 < ... < t_K = N whose spacing grows linearly, or [N] for K = 1.

    t_k = round(1 + (N - 1) ((k - 1) / (K - 1))^2), as in DDIM (Song, Meng and Ermon, 2021) but
    up to N; where two of them would coincide the later ones move up.

    Raises:
        TypeError: If K is not an int.
        ValueError: If K lies outside 1 .. N.

    Example:
        >>> from ocm.diffusion.schedules import linear
        >>> quadratic_timesteps(linear(), 5)
        [1, 63, 251, 563, 1000]
    """
    num_timesteps = schedule.num_timesteps
    _check_number(num_timesteps, K)
    if K == 1:
        return [num_timesteps]
    timesteps = [1]
    for k in range(1, K):
        place = round(1 + (num_timesteps - 1) * (k / (K - 1)) ** 2)
        timesteps.append(max(place, timesteps[-1] + 1))
    return timesteps


def optimal_timesteps(schedule: Schedule, variances: Tensor, K: int) -> list[int]:
    """Return the K timesteps 1 = t_1 < ... < t_K = N that minimise the bound, or [N] for K = 1.

    With the optimal covariance the expected KL of the step from t to s is, per dimension,

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

        >>> from ocm.diffusion.schedules import linear
        >>> schedule = linear()
        >>> optimal_timesteps(schedule, schedule.beta_bar[1:] * 0.1, 3)[1] < 500
        True
    """
    N = schedule.num_timesteps
    _check_number(N, K)
    if variances.shape != (N,) or not bool((variances >= 0).all()):
        raise ValueError(
            f"variances must be {N} numbers of at least 0, got shape {tuple(variances.shape)} "
            f"with minimum {variances.min().item() if variances.numel() else math.nan:.3g}"
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


def _check_number(num_timesteps: int, K: int) -> None:
    check_positive_int("K", K)
    if K > num_timesteps:
        raise ValueError(f"K must lie in 1 .. {num_timesteps}, got {K}")
