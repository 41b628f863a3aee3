"""Distances against closed forms for Gaussians, SciPy's matrix square root, and plain loops."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ocm.evaluation import distances
from ocm.evaluation.distances import frechet_distance, maximum_mean_discrepancy, precision_recall


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=[2**26, 46], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Rows of all at once, or two rows of 23 at a time."""
    monkeypatch.setattr(distances, "_MOST_DISTANCES", request.param)


def looped_mmd(x, y, bandwidth):
    def kernel(a, b):
        return math.exp(-sum((s - t) ** 2 for s, t in zip(a, b, strict=True)) / 2 / bandwidth**2)

    def mean(a, b, skip):
        values = [kernel(s, t) for i, s in enumerate(a) for j, t in enumerate(b) if i != j or skip]
        return sum(values) / len(values)

    x, y = x.tolist(), y.tolist()
    return mean(x, x, False) + mean(y, y, False) - 2 * mean(x, y, True)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
def test_mmd_is_the_double_sum(bandwidth):
    x, y = normal(11, 3), 1.5 * normal(7, 3, seed=1) + 100.0
    for first, second in ((x, y - 100.0), (x, y), (x + 1e5, y + 1e5 - 99.0)):
        expected = looped_mmd(first, second, bandwidth)
        got = maximum_mean_discrepancy(first, second, bandwidth)
        assert got == pytest.approx(expected, abs=1e-9)


def test_mmd_of_gaussians():
    """Its mean over samples is the closed form, to which i = j would add (2 / n)(1 - E k)."""
    n, d, bandwidth, shift = 20, 2, 1.2, 1.0
    ratio = bandwidth**2 / (bandwidth**2 + 2)
    same = ratio ** (d / 2)
    different = same * math.exp(-(shift**2) * d / (2 * (bandwidth**2 + 2)))
    expected = 2 * (same - different)
    values = [
        maximum_mean_discrepancy(
            normal(n, d, seed=2 * run),
            normal(n, d, seed=2 * run + 1) + shift,
            bandwidth,
        )
        for run in range(400)
    ]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < 4 * error
    assert error < 0.01 < 2 / n * (1 - same) / 4  # so that with i = j it would fail


def scipy_frechet(x, y):
    x, y = x.numpy().astype(np.float64), y.numpy().astype(np.float64)
    first, second = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    root = scipy.linalg.sqrtm(first @ second)
    difference = x.mean(0) - y.mean(0)
    return difference @ difference + np.trace(first + second - 2 * root).real


@pytest.mark.parametrize(
    ("n", "m", "d", "tolerance"),
    [(200, 150, 6, 1e-9), (300, 300, 1, 1e-9), (20, 30, 64, 1e-5)],
)
def test_frechet_distance_is_that_of_scipy(n, m, d, tolerance):
    x = normal(n, d) @ normal(d, d, seed=2)
    y = normal(m, d, seed=1) @ normal(d, d, seed=3) + 0.5
    expected = scipy_frechet(x, y)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=tolerance)
    single = frechet_distance(x.float(), y.float())
    assert single == pytest.approx(scipy_frechet(x.float(), y.float()), rel=tolerance)


def test_frechet_distance_of_means_far_from_zero():
    x, y = normal(200, 6), normal(150, 6, seed=1) * 2
    near = frechet_distance(x, y)
    assert frechet_distance(x + 1e7, y + 1e7) == pytest.approx(near, rel=1e-6)


def test_frechet_distance_of_gaussians():
    """Of exact moments: rows are whitened, so that the fitted Gaussians are those asked for."""
    x = normal(50, 3)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    scales, shift = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 2.0, 2.0])
    expected = 9.0 + (0.5**2 + 0 + 2.0**2)
    assert frechet_distance(x, x * scales + shift) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(100, 5), (10, 64)])
def test_frechet_distance_to_itself_is_zero(n, d):
    x = normal(n, d)
    assert 0.0 <= frechet_distance(x, x.flip(0)) < 1e-5


def looped_precision_recall(real, generated, k):
    def share_covered(points, centres):
        def distance(a, b):
            return math.dist(a.tolist(), b.tolist())

        covered = 0
        for point in points:
            covered += any(
                distance(point, centre)
                <= sorted(distance(centre, other) for j, other in enumerate(centres) if j != i)[
                    k - 1
                ]
                for i, centre in enumerate(centres)
            )
        return covered / len(points)

    return share_covered(generated, real), share_covered(real, generated)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_the_loop(k):
    real, generated = normal(23, 2), 0.6 * normal(17, 2, seed=1) + 0.5
    precision, recall = precision_recall(real, generated, k)
    assert (precision, recall) == looped_precision_recall(real, generated, k)
    assert 0 < recall < precision <= 1


@pytest.mark.parametrize(
    ("generated", "precision", "recall"),
    [
        (lambda real: real, 1.0, 1.0),
        (lambda real: real + 1e3, 0.0, 0.0),
        (lambda real: real[:1].expand(20, -1), 1.0, 1 / 40),  # collapsed on a real image
    ],
)
@pytest.mark.parametrize("offset", [0.0, 77.3])
def test_precision_and_recall_at_the_ends(generated, precision, recall, offset):
    real = normal(40, 16) + offset
    assert precision_recall(real, generated(real)) == (precision, recall)


@pytest.mark.parametrize(
    "metric", [frechet_distance, precision_recall, lambda a, b: maximum_mean_discrepancy(a, b, 1.0)]
)
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.zeros(5, 3), r"must have shapes \(n, d\) and \(m, d\) .* got \(5, 2\) and \(5, 3\)"),
        (torch.zeros(5, 2, 1), r"must have shapes .* and \(5, 2, 1\); flatten"),
        (torch.zeros(1, 2), r"with n and m at least 2, .* and \(1, 2\)"),
        (torch.full((5, 2), math.nan), "must be finite, got 10 NaN"),
    ],
)
def test_odd_features(metric, second, message):
    with pytest.raises(ValueError, match=message):
        metric(torch.zeros(5, 2), second)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_odd_bandwidths(bandwidth):
    with pytest.raises(ValueError, match="bandwidth must be positive and finite, got"):
        maximum_mean_discrepancy(normal(3, 2), normal(3, 2), bandwidth)


def test_too_few_neighbours():
    with pytest.raises(ValueError, match="below the number of points, 3, got 3"):
        precision_recall(normal(5, 2), normal(3, 2))
