"""Training images that a checkpoint was not trained on, for what is fitted afterwards."""

from __future__ import annotations

from torch import Tensor

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.data import Images


def calibration_images(checkpoint: Checkpoint, images: Images, count: int) -> Tensor:
    """Return at most ``count`` training images, those that nothing was trained on where possible.

    A denoiser errs less on what it was trained on, and a calibration there would be too narrow.
    """
    return images.train[_kept(checkpoint, images, count)]


def calibration_labels(checkpoint: Checkpoint, images: Images, count: int) -> Tensor | None:
    """Return the classes of :func:`calibration_images`, for a denoiser that takes them."""
    if not checkpoint.denoiser.takes_labels or images.train_labels is None:
        return None
    return images.train_labels[_kept(checkpoint, images, count)]


def _kept(checkpoint: Checkpoint, images: Images, count: int) -> slice:
    kept = checkpoint.num_calibration
    first = len(images.train) - kept if kept else 0
    return slice(first, first + count)
