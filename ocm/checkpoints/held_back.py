"""Training images that a checkpoint was not trained on, for what is fitted afterwards."""

from __future__ import annotations

from torch import Tensor

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.data import Images


def held_back(checkpoint: Checkpoint, images: Images, count: int) -> tuple[Tensor, Tensor | None]:
    """Return at most ``count`` training images, those that nothing was trained on where possible.

    A denoiser errs less on what it was trained on, and a calibration there would be too narrow.
    Their classes come with them, for a denoiser that takes them.
    """
    kept = checkpoint.num_calibration or len(images.train)
    chosen = slice(len(images.train) - kept, len(images.train) - kept + count)
    classes = images.train_labels if checkpoint.denoiser.takes_labels else None
    return images.train[chosen], None if classes is None else classes[chosen]
