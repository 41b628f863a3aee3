"""What the commands read: data sets, checkpoints and pipelines that fit each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images
    from ocm.images import ArrowImages

_IMAGES_AT_ONCE = 256


def existing(path: Path, images: Images, data: str, place: Any) -> Checkpoint:
    """Return the checkpoint at ``path``, or one of a pipeline's denoiser, for these images."""
    from ocm import checkpoints

    if (path / "model_index.json").exists():
        model = checkpoints.load_denoiser(path, place)
        base = checkpoints.Checkpoint(
            model, images.shape, images.levels, images.name, data_options=images.options
        )
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
        base = replace(base, data=images.name, levels=images.levels, data_options=images.options)
    if base.denoiser.takes_labels and images.train_labels is None:
        raise ValueError(f"--denoiser takes class labels, and --data {data} has none")
    return base


def encoded(images: Images, vae: Path, place: Any) -> Images:
    """Return the data set as latents of the autoencoder in the folder ``vae``."""
    from ocm.integrations.latents import load_autoencoder

    autoencoder = load_autoencoder(vae, place)
    return replace(
        images,
        train=_encode(autoencoder, images.train),
        test=_encode(autoencoder, images.test),
    )


def _encode(autoencoder: Any, images: Tensor | ArrowImages) -> Tensor:
    """Return latents, of so many images at a time that only latents fill the memory."""
    import torch

    from ocm.integrations.latents import encode

    firsts = range(0, len(images), _IMAGES_AT_ONCE)
    return torch.cat(
        [
            encode(autoencoder, images[first : first + _IMAGES_AT_ONCE], sample_offset=first)
            for first in firsts
        ]
    )


def images_for(
    loaded: Checkpoint,
    data: str | None,
    vae: Path | None = None,
    image_size: int | None = None,
    *,
    progress: bool = False,
) -> Images:
    """Return the data set of a checkpoint, or another of the same shape.

    Args:
        loaded: The checkpoint.
        data: Name of another data set, or None.
        vae: Autoencoder of a model of latents.
        image_size: Side of the images that it encodes.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If its images are of another shape, or there is no autoencoder for latents.
    """
    from ocm import data as datasets

    if loaded.x0_range is None and vae is None:
        raise ValueError("--vae must be given, since this is a model of latents")
    if vae is None and image_size is not None:
        raise ValueError(f"--image-size {image_size} is for --vae; the model has its own size")
    options: Any = loaded.data_options if data is None else {}
    images = datasets.load(
        data or loaded.data,
        image_size=loaded.image_shape[-1] if vae is None else image_size,
        progress=progress,
        **options,
    )
    if vae is not None:
        images = encoded(images, vae, loaded.denoiser.device)
    if images.shape != loaded.image_shape:
        raise ValueError(
            f"the checkpoint takes images of shape {loaded.image_shape}, but those of --data "
            f"{images.name} have {images.shape}"
        )
    return images
