"""What the commands read: data sets, checkpoints and pipelines that fit each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images


def model_at(
    path: Path, place: torch.device, size: int | tuple[int, int] | None = None
) -> Checkpoint:
    """Return the checkpoint at ``path``, or one of a pipeline of diffusers, which names no data.

    The head of an attached model is that of the covariance "ocm". Samples of a pipeline have the
    given size, or that of its configuration; they lie in [-1, 1] unless an autoencoder is part of
    it.
    """
    from ocm import checkpoints

    if not checkpoints.is_pipeline(path):
        return checkpoints.load(path, place)
    folder, schedule, prediction_type = checkpoints.pipeline_parts(path)
    learned: dict[str, Any] = {}
    if json.loads((folder / "config.json").read_text()).get("_class_name") == "CovarianceModel":
        from ocm.integrations.attached import CovarianceModel

        model = CovarianceModel.from_pretrained(folder).to(place)
        learned = {"ocm": model.covariance(schedule, prediction_type)}
        denoiser = learned["ocm"].denoiser
    else:
        denoiser = checkpoints.load_denoiser(path, place)
    config = denoiser.backbone.config
    size = config.sample_size if size is None else size
    if size is None:
        raise ValueError(f"{folder / 'config.json'} must state sample_size, got null")
    height, width = (size, size) if isinstance(size, int) else size
    return checkpoints.Checkpoint(
        denoiser,
        (config.in_channels, height, width),
        levels=256,
        data="",
        learned=learned,
        x0_range=None if (path / "vae").is_dir() else (-1.0, 1.0),
    )


def existing(path: Path, images: Images, hold_out: int | None, place: torch.device) -> Checkpoint:
    """Return the checkpoint at ``path``, or one of a pipeline's denoiser, for these images."""
    from ocm import checkpoints

    base = model_at(path, place, images.shape[1:])
    if checkpoints.is_pipeline(path):
        base = replace(base, num_calibration=hold_out or 0)
    if base.image_shape != images.shape:
        raise ValueError(
            f"--denoiser takes samples of shape {base.image_shape}, but those of --data "
            f"{images.name} have {images.shape}; a model of latents needs --vae"
        )
    if base.denoiser.takes_labels and images.train_labels is None:
        raise ValueError(f"--denoiser takes class labels, and --data {images.name} has none")
    kept = base.num_calibration if hold_out is None else hold_out
    if kept > base.num_calibration:
        raise ValueError(
            f"--hold-out must be at most {base.num_calibration}, the images that the denoiser in "
            f"{path} was not trained on, got {kept}"
        )
    return replace(
        base,
        data=images.name,
        levels=images.levels,
        data_options=images.options,
        num_calibration=kept,
    )


def encoded(images: Images, vae: Path, place: torch.device) -> Images:
    """Return the data set as latents of the autoencoder in the folder ``vae``."""
    from ocm.integrations.latents import encode, load_autoencoder

    autoencoder = load_autoencoder(vae, place)
    return replace(
        images, train=encode(autoencoder, images.train), test=encode(autoencoder, images.test)
    )


def images_for(
    loaded: Checkpoint,
    data: str | None,
    vae: Path | None = None,
    image_size: int | None = None,
    *,
    progress: bool = False,
) -> Images:
    """Return the data set of a checkpoint, or another of the same shape."""
    from ocm import data as datasets

    if not (data or loaded.data):
        raise ValueError("--data must be given: a pipeline does not say what it was trained on")
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
