"""What the commands read: data sets, checkpoints and pipelines that fit each other."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch
    from torch import Tensor

    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images
    from ocm.diffusion.denoiser import Denoiser

# Arguments of a denoiser that are none of its conditions.
_OWN = {"sample", "hidden_states", "timestep", "class_labels", "return_dict"}


def model_at(
    path: Path, place: torch.device, size: int | tuple[int, int] | None = None
) -> Checkpoint:
    """Return the checkpoint at ``path``, or one of a pipeline of diffusers, which names no data.

    The head of an attached model is that of the covariance "ocm". Samples of a pipeline have the
    given size, or that of its configuration; they lie in [-1, 1] unless an autoencoder is part of
    it.
    """
    from ocm import checkpoints
    from ocm.checkpoints.entries import naming, read_json
    from ocm.diffusion.backbones.families import architecture_of

    if not checkpoints.is_pipeline(path):
        return checkpoints.load(path, place)
    folder, schedule, prediction_type = checkpoints.pipeline_parts(path)
    learned: dict[str, Any] = {}
    if read_json(folder / "config.json").get("_class_name") == "CovarianceModel":
        from ocm.integrations.attached import CovarianceModel

        model = CovarianceModel.from_pretrained(folder).to(place)
        learned = {"ocm": model.covariance(schedule, prediction_type)}
        denoiser = learned["ocm"].denoiser
    else:
        denoiser = checkpoints.load_denoiser(path, place)
    backbone, architecture = denoiser.backbone, architecture_of(denoiser.backbone)
    if len(architecture.patch(backbone) or (1, 1)) > 2:
        raise ValueError(
            f"{path} is a pipeline of videos, which the commands do not read: ocm.sample and "
            "ocm.train_head take their latents"
        )
    size = getattr(backbone.config, "sample_size", None) if size is None else size
    if size is None:
        raise ValueError(
            f"{folder / 'config.json'} must state sample_size, and does not: only `ocm train`, "
            "whose images have a size, takes such a pipeline; its checkpoint is sampled"
        )
    with naming(folder / "config.json"):
        height, width = (size, size) if isinstance(size, int) else size
        return checkpoints.Checkpoint(
            denoiser,
            (architecture.channels(backbone), height, width),
            levels=256,
            data="",
            learned=learned,
            x0_range=None if (path / "vae").is_dir() else (-1.0, 1.0),
        )


def conditions_of(
    file: Path | None, texts: Sequence[str] | None, encoders: Path | None, place: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the conditions in a file, or of texts by the encoders of a pipeline, and null ones."""
    from ocm.checkpoints import CheckpointError, is_pipeline
    from ocm.checkpoints.weights import load_tensors
    from ocm.integrations.texts import encode_by, without_null

    if file is not None:
        try:
            return without_null(load_tensors(file))
        except CheckpointError as error:
            raise CheckpointError(f"--conditions {error}") from error
    if texts is None:
        return {}, {}
    if encoders is None or not is_pipeline(encoders):
        raise ValueError(
            f"texts need a pipeline with text encoders, which {encoders} is not; give their "
            "embeddings by --conditions"
        )
    return without_null(encode_by(encoders, texts, place))


def conditioned(
    images: Images, file: Path | None, encoders: Path | None, place: torch.device
) -> Images:
    """Return the data set with conditions: those of a file, or of the captions."""
    import torch

    from ocm.data import Rows
    from ocm.images import ArrowImages

    values, nulls = conditions_of(file, images.train_captions, encoders, place)
    count, rows = len(images.train), torch.arange(len(images.train))
    if file is not None and isinstance(images.train, ArrowImages):
        count, rows = len(images.train.dataset), images.train.rows
    for name, value in values.items():
        if len(value) != count:
            raise ValueError(
                f"--conditions must have a row for each of {count} rows of the train split of "
                f"{images.name}, in the order of its files, got {len(value)} of {name!r}"
            )
    conditions = {name: Rows(value, rows) for name, value in values.items()}
    return replace(images, train_conditions=conditions, null_conditions=nulls)


def check_conditions(denoiser: Denoiser, conditions: Collection[str]) -> None:
    """Raise unless there are conditions for a denoiser that takes texts, and for no other."""
    from ocm.diffusion.backbones.wrappers import unwrapped
    from ocm.integrations.texts import takes_texts

    if takes_texts(denoiser) and not conditions:
        raise ValueError(
            "the denoiser takes texts, and none were given: name their column by --caption-column "
            "(ocm train) or themselves by --prompt (ocm sample), or give a file of --conditions"
        )
    if conditions and not takes_texts(denoiser):
        raise ValueError("texts and --conditions are for a denoiser that takes texts, got another")
    known = inspect.signature(unwrapped(denoiser.backbone).forward).parameters.keys() - _OWN
    for name in conditions:
        if name not in known:
            raise ValueError(
                f"--conditions must be arguments of the denoiser, of {', '.join(sorted(known))}, "
                f"got {name[:80]!r}"
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
    check_conditions(base.denoiser, images.train_conditions)
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
    from ocm.integrations.texts import takes_texts

    if takes_texts(loaded.denoiser):
        raise ValueError(
            "the denoiser takes texts: it is trained by `ocm train` and sampled by `ocm sample`, "
            "and neither calibrated nor evaluated here"
        )
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
