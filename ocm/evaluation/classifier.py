"""A small convolutional classifier, whose penultimate layer gives features to compare samples by.

Where Inception's weights are not at hand, or images are not of its kind (digits, say), distances
between samples are taken in these features
(:func:`ocm.evaluation.features.classifier_features`). They are figures of this classifier, and
compare methods with one another only.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

from ocm.diffusion.checks import check_positive_int
from ocm.images import ArrowImages
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings

_MIN_SIZE = 4  # two halvings leave a pixel
_WIDTHS = (32, 64, 128)
# As PyTorchModelHubMixin calls them.
_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class ClassifierDescription:
    """What a classifier is, as its file states it.

    Attributes:
        image_shape: (C, H, W) of the images it was trained on.
        num_classes: Number of classes.
        num_features: Width d of the penultimate layer.
        num_steps: Steps it was trained for.
        batch_size: Images a step.
        seed: Seed of its training.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    num_features: int
    num_steps: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_features", "num_steps", "batch_size"):
            check_positive_int(name, getattr(self, name))
        channels, height, width = self.image_shape
        check_positive_int("channels", channels)
        if min(height, width) < _MIN_SIZE:
            raise ValueError(
                f"images must have {_MIN_SIZE}x{_MIN_SIZE} pixels or more, got {height}x{width}"
            )


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Three 3x3 convolutions, the last two after a halving, the mean over pixels, two layers.

    The arguments are those of :class:`ClassifierDescription`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_features: int,
        num_steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.description = ClassifierDescription(
            (channels, height, width), num_classes, num_features, num_steps, batch_size, seed
        )
        first, second, third = _WIDTHS
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, first, 3, padding=1), nn.GroupNorm(8, first), nn.SiLU()),
            nn.MaxPool2d(2),
            *(nn.Conv2d(first, second, 3, padding=1), nn.GroupNorm(8, second), nn.SiLU()),
            nn.MaxPool2d(2),
            *(nn.Conv2d(second, third, 3, padding=1), nn.GroupNorm(8, third), nn.SiLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(third, num_features), nn.SiLU()),
        )
        self.output = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, num_classes), of images in [-1, 1], shape (n, C, H, W)."""
        logits: Tensor = self.output(self._body(images))
        return logits

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return what the classifier does, without gradients."""
        return self.forward(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer, shape (n, num_features), after its activation."""
        return self._body(images)

    def _body(self, images: Tensor) -> Tensor:
        shape = self.description.image_shape
        if tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"images must have shape (n, {', '.join(map(str, shape))}), "
                f"got {tuple(images.shape)}"
            )
        features: Tensor = self.body(images.to(self.output.weight))
        return features


def train_classifier(
    images: Tensor | ArrowImages,
    labels: Tensor,
    num_classes: int,
    *,
    num_features: int = 64,
    seed: int = 0,
    num_steps: int = 600,
    batch_size: int = 64,
    progress: bool = False,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a small convolutional network to tell the classes of images.

    :func:`ocm.training.loop.train` minimises the cross-entropy; the rate rises for a tenth of the
    steps. The seed fixes the start and the order of the images: on a CPU the same call gives the
    same weights, whatever the state of PyTorch's generator.

    Args:
        images: Images in [-1, 1], shape (n, C, H, W), of 4x4 pixels or more.
        labels: Classes, shape (n,), int64, in 0 .. num_classes - 1.
        num_classes: Number of classes.
        num_features: Width of the penultimate layer.
        seed: Seed of the start and of the order.
        num_steps: Optimiser steps.
        batch_size: Images a step.
        progress: Whether to show a progress bar.
        device: Where to train; the classifier stays there.

    Returns:
        The classifier, frozen and in eval mode.

    Raises:
        ValueError: If shapes or labels do not fit.
        FloatingPointError: If the loss is not finite.

    Example:
        >>> bright = torch.arange(64) % 2
        >>> images = (bright - 0.5).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        >>> classifier = train_classifier(images, bright, 2, num_steps=20)
        >>> accuracy(classifier, images, bright)
        1.0
    """
    _check_labels(images, labels, num_classes)
    channels, height, width = images.shape[1:]
    description = ClassifierDescription(
        (channels, height, width), num_classes, num_features, num_steps, batch_size, seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their start from the global generator
        classifier = Classifier(**asdict(description))

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, labels: Tensor | None, sample_offset: int
    ) -> Tensor:
        assert labels is not None
        return functional.cross_entropy(module(x0), labels)

    settings = TrainingSettings(
        num_steps,
        batch_size,
        learning_rate=3e-3,
        warmup_steps=num_steps // 10,
        ema_decay=0.0,
        seed=seed,
        weight_decay=0.01,
    )
    # One timestep, which the loss does not look at.
    train(
        "classifier", classifier, loss, images, labels, 1, settings, device=device,
        progress=progress,
    )  # fmt: skip
    return classifier.eval().requires_grad_(False)


def accuracy(
    classifier: Classifier, images: Tensor | ArrowImages, labels: Tensor, *, batch_size: int = 500
) -> float:
    """Return the share of images whose largest logit is that of their label.

    Raises:
        ValueError: If shapes or labels do not fit the classifier.

    Example:
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> accuracy(train_classifier(images, labels, 2, num_steps=10), images, 1 - labels)
        0.0
    """
    check_positive_int("batch_size", batch_size)
    _check_labels(images, labels, classifier.description.num_classes)
    correct = 0
    for first in range(0, len(images), batch_size):
        chosen = slice(first, first + batch_size)
        predicted = classifier.logits(images[chosen]).argmax(1).cpu()
        correct += int((predicted == labels[chosen].cpu()).sum())
    return correct / len(images)


def _check_labels(images: Tensor | ArrowImages, labels: Tensor, num_classes: int) -> None:
    check_positive_int("num_classes", num_classes)
    if len(images.shape) != 4 or len(images) == 0:
        raise ValueError(
            f"images must have shape (n, C, H, W), n >= 1, got shape {tuple(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise ValueError(
            f"labels must be int64 of shape ({len(images)},), one for every image, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0 .. {num_classes - 1}, since num_classes is {num_classes}, got "
            f"{low} .. {high}"
        )


def save(classifier: Classifier, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` to a directory, made if need be.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> classifier = train_classifier(images, labels, 2, num_steps=1)
        >>> with TemporaryDirectory() as directory:
        ...     save(classifier, directory)
        ...     torch.equal(load(directory).logits(images), classifier.logits(images))
        True
    """
    classifier.save_pretrained(path, config=asdict(classifier.description))


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Read a classifier that :func:`save` wrote; nothing is unpickled, and nothing downloaded.

    Raises:
        ValueError: That names the file or the folder, if one is missing or damaged, or holds other
            weights than its configuration says.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        ...
        ValueError: no classifier at nowhere: nowhere/config.json is missing
    """
    from safetensors import SafetensorError

    directory = Path(path)
    for file in _FILES:
        if not (directory / file).is_file():
            raise ValueError(f"no classifier at {directory}: {directory / file} is missing")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loads
            classifier = Classifier.from_pretrained(directory, strict=True)
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{directory} holds no classifier that can be read: {reason}") from error
    if not all(bool(torch.isfinite(weight).all()) for weight in classifier.parameters()):
        raise ValueError(f"{directory / _FILES[1]} holds NaN or infinite weights")
    return classifier.to(device).eval().requires_grad_(False)
