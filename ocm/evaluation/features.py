"""Features of images, which distances between sets of samples are taken in.

The name of a :class:`FeatureExtractor` belongs beside every figure: distances in the features of
different networks have nothing to do with one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ocm.evaluation.classifier import Classifier
from ocm.images import ArrowImages

INCEPTION_FEATURES = 2048


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

    @torch.no_grad()
    def __call__(self, images: Tensor | ArrowImages) -> Tensor:
        """Return the features of images in [-1, 1], shape (n, d).

        Raises:
            ValueError: If there are no images, or the function returns another shape.
        """
        if len(images) == 0:
            raise ValueError(f"images must hold one or more, got shape {tuple(images.shape)}")
        starts = range(0, len(images), self.batch_size)
        features = torch.cat([self.function(images[i : i + self.batch_size]) for i in starts])
        if features.shape != (len(images), self.num_features):
            raise ValueError(
                f"{self.name} must give features of shape ({len(images)}, {self.num_features}), "
                f"got {tuple(features.shape)}"
            )
        return features


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
    name = f"{classifier.num_features} features of {classifier.description}"
    return FeatureExtractor(name, classifier.num_features, classifier.features)


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
        torch-fidelity's releases, and 'nowhere.pth' does not load: [Errno 2] No such file or
        directory: 'nowhere.pth'
    """
    path = Path(weights_path).expanduser()
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        # torch-fidelity would unpickle whatever the file holds: this lets only tensors through.
        torch.load(path, map_location="cpu", weights_only=True)
        network = NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=[str(INCEPTION_FEATURES)],
            feature_extractor_weights_path=str(path),
            antialias=False,
        )
    except Exception as error:  # a missing torch-fidelity, unpickling, weights: all sorts
        reason = " ".join(str(error).splitlines()) or type(error).__name__
        raise ValueError(
            "weights_path must be the file weights-inception-2015-12-05-6726825d.pth of "
            f"torch-fidelity's releases, and {str(path)!r} does not load: {reason}"
        ) from error
    network = network.to(device).requires_grad_(False)
    return FeatureExtractor(
        f"{INCEPTION_FEATURES} features of Inception v3 (torch-fidelity, weights sha256 {digest})",
        INCEPTION_FEATURES,
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
