"""What the commands read: data sets, checkpoints and pipelines that fit each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images


def existing(path: Path, images: Images, data: str, place: Any) -> Checkpoint:
    """Return the checkpoint at ``path``, or one of a pipeline's denoiser, for these images."""
    from ocm import checkpoints

    if (path / "model_index.json").exists():
        model = checkpoints.load_denoiser(path, place)
        base = checkpoints.Checkpoint(model, images.shape, images.levels, images.name)
        channels = model.backbone.config.in_channels
        if channels != images.shape[0]:
            raise ValueError(
                f"--denoiser takes {channels} channels, but the samples of --data {data} have "
                f"{images.shape[0]}; for a latent model pass --vae"
            )
    else:
        base = checkpoints.load(path, place)
        if base.image_shape != images.shape:
            raise ValueError(
                f"--denoiser takes images of shape {base.image_shape}, but those of --data "
                f"{data} have {images.shape}"
            )
        base = replace(base, data=images.name, levels=images.levels)
    if base.denoiser.takes_labels and images.train_labels is None:
        raise ValueError(f"--denoiser takes class labels, and --data {data} has none")
    return base


def encoded(images: Images, vae: Path, place: Any) -> Images:
    """Return the data set as latents of the autoencoder in the folder ``vae``."""
    from ocm.integrations.latents import encode, load_autoencoder

    autoencoder = load_autoencoder(vae, place)
    return replace(
        images,
        train=encode(autoencoder, images.train[:]),
        test=encode(autoencoder, images.test[:]),
    )


def images_for(
    loaded: Checkpoint, data: str | None, vae: Path | None = None, image_size: int | None = None
) -> Images:
    """Return the data set of a checkpoint, or another of the same shape.

    Args:
        loaded: The checkpoint.
        data: Name of another data set, or None.
        vae: Autoencoder of a model of latents.
        image_size: Side of the images that it encodes.

    Raises:
        ValueError: If its images are of another shape, or there is no autoencoder for latents.
    """
    from ocm import data as datasets

    if loaded.x0_range is None and vae is None:
        raise ValueError("--vae must be given, since this is a model of latents")
    if vae is None and image_size is not None:
        raise ValueError(f"--image-size {image_size} is for --vae; the model has its own size")
    if vae is None:
        images = datasets.load(data or loaded.data, image_size=loaded.image_shape[-1])
    else:
        images = datasets.load(data or loaded.data, image_size=image_size)
        images = encoded(images, vae, loaded.denoiser.device)
    if images.shape != loaded.image_shape:
        raise ValueError(
            f"the checkpoint takes images of shape {loaded.image_shape}, but those of --data "
            f"{images.name} have {images.shape}"
        )
    return images


def calibration_images(loaded: Checkpoint, images: Images, count: int) -> Tensor:
    """Return at most ``count`` training images, those that nothing was trained on where possible.

    A denoiser errs less on what it was trained on, and a calibration there would be too narrow.
    """
    kept = loaded.num_calibration
    if kept == 0:
        return images.train[: min(count, len(images.train))]
    first = len(images.train) - kept
    return images.train[first : first + min(count, kept)]


def calibration_labels(loaded: Checkpoint, images: Images, count: int) -> Tensor | None:
    """Return the classes of :func:`calibration_images`, for a denoiser that takes them."""
    if not loaded.denoiser.takes_labels or images.train_labels is None:
        return None
    first = len(images.train) - loaded.num_calibration if loaded.num_calibration else 0
    return images.train_labels[first : first + count]
