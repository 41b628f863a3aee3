"""Distances between sets of samples: MMD, the Fréchet distance, and precision and recall.

They are functions of features, shape (n, d), and compute in float64. Features of images come from a
:class:`FeatureExtractor`, whose name belongs beside every figure: distances in the features of
different networks have nothing to do with one another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hessdiag.checks import check_batch, check_positive_int
from ocm.evaluation.classifier import Classifier
from ocm.images import ArrowImages

# Distances held at once: 128 MiB of float64.
_CHUNK_ENTRIES = 2**24
_INCEPTION_FEATURES = 2048


def maximum_mean_discrepancy(
    x: Tensor, y: Tensor, bandwidth: float, *, unbiased: bool = True
) -> float:
    """Return the squared maximum mean discrepancy with a Gaussian kernel.

    With k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)),

        MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j),

    where the first two means leave out i = j if ``unbiased``: its expectation is then that of the
    two distributions, and it can be negative; with i = j it is the square of a distance between
    the two sets. (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equations 3 and 5.)

    Args:
        x: Samples or features, shape (n, d); ``images.flatten(1)`` compares pixels.
        y: Others, shape (m, d).
        bandwidth: Of the kernel, in units of the features; state it with the result.
        unbiased: Whether to leave out i = j.

    Raises:
        ValueError: If shapes do not fit or bandwidth is not positive.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> maximum_mean_discrepancy(x, x, 1.0, unbiased=False)
        0.0
        >>> round(maximum_mean_discrepancy(x, x + 9, 1.0), 4)  # 2 exp(-1/2)
        1.2131
    """
    _check_features("x", x, "y", y)
    if not 0.0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    x, y = _centred(x, y)

    def mean(a: Tensor, b: Tensor, skip_diagonal: bool) -> float:
        total = sum(
            squares.div_(-2 * bandwidth**2).exp_().sum().item()
            for _, squares in _squared_distances(a, b)
        )
        if skip_diagonal:  # k(a, a) = 1
            return (total - len(a)) / (len(a) * (len(a) - 1))
        return total / (len(a) * len(b))

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

        |μ_r - μ_g|^2 + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^(1/2)),

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
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1])).to(real.device)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return max(float(metric.compute()), 0.0)  # rounding can leave -1e-8 where it is zero


class _Given(nn.Identity):
    """Stands where torchmetrics asks for a network: the features are at hand."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares, in [0, 1]: of generated samples that look real, and of real ones that are covered."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, num_neighbours: int = 3) -> PrecisionRecall:
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
        PrecisionRecall(precision=1.0, recall=0.875)
    """
    _check_features("real", real, "generated", generated)
    check_positive_int("num_neighbours", num_neighbours)
    fewest = min(len(real), len(generated))
    if num_neighbours >= fewest:
        raise ValueError(
            f"num_neighbours must be below the number of points, {fewest}, got {num_neighbours}"
        )
    real, generated = _centred(real, generated)
    # Copies of a point lie at distance 0, which the distances below give only to rounding.
    slack = 1e-13 * max(x.square().sum(1).max().item() for x in (real, generated))
    reach_real = _squared_radii(real, num_neighbours) + slack
    reach_generated = _squared_radii(generated, num_neighbours) + slack
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    plausible = 0
    for rows, squares in _squared_distances(generated, real):
        plausible += int((squares <= reach_real).any(1).sum())
        covered |= (squares <= reach_generated[rows].unsqueeze(1)).any(0)
    return PrecisionRecall(plausible / len(generated), int(covered.sum()) / len(real))


def _squared_radii(x: Tensor, num_neighbours: int) -> Tensor:
    """Return the squared distance of every point to its k-th nearest other point."""
    radii = []
    for rows, squares in _squared_distances(x, x):
        itself = torch.arange(len(x), device=x.device)[rows].unsqueeze(1)
        radii.append(squares.scatter_(1, itself, math.inf).kthvalue(num_neighbours, dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield squared distances of some rows of ``a`` to all of ``b``, and which rows they are."""
    b_squares = b.square().sum(1)
    count = max(_CHUNK_ENTRIES // len(b), 1)
    for first in range(0, len(a), count):
        rows = slice(first, first + count)
        squares = torch.addmm(b_squares, a[rows], b.T, alpha=-2.0)
        yield rows, squares.add_(a[rows].square().sum(1, keepdim=True)).clamp_(min=0.0)


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, shifted together: every distance here is the same, but for digits."""
    a, b = a.detach().double(), b.detach().double()
    mean = a.mean(0)
    return a - mean, b - mean


def _check_features(first: str, a: Tensor, second: str, b: Tensor) -> None:
    for name, x in ((first, a), (second, b)):
        check_batch(name, x)
        if x.dim() != 2 or len(x) < 2 or x.shape[1] < 1:
            raise ValueError(
                f"{name} must have shape (n, d) with n >= 2, got {tuple(x.shape)}; "
                "flatten(1) makes vectors of images"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{second} must have as many features as {first}, {a.shape[1]}, got {b.shape[1]}"
        )
    if a.device != b.device:
        raise ValueError(f"{second} must be on {a.device}, where {first} is, got {b.device}")


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A map from images to the features that distances are taken in.

    Attributes:
        name: What a report quotes beside a figure.
        num_features: Their number d.
        function: From images in [-1, 1], shape (n, C, H, W), to features (n, d).
        batch_size: Images at a time.

    Example:
        >>> pixels = FeatureExtractor("pixels", 64, lambda images: images.flatten(1))
        >>> pixels(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 64])
    """

    name: str
    num_features: int
    function: Callable[[Tensor], Tensor]
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_positive_int("num_features", self.num_features)
        check_positive_int("batch_size", self.batch_size)

    @torch.no_grad()
    def __call__(self, images: Tensor | ArrowImages) -> Tensor:
        """Return the features of images in [-1, 1], shape (n, d).

        Raises:
            ValueError: If there are no images, or the function returns another shape.
        """
        if len(images) == 0:
            raise ValueError(f"images must hold one or more, got shape {tuple(images.shape)}")
        parts = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            features = self.function(batch)
            if features.shape != (len(batch), self.num_features):
                raise ValueError(
                    f"{self.name} must give features of shape ({len(batch)}, "
                    f"{self.num_features}), got {tuple(features.shape)}"
                )
            parts.append(features)
        return torch.cat(parts)


def classifier_features(classifier: Classifier) -> FeatureExtractor:
    """Return the penultimate layer of a classifier of one's own (:mod:`ocm.evaluation.classifier`).

    Example:
        >>> from ocm.evaluation.classifier import train_classifier
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.arange(8) % 2
        >>> extractor = classifier_features(train_classifier(images, labels, 2, num_steps=1))
        >>> extractor.name
        '64 features of a classifier (2 classes of 1x8x8 images, 1 steps of 64, seed 0)'
        >>> extractor(images).shape
        torch.Size([8, 64])
    """
    description = classifier.description
    shape = "x".join(map(str, description.image_shape))
    name = (
        f"{description.num_features} features of a classifier ({description.num_classes} classes "
        f"of {shape} images, {description.num_steps} steps of {description.batch_size}, "
        f"seed {description.seed})"
    )
    return FeatureExtractor(name, description.num_features, classifier.features)


def inception(weights_path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Return the 2,048 features of Inception v3 that FID is defined by, from weights at hand.

    The network is torch-fidelity's, by way of torchmetrics, which scales images to 299x299 as the
    original does (TensorFlow 1's bilinear, no antialiasing). Nothing is downloaded: the weights are
    the file ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases. Images are
    rounded to bytes first, and grey ones repeated to RGB.

    Args:
        weights_path: The file of weights.
        device: Where to run the network.

    Raises:
        ValueError: If there is no such file, it holds other than the tensors of this network, or
            torch-fidelity is not installed.

    Example:
        >>> inception("nowhere.pth")
        Traceback (most recent call last):
        ...
        ValueError: weights_path must be the file weights-inception-2015-12-05-6726825d.pth of
        torch-fidelity's releases, got 'nowhere.pth', which is no file
    """
    path = Path(weights_path).expanduser()
    if not path.is_file():
        raise ValueError(
            "weights_path must be the file weights-inception-2015-12-05-6726825d.pth of "
            f"torch-fidelity's releases, got {str(weights_path)!r}, which is no file"
        )
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("Inception's features need torch-fidelity: pip install torch-fidelity")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ValueError(f"Inception's features need torch-fidelity to import: {error}") from error

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    try:
        # torch-fidelity would unpickle whatever the file holds: this lets only tensors through.
        torch.load(path, map_location="cpu", weights_only=True)
        network = NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=[str(_INCEPTION_FEATURES)],
            feature_extractor_weights_path=str(path),
            antialias=False,
        )
    except Exception as error:  # unpickling and loading of weights raise all sorts
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"weights_path {str(path)!r} does not load: {reason}") from error
    network = network.to(device).requires_grad_(False)
    return FeatureExtractor(
        f"{_INCEPTION_FEATURES} features of Inception v3 (torch-fidelity, weights sha256 {digest})",
        _INCEPTION_FEATURES,
        lambda images: network(_rgb_bytes(images).to(device)),
        batch_size=64,
    )


def _rgb_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 of three channels."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have shape (n, 1 or 3, H, W) for Inception, got {tuple(images.shape)}"
        )
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)
