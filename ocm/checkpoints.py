"""Checkpoints: a directory of safetensors and JSON; nothing is unpickled.

ocm.json                    what this is: schedule, data, head
denoiser/                   the backbone, as diffusers' save_pretrained writes it
head.safetensors            the covariance head, if one was trained
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessdiag.checks import check_positive_int
from ocm.denoiser import Denoiser
from ocm.heads import CovarianceHead
from ocm.schedules import SCHEDULES

_FORMAT = "ocm-checkpoint"
_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the model it is asked for."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained denoiser, with its head if there is one.

    Attributes:
        denoiser: The denoiser; frozen when it was loaded.
        head: The covariance head, or None.
        image_shape: (C, H, W) of an image.
        levels: Grey levels of the images it was trained on.
        data: Name of the data set.
    """

    denoiser: Denoiser
    head: CovarianceHead | None
    image_shape: tuple[int, int, int]
    levels: int
    data: str


def save(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint to the directory ``path``, which is made if need be.

    Raises:
        ValueError: If the schedule is not one of :data:`ocm.schedules.SCHEDULES`.
    """
    from safetensors.torch import save_file

    directory = Path(path)
    schedule, head = checkpoint.denoiser.schedule, checkpoint.head
    if schedule.name not in SCHEDULES:
        raise ValueError(
            f"the schedule must be one of {', '.join(SCHEDULES)}, got {schedule.name!r}"
        )
    checkpoint.denoiser.unet.save_pretrained(directory / "denoiser")
    description: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "feature_layer": checkpoint.denoiser.feature_layer,
        "schedule": {"name": schedule.name, "num_timesteps": schedule.num_timesteps},
        "image_shape": list(checkpoint.image_shape),
        "levels": checkpoint.levels,
        "data": checkpoint.data,
        "head": None,
    }
    if head is not None:
        save_file(head.state_dict(), directory / "head.safetensors")
        description["head"] = {
            "in_channels": head.norm.num_channels,
            "out_channels": head.conv.out_channels,
            "num_groups": head.norm.num_groups,
        }
    (directory / "ocm.json").write_text(json.dumps(description, indent=2) + "\n")


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, frozen and in eval mode, onto ``device``.

    Raises:
        CheckpointError: A ValueError that names the file, if one is missing, truncated, of
            another format, or holds other weights than its model has.
    """
    directory = Path(path)
    file = directory / "ocm.json"
    description = _read_description(file)
    try:
        schedule_entry, head_entry = description["schedule"], description["head"]
        schedule = SCHEDULES[schedule_entry["name"]](schedule_entry["num_timesteps"])
        channels, height, width = (int(size) for size in description["image_shape"])
        head = None if head_entry is None else CovarianceHead(**head_entry)
        check_positive_int("levels", description["levels"])
        data = str(description["data"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} lacks or misstates an entry: {reason}") from error

    try:
        unet = _load_unet(directory / "denoiser").to(device)
        denoiser = Denoiser(unet, schedule, description["feature_layer"]).freeze()
    except KeyError as error:
        raise CheckpointError(f"{file} lacks an entry: {error!r}") from error
    _check_channels(file, "image_shape", channels, unet.config.in_channels)
    if head is not None:
        _load_weights(head, directory / "head.safetensors")
        _check_channels(file, "head.out_channels", head.conv.out_channels, channels)
        layer = unet.get_submodule(denoiser.feature_layer)
        _check_channels(file, "head.in_channels", head.norm.num_channels, layer.num_channels)
        head.to(device).eval().requires_grad_(False)
    return Checkpoint(denoiser, head, (channels, height, width), description["levels"], data)


def _check_channels(file: Path, name: str, got: int, expected: int) -> None:
    if got != expected:
        raise CheckpointError(
            f"{file} is of another model: {name} has {got} channels, the denoiser beside it "
            f"{expected}"
        )


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"no checkpoint at {file.parent}: {file} is missing; `ocm train` writes one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise CheckpointError(f'{file} is no checkpoint of ocm: "format" must be "{_FORMAT}"')
    if description.get("version") != _VERSION:
        raise CheckpointError(
            f"{file} has version {description.get('version')!r}, this ocm reads {_VERSION}"
        )
    return description


def _load_unet(directory: Path) -> Any:
    from diffusers import UNet2DModel

    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "_class_name" not in config:
        raise CheckpointError(f"{directory / 'config.json'} is no configuration of a model")
    if config.get("_class_name") != UNet2DModel.__name__:
        raise CheckpointError(
            f"{directory} must hold a {UNet2DModel.__name__}, got {config.get('_class_name')!r}"
        )
    try:
        unet = UNet2DModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'config.json'} makes no model: {error}") from error
    # Strictly, where from_pretrained leaves weights that it does not find at their random start.
    _load_weights(unet, directory / "diffusion_pytorch_model.safetensors")
    return unet


def _load_weights(module: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{file} is of another model: {error}") from error
    if not all(bool(torch.isfinite(weight).all()) for weight in module.parameters()):
        raise CheckpointError(f"{file} holds NaN or infinite weights")
