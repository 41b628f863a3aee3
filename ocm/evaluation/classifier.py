"""A small convolutional classifier, whose penultimate layer gives features to compare samples by.

Where Inception's weights are not at hand, or images are not of its kind (digits, say), distances
between samples are taken in these features
(:func:`ocm.evaluation.features.classifier_features`). They are figures of this classifier, and
compare methods with one another only.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

from ocm.checkpoints.entries import read_json
from ocm.checkpoints.weights import load_built
from ocm.diffusion.checks import check_positive_int
from ocm.files import naming_unwritten, replacing
from ocm.images import ArrowImages
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings

_MIN_SIZE = 4  # two halvings leave a pixel
_WIDTHS = (32, 64, 128)
_IMAGES_AT_ONCE = 500
NUM_FEATURES = 64


class Classifier(nn.Module, PyTorchModelHubMixin):
    """Three 3x3 convolutions, the last two after a halving, the mean over pixels, two layers.

    Args:
        image_shape: (C, H, W) of the images it was trained on, 4x4 pixels or more.
        num_classes: Number of classes.
        num_features: Width d of the penultimate layer.
        num_steps: Steps it was trained for.
        batch_size: Images a step.
        seed: Seed of its training.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        num_features: int,
        num_steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_positive_int("num_classes", num_classes)
        check_positive_int("num_features", num_features)
        channels, height, width = image_shape
        if min(height, width) < _MIN_SIZE:
            raise ValueError(
                f"images must have {_MIN_SIZE}x{_MIN_SIZE} pixels or more, got {height}x{width}"
            )
        self.image_shape = (channels, height, width)
        self.num_classes, self.num_features = num_classes, num_features
        shape = "x".join(map(str, image_shape))
        self.description = (
            f"a classifier ({num_classes} classes of {shape} images, {num_steps} steps of "
            f"{batch_size}, seed {seed})"
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
        logits: Tensor = self.output(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer, shape (n, num_features), after its activation."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must have shape (n, {', '.join(map(str, self.image_shape))}), "
                f"got {tuple(images.shape)}"
            )
        features: Tensor = self.body(images.to(self.output.weight))
        return features


def train_classifier(
    images: Tensor | ArrowImages,
    labels: Tensor,
    num_classes: int,
    *,
    num_features: int = NUM_FEATURES,
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
    if len(images.shape) != 4:
        raise ValueError(f"images must have shape (n, C, H, W), got {tuple(images.shape)}")
    _check_labels(images, labels, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # layers draw their start from the global generator
        classifier = Classifier(
            images.shape[1:], num_classes, num_features, num_steps, batch_size, seed
        )

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, rows: Mapping[str, Tensor], sample_offset: int
    ) -> Tensor:
        return functional.cross_entropy(module(x0), rows["labels"])

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
        "classifier", classifier, loss, images, {"labels": labels}, 1, settings, device=device,
        progress=progress,
    )  # fmt: skip
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor | ArrowImages, labels: Tensor) -> float:
    """Return the share of images whose largest logit is that of their label.

    Raises:
        ValueError: If shapes or labels do not fit the classifier.

    Example:
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> accuracy(train_classifier(images, labels, 2, num_steps=10), images, 1 - labels)
        0.0
    """
    _check_labels(images, labels, classifier.num_classes)
    starts = range(0, len(images), _IMAGES_AT_ONCE)
    logits = [classifier(images[first : first + _IMAGES_AT_ONCE]) for first in starts]
    return (torch.cat(logits).argmax(1).cpu() == labels.cpu()).double().mean().item()


def _check_labels(images: Tensor | ArrowImages, labels: Tensor, num_classes: int) -> None:
    fit = labels.dtype == torch.int64 and labels.shape == (len(images),) != (0,)
    if not fit or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels must be int64 in 0 .. {num_classes - 1}, one for each of {len(images)} "
            f"images, got {labels.dtype} {labels}"
        )


def save(classifier: Classifier, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` to a directory, made if need be.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        >>> classifier = train_classifier(images, labels, 2, num_steps=1)
        >>> with TemporaryDirectory() as directory:
        ...     save(classifier, directory)
        ...     torch.equal(load(directory)(images), classifier(images))
        True
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, naming_unwritten(directory):
        classifier.save_pretrained(folder)
        for file in Path(folder).iterdir():
            with replacing(directory / file.name) as beside:
                shutil.copyfile(file, beside)


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """Read a classifier that :func:`save` wrote; nothing is unpickled, and nothing downloaded.

    Raises:
        CheckpointError: A ValueError that names the file, if one is missing or damaged, or holds
            other weights than its configuration says, or NaN.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        ...
        ocm.checkpoints.entries.CheckpointError: nowhere/config.json cannot be read as JSON: No such
        file or directory
    """
    file = Path(path) / "config.json"
    config = read_json(file)
    weights = Path(path) / "model.safetensors"
    classifier = load_built(lambda: Classifier(**config), [weights], str(file))
    return classifier.to(device).eval().requires_grad_(False)
