"""Checkpoints: a directory of safetensors and JSON; nothing is unpickled.

ocm.json                    what this is: schedule, data, learned covariances
denoiser/                   the backbone, as diffusers' save_pretrained writes it
heads/NAME.safetensors      the head of each learned covariance
tables.json                 numbers by timestep: analytic variances, calibrations
data_covariance.safetensors for paths without signal at N: the covariance of the data
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocm.checkpoints.weights import CheckpointError, load_model, load_weights
from ocm.covariances import Analytic, LearnedCovariance
from ocm.covariances.learned.heads import kinds_of
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.names import LEARNED
from ocm.diffusion.backbones.families import ARCHITECTURES, architecture_of
from ocm.diffusion.backbones.wrappers import is_sharded
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of
from ocm.diffusion.schedules import SCHEDULES, Schedule, from_betas
from ocm.diffusion.tables import Table

_DATA_COVARIANCE = "data_covariance.safetensors"
_FORMAT = {"format": "ocm-checkpoint", "version": 2}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained denoiser, with what was learned and fitted about its covariance.

    Attributes:
        denoiser: The denoiser; frozen when it was loaded.
        image_shape: (C, H, W) of a sample.
        levels: Grey levels of the images it was trained on.
        data: Name of the data set.
        learned: Covariances with a trained head, by name.
        analytic: Analytic covariances by name.
        calibrations: Weights of :class:`ocm.Calibrated` by the name of the covariance.
        x0_range: Where the data lie; None for data without bounds: latents.
        num_calibration: How many of the training images, the last ones, nothing was trained on:
            they are there for calibrations.
        data_options: Arguments of :func:`ocm.data.load` that give the same images again.
    """

    denoiser: Denoiser
    image_shape: tuple[int, int, int]
    levels: int
    data: str
    learned: Mapping[str, LearnedCovariance] = field(default_factory=dict)
    analytic: Mapping[str, Analytic] = field(default_factory=dict)
    calibrations: Mapping[str, Table] = field(default_factory=dict)
    x0_range: tuple[float, float] | None = (-1.0, 1.0)
    num_calibration: int = 0
    data_options: Mapping[str, str | int] = field(default_factory=dict)


def save(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "14MB",
) -> None:
    """Write a checkpoint to the directory ``path``, which is made if need be.

    Args:
        checkpoint: What to write.
        path: The directory.
        dtype: What the denoiser's weights are rounded to on disk, torch.float16 say; None leaves
            them as they are. :func:`load` reads them into float32 all the same: heads that were
            trained before belong to the weights before.
        max_shard_size: Most bytes of a file of the denoiser's weights, as ``save_pretrained`` of
            diffusers takes it; by default small enough to be carried one by one.

    Raises:
        ValueError: If ``fully_shard`` has spread the denoiser over processes.
    """
    from safetensors.torch import save_file

    directory, denoiser = Path(path), checkpoint.denoiser
    if is_sharded(denoiser.backbone):
        raise ValueError(
            "the denoiser must be whole to be written, and fully_shard has spread it over "
            "processes: load it again, and replace it in the checkpoint by that"
        )
    (directory / "heads").mkdir(parents=True, exist_ok=True)
    backbone = denoiser.backbone if dtype is None else copy.deepcopy(denoiser.backbone).to(dtype)
    # save_pretrained would leave the index of an earlier one, or its single file, beside its own.
    for file in (directory / "denoiser").glob("diffusion_pytorch_model.*"):
        file.unlink()
    backbone.save_pretrained(directory / "denoiser", max_shard_size=max_shard_size)
    description: dict[str, Any] = {
        **_FORMAT,
        "schedule": _schedule_entry(denoiser.schedule),
        "prediction_type": denoiser.prediction_type,
        "image_shape": checkpoint.image_shape,
        "levels": checkpoint.levels,
        "data": checkpoint.data,
        "data_options": dict(checkpoint.data_options),
        "x0_range": checkpoint.x0_range,
        "num_calibration": checkpoint.num_calibration,
        "learned": {},
    }
    (directory / _DATA_COVARIANCE).unlink(missing_ok=True)
    if denoiser.data_covariance is not None:
        values = torch.as_tensor(denoiser.data_covariance).contiguous()
        save_file({"data_covariance": values}, directory / _DATA_COVARIANCE)
    for name, covariance in checkpoint.learned.items():
        head: Any = covariance.head
        save_file(head.state_dict(), directory / "heads" / f"{name}.safetensors")
        description["learned"][name] = {
            "head": type(head).__name__,
            "config": head.config,
            "parameterisation": covariance.parameterisation.to_json(),
        }
    save_tables(checkpoint, directory)
    _write_json(directory / "ocm.json", description)


def save_tables(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write only what was fitted by timestep into the directory of a checkpoint."""
    tables = {
        "scaled_variances": {
            name: c.scaled_variances.to_json() for name, c in checkpoint.analytic.items()
        },
        "calibrations": {name: table.to_json() for name, table in checkpoint.calibrations.items()},
    }
    _write_json(Path(path) / "tables.json", tables)


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, frozen and in eval mode, onto ``device``.

    Raises:
        CheckpointError: A ValueError that names the file, if one is missing, truncated, of
            another format, or holds other weights than its model has.
    """
    directory = Path(path)
    file = directory / "ocm.json"
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
    found = {name: description.get(name) for name in _FORMAT}
    if found != _FORMAT:
        raise CheckpointError(f"{file} must have {_FORMAT}, got {found}")
    backbone = load_backbone(directory / "denoiser").to(device)
    with _naming_entries_of(file):
        schedule = _schedule(description["schedule"])
        denoiser = Denoiser(
            backbone,
            schedule,
            description["prediction_type"],
            data_covariance=_data_covariance(directory),
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
    file = directory / "tables.json"
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
        load_weights(covariance.head, directory / "heads" / f"{name}.safetensors")
        covariance.head.to(device).eval().requires_grad_(False)
    analytic = {name: Analytic(denoiser, table) for name, table in scaled.items()}
    return replace(checkpoint, analytic=analytic, calibrations=weights)


def _data_covariance(directory: Path) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / _DATA_COVARIANCE
    if not file.exists():
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


def _schedule_entry(schedule: Schedule) -> dict[str, Any]:
    if schedule.name in SCHEDULES:
        usual = SCHEDULES[schedule.name](schedule.num_timesteps, **schedule.options)
        if torch.equal(usual.log_alpha_bar, schedule.log_alpha_bar):
            entry = {"name": schedule.name, "num_timesteps": schedule.num_timesteps}
            return entry | ({"options": dict(schedule.options)} if schedule.options else {})
    if schedule.is_continuous:
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)} or discrete to be written, got the "
            f"path {schedule.name!r} of functions"
        )
    betas = [schedule.beta(t - 1, t) for t in range(1, schedule.num_timesteps + 1)]
    return {"name": schedule.name, "betas": betas}


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
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(record).__name__}")
    return record


def _write_json(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
