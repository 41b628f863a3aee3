"""Reading checkpoints and the folders of diffusers; nothing is unpickled and nothing downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.layout import (
    DATA_COVARIANCE,
    DENOISER,
    DESCRIPTION,
    FORMAT,
    HEADS,
    TABLES,
    part_of,
)
from ocm.checkpoints.weights import CheckpointError, load_model, load_weights
from ocm.covariances import Analytic
from ocm.covariances.learned.heads import kinds_of
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.names import LEARNED
from ocm.diffusion.backbones.families import ARCHITECTURES, architecture_of
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of
from ocm.diffusion.schedules import SCHEDULES, Schedule, from_betas
from ocm.diffusion.tables import Table


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, frozen and in eval mode, onto ``device``.

    Raises:
        CheckpointError: A ValueError that names the file, if one is missing, truncated, of
            another format, or holds other weights than its model has.
    """
    directory = Path(path)
    file = directory / DESCRIPTION
    if is_pipeline(directory):
        raise CheckpointError(
            f"{directory} is a pipeline of diffusers, where a checkpoint is needed; `ocm train "
            f"--denoiser {directory} --out OTHER` makes one of it, with a head"
        )
    if not file.exists():
        raise CheckpointError(
            f"no checkpoint at {directory}: {file} is missing; `ocm train` writes one, and "
            "save_pretrained of diffusers a pipeline, with model_index.json"
        )
    description = _read_json(file)
    found = {name: description.get(name) for name in FORMAT}
    if found != FORMAT:
        raise CheckpointError(f"{file} must have {FORMAT}, got {found}")
    with _naming_entries_of(file):
        place = part_of(directory, description, DENOISER)
    backbone = load_backbone(place).to(device)
    with _naming_entries_of(file):
        schedule = _schedule(description["schedule"])
        denoiser = Denoiser(
            backbone,
            schedule,
            description["prediction_type"],
            data_covariance=_data_covariance(directory, description),
        ).freeze()
        channels, height, width = description["image_shape"]
        if channels != (known := architecture_of(backbone).channels(backbone)):
            raise ValueError(f"image_shape has {channels} channels, the denoiser beside it {known}")
        check_positive_int("levels", description["levels"])
        bounds = description["x0_range"]
        learned = {
            name: LEARNED[name](
                denoiser,
                _head(name, entry, denoiser),
                Parameterisation.from_json(entry["parameterisation"]),
            )
            for name, entry in description["learned"].items()
        }
        checkpoint = Checkpoint(
            denoiser,
            (channels, height, width),
            description["levels"],
            description["data"],
            learned,
            x0_range=None if bounds is None else (bounds[0], bounds[1]),
            num_calibration=description["num_calibration"],
            # Absent in earlier checkpoints.
            data_options=description.get("data_options", {}),
        )
    file = part_of(directory, description, TABLES)
    tables = _read_json(file)
    with _naming_entries_of(file):
        if "analytic" in tables:
            raise ValueError(
                "its analytic variances are those of an earlier version: remove the entry "
                '"analytic", and `ocm calibrate` fits them again'
            )
        scaled, weights = (
            {name: Table.from_json(table) for name, table in tables[kind].items()}
            for kind in ("scaled_variances", "calibrations")
        )
    for name, covariance in learned.items():
        load_weights(
            covariance.head, part_of(directory, description, f"{HEADS}/{name}.safetensors")
        )
        covariance.head.to(device).eval().requires_grad_(False)
    analytic = {name: Analytic(denoiser, table) for name, table in scaled.items()}
    return replace(checkpoint, analytic=analytic, calibrations=weights)


def _data_covariance(directory: Path, description: dict[str, Any]) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = part_of(directory, description, DATA_COVARIANCE)
    # Earlier checkpoints have the file where there is one, and do not say so.
    if not description.get("data_covariance", file.exists()):
        return None
    try:
        tensor: Tensor = load_file(file)["data_covariance"]
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{file} holds NaN or infinite values")
    return tensor


def load_denoiser(path: str | Path, device: torch.device | str = "cpu") -> Denoiser:
    """Read a frozen denoiser from any of the places one is kept.

    Args:
        path: A checkpoint of :func:`save`; a pipeline of diffusers as ``save_pretrained`` writes
            it, with a ``scheduler`` beside its ``unet`` or ``transformer``; all of them local.
        device: Where to put it.

    Raises:
        CheckpointError: A ValueError that names the file, as :func:`load`.
    """
    if not is_pipeline(path):
        return load(path, device).denoiser
    folder, schedule, prediction_type = pipeline_parts(path)
    return Denoiser(load_backbone(folder).to(device), schedule, prediction_type).freeze()


def is_pipeline(path: str | Path) -> bool:
    """Return whether ``path`` is a pipeline, as ``save_pretrained`` of diffusers writes it."""
    return (Path(path) / "model_index.json").is_file()


def pipeline_parts(path: str | Path) -> tuple[Path, Schedule, str]:
    """Return the folder of a pipeline's backbone, its schedule, and what the backbone predicts.

    Raises:
        CheckpointError: A ValueError that names the file, if a part is missing or damaged.
    """
    config_file = Path(path) / "scheduler" / "scheduler_config.json"
    config = _read_json(config_file)
    with _naming_entries_of(config_file):
        schedule = from_scheduler(config)
    for part in ("unet", "transformer"):
        if (folder := Path(path) / part).is_dir():
            return folder, schedule, prediction_type_of(config)
    raise CheckpointError(f"{path} must hold a folder unet or transformer")


def load_backbone(directory: str | Path) -> Any:
    """Read a backbone that ``save_pretrained`` wrote, with exactly the weights of its model.

    Raises:
        CheckpointError: A ValueError that names the file.
    """
    import diffusers

    directory = Path(directory)
    name = _read_json(directory / "config.json").get("_class_name")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{directory} must hold one of {', '.join(ARCHITECTURES)}, got {name!r}"
        )
    return load_model(getattr(diffusers, name), directory)


def _schedule(entry: dict[str, Any]) -> Schedule:
    if "betas" in entry:
        return from_betas(entry["betas"], str(entry["name"]))
    return SCHEDULES[entry["name"]](entry["num_timesteps"], **entry.get("options", {}))


def _head(name: str, entry: dict[str, Any], denoiser: Denoiser) -> nn.Module:
    """Return the head of an entry, if it is one that the denoiser's architecture would make."""
    wanted = entry["head"], entry["config"]
    fitting = [make(denoiser) for make in kinds_of(denoiser).values()]
    made = [(type(head).__name__, vars(head)["config"]) for head in fitting]
    if wanted not in made:
        raise ValueError(
            f"learned.{name} must be of the denoiser beside it, one of {made}, got {wanted}"
        )
    return fitting[made.index(wanted)]


@contextmanager
def _naming_entries_of(file: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} lacks or misstates an entry: {reason}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(record).__name__}")
    return record
