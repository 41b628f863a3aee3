"""Reading checkpoints and the folders of diffusers; nothing is unpickled and nothing downloaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocm.checkpoints.checkpoint import DATA_RULES, Checkpoint
from ocm.checkpoints.entries import (
    OBJECT,
    TEXT,
    CheckpointError,
    Rule,
    check_entries,
    check_names,
    naming,
    one_of,
    read_json,
)
from ocm.checkpoints.layout import (
    DATA_COVARIANCE,
    DENOISER,
    DESCRIPTION,
    FORMAT,
    HEADS,
    LAYOUT_RULES,
    TABLES,
    part_of,
)
from ocm.checkpoints.weights import load_model, load_tensors, load_weights
from ocm.covariances import Analytic
from ocm.covariances.learned.heads import kinds_of
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.names import LEARNED, NAMES, has_density, named
from ocm.diffusion.backbones.families import ARCHITECTURES, architecture_of
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of
from ocm.diffusion.predictions import check_prediction_type
from ocm.diffusion.schedules import SCHEDULES, Schedule, from_betas
from ocm.diffusion.tables import Table

_RULES = {
    **DATA_RULES,
    **LAYOUT_RULES,
    "schedule": OBJECT,
    "prediction_type": TEXT,
}
# Absent in earlier checkpoints.
_OPTIONAL = ("data_options", "data_covariance", "revision")
_HEAD_RULES = {"head": TEXT, "config": OBJECT, "parameterisation": OBJECT}
# The variance, and the scale and shift of a calibration.
_WIDTHS = {"scaled_variances": 1, "calibrations": 2}


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, frozen and in eval mode, onto ``device``.

    Raises:
        CheckpointError: A ValueError that names the file and the entry, if one is missing,
            truncated, of another format, or makes no sense, or there are other weights than the
            model has. No more is built than the files hold.
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
    description = read_json(file)
    found = {name: description.get(name) for name in FORMAT}
    if found != FORMAT:
        raise CheckpointError(f"{file} must have {FORMAT}, got {str(found)[:200]}")
    with naming(file):
        check_entries(description, _RULES, _OPTIONAL)
        check_prediction_type(description["prediction_type"])
        schedule = _schedule(description["schedule"])
        check_names("learned", description["learned"], LEARNED)
    shape: tuple[int, int, int] = tuple(description["image_shape"])
    bounds = description["x0_range"]
    backbone = load_backbone(part_of(directory, description, DENOISER)).to(device)
    with naming(file):
        denoiser = Denoiser(
            backbone,
            schedule,
            description["prediction_type"],
            data_covariance=_data_covariance(directory, description, shape),
        ).freeze()
        if shape[0] != (known := architecture_of(backbone).channels(backbone)):
            raise ValueError(f"image_shape has {shape[0]} channels, the denoiser beside it {known}")
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
            shape,
            description["levels"],
            description["data"],
            learned,
            x0_range=None if bounds is None else (bounds[0], bounds[1]),
            num_calibration=description["num_calibration"],
            data_options=description.get("data_options", {}),
        )
    file = part_of(directory, description, TABLES)
    tables = read_json(file)
    with naming(file):
        if "analytic" in tables:
            raise ValueError(
                "its analytic variances are those of an earlier version: remove the entry "
                '"analytic", and `ocm calibrate` fits them again'
            )
        fitting = {
            "scaled_variances": named("fitted"),
            "calibrations": [name for name in NAMES if has_density(name)],
        }
        check_entries(tables, dict.fromkeys(fitting, OBJECT))
        scaled, weights = (_tables(kind, tables[kind], fitting[kind]) for kind in fitting)
    for name, covariance in learned.items():
        load_weights(
            covariance.head, part_of(directory, description, f"{HEADS}/{name}.safetensors")
        )
        covariance.head.to(device).eval().requires_grad_(False)
    analytic = {name: Analytic(denoiser, table) for name, table in scaled.items()}
    return replace(checkpoint, analytic=analytic, calibrations=weights)


def _tables(kind: str, entries: Mapping[str, Any], names: Collection[str]) -> dict[str, Table]:
    check_names(kind, entries, names)
    tables = {name: Table.from_json(entry) for name, entry in entries.items()}
    for name, table in tables.items():
        if table.values.shape[1] != _WIDTHS[kind]:
            raise ValueError(
                f"{kind}.{name} must have {_WIDTHS[kind]} numbers in a row, got "
                f"{table.values.shape[1]}"
            )
        # Variances that were fitted from few images come out below 0, and are cut off in use.
        if kind == "calibrations" and bool((table.values < 0).any()):
            raise ValueError(
                f"{kind}.{name} must have a scale and a shift of at least 0, got "
                f"{table.values.min()}"
            )
    return tables


def _data_covariance(
    directory: Path, description: Mapping[str, Any], shape: tuple[int, int, int]
) -> Tensor | None:
    file = part_of(directory, description, DATA_COVARIANCE)
    # Earlier checkpoints have the file where there is one, and do not say so.
    if not description.get("data_covariance", file.exists()):
        return None
    with naming(file):
        tensors = load_tensors(file)
        check_names("tensors", tensors, ["data_covariance"])
        values = tensors["data_covariance"]
        features = math.prod(shape)
        if tuple(values.shape) not in ((), shape, (features, features)):
            raise ValueError(
                f"data_covariance must be a number, or of shape {shape} or {(features, features)}, "
                f"got {tuple(values.shape)}"
            )
        variances = values.diagonal() if values.dim() == 2 else values
        if not values.is_floating_point() or bool((variances < 0).any()):
            raise ValueError("data_covariance must hold variances of at least 0")
    return values


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
    config = read_json(config_file)
    with naming(config_file):
        schedule, prediction_type = from_scheduler(config), prediction_type_of(config)
        check_prediction_type(prediction_type)
    for part in ("unet", "transformer"):
        if (folder := Path(path) / part).is_dir():
            return folder, schedule, prediction_type
    raise CheckpointError(f"{path} must hold a folder unet or transformer")


def load_backbone(directory: str | Path) -> Any:
    """Read a backbone that ``save_pretrained`` wrote, with exactly the weights of its model.

    Raises:
        CheckpointError: A ValueError that names the file.
    """
    import diffusers

    directory = Path(directory)
    name = str(read_json(directory / "config.json").get("_class_name"))
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{directory} must hold one of {', '.join(ARCHITECTURES)}, got {name[:80]!r}"
        )
    return load_model(getattr(diffusers, name), directory)


def _schedule(entry: Mapping[str, Any]) -> Schedule:
    if "betas" in entry:
        check_entries(entry, {"name": TEXT, "betas": Rule("a list", lambda x: isinstance(x, list))})
        return from_betas(entry["betas"], entry["name"])
    check_entries(entry, {"name": one_of(SCHEDULES), "options": OBJECT}, ["options"])
    return SCHEDULES[entry["name"]](entry["num_timesteps"], **entry.get("options", {}))


def _head(name: str, entry: dict[str, Any], denoiser: Denoiser) -> nn.Module:
    """Return the head of an entry, if it is one that the denoiser's architecture would make."""
    check_entries(entry, _HEAD_RULES)
    wanted = entry["head"], entry["config"]
    fitting = [make(denoiser) for make in kinds_of(denoiser).values()]
    made = [(type(head).__name__, vars(head)["config"]) for head in fitting]
    if wanted not in made:
        raise ValueError(
            f"learned.{name} must be of the denoiser beside it, one of {made}, got {wanted}"
        )
    return fitting[made.index(wanted)]
