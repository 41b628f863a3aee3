"""Distances between sets of samples: MMD, the Fréchet distance, and precision and recall.

They are functions of features, shape (n, d), and compute in float64 where the features are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ocm.diffusion.checks import check_finite

# At once, 8 bytes each.
_MOST_DISTANCES = 2**26


def maximum_mean_discrepancy(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Return an unbiased estimate of the squared maximum mean discrepancy, of a Gaussian kernel.

    With k(a, b) = exp(-‖a - b‖^2 / (2 bandwidth^2))::

        MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j),

    where the first two means leave out i = j: its expectation is that of the two distributions,
    and it can be negative. (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 3.)

    Args:
        x: Samples or features, shape (n, d); ``images.flatten(1)`` compares pixels.
        y: Others, shape (m, d).
        bandwidth: Of the kernel, in units of the features; state it with the result.

    Raises:
        ValueError: If shapes do not fit or bandwidth is not positive.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(maximum_mean_discrepancy(x, x + 9, 1.0), 4)  # 2 exp(-1/2)
        1.2131
    """
    _check_features("x", x, "y", y)
    if not 0.0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    first, second = _centred(x, y)

    def mean(a: Tensor, b: Tensor) -> float:
        left_out = len(a) if a is b else 0  # terms of i = j, which are 1
        total = sum(
            (squares / (-2 * bandwidth**2)).exp().sum().item()
            for squares in _squared_distances(a, b)
        )
        return (total - left_out) / (len(a) * len(b) - left_out)

    return mean(first, first) + mean(second, second) - 2 * mean(first, second)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

    It is::

        ‖μ_r - μ_g‖^2 + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^(1/2)),

    with covariances over n - 1 (Heusel et al., NeurIPS 2017), by torchmetrics'
    ``FrechetInceptionDistance``. In Inception's features it is known as FID. Few samples bias it
    upwards, the more the larger d is: compare figures of the same numbers of samples only. Where n
    is not above d it is exact only to about 1e-8 of the traces, half of the digits of float64.

    Args:
        real: Features, shape (n, d).
        generated: Others, shape (m, d).

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> round(frechet_distance(x, 3 * x + 2), 6)  # the means differ by 2, the deviations too
        8.0
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_features("real", real, "generated", generated)
    # torchmetrics takes E[f f^T] - μ μ^T, which loses digits to means far from zero.
    real, generated = _centred(real, generated)
    given: Any = torch.nn.Identity()  # in place of a network
    given.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=given).to(real.device)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return max(float(metric.compute()), 0.0)  # rounding can leave -1e-8 where it is zero


def frechet_caution(num_images: int, num_samples: int, num_features: int) -> str | None:
    """Return a sentence if there is too little for a Fréchet distance, or else None.

    A covariance of d features has d (d + 1) / 2 numbers; of fewer than d + 1 vectors it is
    singular, and of fewer than twice d the distance says more of their number than of the samples.

    Example:
        >>> frechet_caution(5000, 100, 64)
        'Fréchet distances in 64 features want 128 samples and images or more, and there are 100
        samples and 5000 images: these are too large by far, and compare with none of other numbers'
        >>> frechet_caution(5000, 500, 64)
    """
    if min(num_images, num_samples) >= 2 * num_features:
        return None
    return (
        f"Fréchet distances in {num_features} features want {2 * num_features} samples and images "
        f"or more, and there are {num_samples} samples and {num_images} images: these are too "
        "large by far, and compare with none of other numbers"
    )


def precision_recall(
    real: Tensor, generated: Tensor, num_neighbours: int = 3
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., NeurIPS 2019).

    A set of features stands for the union of the balls around its points that reach to the k-th
    nearest other point of the set. Precision is the share of generated points in the union of the
    real ones, recall the share of real points in that of the generated. torchmetrics has neither.

    Args:
        real: Features, shape (n, d).
        generated: Others, shape (m, d); the paper takes as many.
        num_neighbours: The k of the balls, below n and m.

    Raises:
        ValueError: If shapes do not fit, or there are too few points for ``num_neighbours``.

    Example:
        >>> real = torch.arange(8.0).view(-1, 1)
        >>> precision_recall(real, real[:4] + 0.1)
        (1.0, 0.875)
    """
    _check_features("real", real, "generated", generated)
    fewest = min(len(real), len(generated))
    if not 1 <= num_neighbours < fewest:
        raise ValueError(
            "num_neighbours must be at least 1 and below the number of points, "
            f"{fewest}, got {num_neighbours}"
        )
    first, second = _centred(real, generated)
    precision = _share_covered(second, first, num_neighbours)
    return precision, _share_covered(first, second, num_neighbours)


def _share_covered(points: Tensor, centres: Tensor, num_neighbours: int) -> float:
    """Return the share of ``points`` in the balls around ``centres``."""
    # Copies of a point lie at distance 0, which distances give only to rounding.
    slack = 1e-13 * max(x.square().sum(1).max() for x in (points, centres))
    nearest = [
        squares.kthvalue(num_neighbours + 1).values  # the first is the centre itself
        for squares in _squared_distances(centres, centres)
    ]
    reach = torch.cat(nearest) + slack
    inside = [(squares <= reach).any(1) for squares in _squared_distances(points, centres)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield squared distances of some rows of ``a`` to all of ``b``, as many as memory is for."""
    for rows in a.split(max(1, _MOST_DISTANCES // len(b))):
        yield torch.cdist(rows, b).square()


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, shifted together: every distance here is the same, but for digits."""
    a, b = a.detach().double(), b.detach().double()
    mean = a.mean(0)
    return a - mean, b - mean


def _check_features(first: str, a: Tensor, second: str, b: Tensor) -> None:
    check_finite(first, a)
    check_finite(second, b)
    if not (a.dim() == b.dim() == 2 <= min(len(a), len(b)) and a.shape[1] == b.shape[1] > 0):
        raise ValueError(
            f"{first} and {second} must have shapes (n, d) and (m, d) with n and m at least 2, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}; flatten(1) makes vectors of images"
        )
