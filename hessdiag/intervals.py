"""Standard errors of few blocks, and the intervals that they stand for."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from hessdiag.checks import check_real

# Above this chance that entries agree by luck, agreement is no knowledge.
_LUCK = 0.01
# A variance below this part of the others' is rounding.
_ROUNDING = 1e-8
_MANY = 200


def standard_error(num_blocks: int, squared_deviations: Tensor) -> Tensor:
    """Return the standard error of a mean over blocks, for each entry of each sample.

    From n blocks it is sqrt(s^2 / n) with s^2 = squared_deviations / (n - 1). Where one other
    feature disturbs an entry, its n contributions are all alike with probability 2^(1 - n), and
    s^2 is zero however wrong they are. Such an entry takes::

        min(1, 2^(3 - n)) * (mean of s^2 over the sample)

    in its place. Without any deviation in the sample, and few enough entries and blocks for this
    to be luck, the error is unknown, which is infinite.

    Args:
        num_blocks: n, at least 1.
        squared_deviations: Sum over the blocks of (contribution - mean)^2, shape (B, ...).

    Example:
        >>> standard_error(2, torch.tensor([[0.0, 2.0]]))
        tensor([[0.7071, 1.0000]])
        >>> standard_error(2, torch.tensor([[0.0, 0.0]]))
        tensor([[inf, inf]])
    """
    n = num_blocks
    if n < 2:
        return torch.full_like(squared_deviations, torch.inf)
    own = squared_deviations / (n * (n - 1))
    pooled = _over_entries(own)
    error = stood_in_for(own, pooled, n).sqrt()
    if 0.5 ** ((n - 1) * -(-own.shape[1:].numel() // 2)) > _LUCK:
        error = torch.where(pooled == 0, torch.inf, error)
    return error


def stood_in_for(own: Tensor, pooled: Tensor, num_blocks: int) -> Tensor:
    """Return variances, with a part of the mean one in place of those that are zero by luck.

    Args:
        own: The variance of each entry.
        pooled: Their mean, to broadcast.
        num_blocks: n, of :func:`standard_error`.

    Example:
        >>> stood_in_for(torch.tensor([0.0, 2.0]), torch.tensor(1.0), num_blocks=4)
        tensor([0.5000, 2.0000])
    """
    stand_in = min(1.0, 2.0 ** (3 - num_blocks)) * pooled
    return torch.where(own > _ROUNDING * pooled, own, stand_in)


Part = tuple[Tensor, Tensor, Tensor]


def merge(*parts: Part) -> Part:
    """Return mean, standard error and number of blocks of several means over disjoint blocks.

    By the formula of Chan, Golub and LeVeque (1983) for the sums of squared deviations, for which
    a standard error of n blocks stands as n (n - 1) stderr^2.

    Args:
        parts: Means and standard errors of shape (B, ...), and numbers of blocks of shape (B,).

    Raises:
        ValueError: If shapes differ, two are of the same probes, or one block has a standard
            error: it is exact.

    Example:
        >>> one = (torch.tensor([1.0]), torch.tensor([torch.inf]), torch.tensor([1]))
        >>> other = (torch.tensor([3.0]), torch.tensor([torch.inf]), torch.tensor([1]))
        >>> merge(*[one] * 5, *[other] * 5)
        (tensor([2.]), tensor([0.3333]), tensor([10]))
    """
    shapes = {tuple(mean.shape) for mean, _, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"estimates to merge must have one shape, got {sorted(shapes)}")
    if any(bool(torch.isfinite(stderr)[counts == 1].any()) for _, stderr, counts in parts):
        raise ValueError("estimates to merge must have standard errors, got one that is exact")
    # Equal errors that were measured: of the same probes, which would seem to be twice as many.
    for (mean, stderr, _), (other, error, _) in itertools.combinations(parts, 2):
        measured = torch.isfinite(stderr) & (stderr > 0)
        if measured.any() and torch.equal(mean, other) and torch.equal(stderr, error):
            raise ValueError(
                "estimates to merge must be of other probes, got two that are equal: give the "
                "second one probe_offset, the number of probes that the first one took"
            )

    def over(counts: Tensor, values: Tensor) -> Tensor:
        return counts.to(values).reshape(-1, *[1] * (values.dim() - 1))

    total = torch.stack([counts for _, _, counts in parts]).sum(dim=0)
    weights = [over(counts, mean) for mean, _, counts in parts]
    mean = sum(
        (weight * part[0] for weight, part in zip(weights, parts, strict=True)),
        torch.zeros_like(parts[0][0]),
    ) / over(total, parts[0][0])
    deviations = torch.zeros_like(mean)
    for weight, (part, stderr, _) in zip(weights, parts, strict=True):
        # An infinite one stands for no deviation, of a single block or of blocks that agree.
        within = torch.where(stderr.isinf(), 0.0, weight * (weight - 1) * stderr.square())
        # Means that agree but for the rounding of their mean leave the error unknown too.
        between, rounding = part - mean, 8 * torch.finfo(mean.dtype).eps * mean.abs()
        between = torch.where(between.abs() <= rounding, 0.0, between)  # NaN stays NaN
        deviations += within + weight * between.square()
    # Samples may have stopped at different numbers of blocks.
    stderr = torch.full_like(mean, torch.inf)
    for number in total.unique().tolist():
        here = total == number
        stderr[here] = standard_error(number, deviations[here])
    return mean, stderr, total


def half_width(stderr: Tensor, num_blocks: Tensor, level: float) -> Tensor:
    """Return half of the width of the interval that covers the truth with probability ``level``.

    Student's quantile with n - 1 degrees of freedom, n the number of blocks, times::

        sqrt(max(stderr^2, min(1, 2^(3 - n)) * (mean of stderr^2 over the sample))):

    from five blocks or fewer an entry that is disturbed by few features may look better than it
    is, and what the others show is its floor, as far as that is likely.

    Args:
        stderr: Shape (B, ...), as :func:`standard_error` gives it; zero where nothing is left to
            chance.
        num_blocks: Shape (B,).
        level: Between 0 and 1.

    Raises:
        TypeError: If ``level`` is no number.
        ValueError: If it is not between 0 and 1.

    Example:
        >>> half_width(torch.tensor([[1.0, 1.0]]), torch.tensor([2]), 0.5)
        tensor([[1., 1.]])
    """
    check_real("level", level)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    counts = num_blocks.tolist()
    known = {n: (student_quantile(level, n - 1), min(1.0, 2.0 ** (3 - n))) for n in set(counts)}
    quantile, part = (
        torch.tensor(values, dtype=stderr.dtype)
        .to(stderr.device)
        .reshape(-1, *[1] * (stderr.dim() - 1))
        for values in ([known[n][k] for n in counts] for k in (0, 1))
    )
    reach = quantile * torch.maximum(stderr.square(), part * _over_entries(stderr.square())).sqrt()
    return torch.where(_over_entries(stderr) == 0, 0.0, reach)


def _over_entries(values: Tensor) -> Tensor:
    """Return the mean over the entries of each sample, to broadcast."""
    return (
        values.mean(dim=list(range(1, values.dim())), keepdim=True) if values.dim() > 1 else values
    )


@lru_cache(maxsize=4096)
def student_quantile(level: float, degrees: int) -> float:
    """Return q with P(|T| <= q) = level, T of Student's distribution.

    The finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, by bisection; above 200
    degrees of freedom the expansion 26.7.5.

    Args:
        level: Between 0 and 1.
        degrees: Degrees of freedom; infinity is returned for 0.

    Example:
        >>> round(student_quantile(0.95, 1), 3), round(student_quantile(0.95, 15), 3)
        (12.706, 2.131)
    """
    if degrees < 1:
        return math.inf
    if degrees > _MANY:
        z = NormalDist().inv_cdf((1 + level) / 2)
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        return z + first / degrees + second / degrees**2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) tan(angle))."""
    cosine, even = math.cos(angle), degrees % 2 == 0
    term, total = (1.0, 0.0) if even else (cosine, 0.0)
    for k in range(0 if even else 1, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    if even:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)


def error_quantile(num_independent: int, degrees: int) -> float:
    """Return the 95% quantile of a root mean square error over its estimated standard error.

    For one error it is Student's. For k of them its square has the F distribution with k and
    k * degrees degrees of freedom; its quantile is taken by the approximation of Paulson (1942).

    Args:
        num_independent: k, the number of independent errors.
        degrees: Degrees of freedom of each.

    Example:
        >>> round(error_quantile(1, 15), 2), round(error_quantile(100, 15), 2)
        (2.13, 1.12)
    """
    if num_independent == 1 or degrees < 1:
        return student_quantile(0.95, degrees)
    z = NormalDist().inv_cdf(0.95)
    a, b = 2 / (9 * num_independent), 2 / (9 * num_independent * degrees)
    # The larger root w of ((1 - b) w - (1 - a))^2 = z^2 (b w^2 + a), with w^3 the quantile.
    square = (1 - b) ** 2 - z**2 * b
    if square <= 0:
        return math.inf
    half = (1 - a) * (1 - b)
    root = math.sqrt(half**2 - square * ((1 - a) ** 2 - z**2 * a))
    quantile: float = ((half + root) / square) ** 1.5
    return quantile
