"""A small convolutional classifier, whose penultimate layer gives features to compare samples by.

Where Inception's weights are not at hand, or images are not of its kind (digits, say), distances
between samples are taken in these features
(:func:`ocm.evaluation.distances.classifier_features`). They are figures of this classifier, and
compare methods with one another only.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.data import ByteImages
from ocm.diffusion.checks import check_positive_int

_FORMAT = "ocm-classifier"
_VERSION = 1
_MIN_SIZE = 4  # two halvings leave a pixel
_WIDTHS = (32, 64, 128)
_PEAK_LEARNING_RATE = 3e-3


class _Network(nn.Module):
    """Three 3x3 convolutions, the last two after a halving, the mean over pixels, two layers."""

    def __init__(self, channels: int, num_features: int, num_classes: int) -> None:
        super().__init__()
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
        logits: Tensor = self.output(self.body(images))
        return logits


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


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier, frozen and in eval mode.

    Attributes:
        network: Gives logits, shape (n, num_classes), of images in [-1, 1].
        description: Shapes, and how it was trained.
    """

    network: nn.Module
    description: ClassifierDescription

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, num_classes), of images in [-1, 1], shape (n, C, H, W)."""
        logits: Tensor = self.network(self._placed(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer, shape (n, num_features), after its activation."""
        features: Tensor = self.network.get_submodule("body")(self._placed(images))
        return features

    def _placed(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.description.image_shape:
            raise ValueError(
                f"images must have shape (n, {', '.join(map(str, self.description.image_shape))}), "
                f"got {tuple(images.shape)}"
            )
        return images.to(next(self.network.parameters()))


def train_classifier(
    images: Tensor | ByteImages,
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

    AdamW minimises the cross-entropy; its rate rises for a tenth of the steps, then falls to zero
    on a cosine. The seed fixes the start and the order of the images: on a CPU the same call gives
    the same weights, whatever the state of PyTorch's generator.

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
    from tqdm import tqdm

    _check_labels(images, labels, num_classes)
    channels, height, width = images.shape[1:]
    description = ClassifierDescription(
        (channels, height, width), num_classes, num_features, num_steps, batch_size, seed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their start from the global generator
        network = _Network(channels, num_features, num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LEARNING_RATE)
    warmup_steps = max(num_steps // 10, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup_steps) * (1 + math.cos(math.pi * step / num_steps)) / 2
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in tqdm(range(num_steps), "classifier", disable=not progress):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        batch, order = order[:batch_size], order[batch_size:]
        loss = functional.cross_entropy(
            network(images[batch].to(device, torch.float32)), labels[batch].to(device)
        )
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the classifier's loss is {loss.item()} at step {step}; are the images finite?"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return Classifier(network.eval().requires_grad_(False), description)


def accuracy(
    classifier: Classifier, images: Tensor | ByteImages, labels: Tensor, *, batch_size: int = 500
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


def _check_labels(images: Tensor | ByteImages, labels: Tensor, num_classes: int) -> None:
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
    """Write ``classifier.json`` and ``classifier.safetensors`` to a directory, made if need be.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> classifier = train_classifier(images, labels, 2, num_steps=1)
        >>> with TemporaryDirectory() as directory:
        ...     save(classifier, directory)
        ...     torch.equal(load(directory).logits(images), classifier.logits(images))
        True
    """
    from safetensors.torch import save_file

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(classifier.network.state_dict(), directory / "classifier.safetensors")
    description = {"format": _FORMAT, "version": _VERSION} | asdict(classifier.description)
    (directory / "classifier.json").write_text(json.dumps(description, indent=2) + "\n")


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Read a classifier that :func:`save` wrote; nothing is unpickled.

    Raises:
        ValueError: That names the file, if one is missing, damaged, of another format, or holds
            other weights than its description says.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        ...
        ValueError: no classifier at nowhere: nowhere/classifier.json is missing
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(path)
    description = _read_description(directory / "classifier.json")
    network = _Network(
        description.image_shape[0], description.num_features, description.num_classes
    )
    file = directory / "classifier.safetensors"
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{file} is of another classifier: {error}") from error
    if not all(bool(torch.isfinite(weight).all()) for weight in network.parameters()):
        raise ValueError(f"{file} holds NaN or infinite weights")
    return Classifier(network.to(device).eval().requires_grad_(False), description)


def _read_description(file: Path) -> ClassifierDescription:
    try:
        entries: Any = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"no classifier at {file.parent}: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict) or entries.pop("format", None) != _FORMAT:
        raise ValueError(f'{file} is no classifier of ocm: "format" must be "{_FORMAT}"')
    version = entries.pop("version", None)
    if version != _VERSION:
        raise ValueError(f"{file} has version {version!r}, this ocm reads {_VERSION}")
    try:
        channels, height, width = (int(size) for size in entries.pop("image_shape"))
        return ClassifierDescription((channels, height, width), **entries)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} lacks or misstates an entry: {reason}") from error
