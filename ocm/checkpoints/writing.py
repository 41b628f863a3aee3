"""Writing checkpoints: a directory of safetensors and JSON.

ocm.json                    what this is: schedule, data, learned covariances
denoiser/                   the backbone, as diffusers' save_pretrained writes it
heads/NAME.safetensors      the head of each learned covariance
tables.json                 numbers by timestep: analytic variances, calibrations
data_covariance.safetensors for paths without signal at N: the covariance of the data
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.backbones.wrappers import is_sharded
from ocm.diffusion.schedules import SCHEDULES, Schedule, from_betas
from ocm.files import replacing, write_json

DATA_COVARIANCE = "data_covariance.safetensors"
FORMAT = {"format": "ocm-checkpoint", "version": 2}


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
        ValueError: If ``fully_shard`` has spread the denoiser over processes, or its schedule
            could not be read again as it is.
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
        **FORMAT,
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
    (directory / DATA_COVARIANCE).unlink(missing_ok=True)
    if denoiser.data_covariance is not None:
        values = torch.as_tensor(denoiser.data_covariance).contiguous()
        with replacing(directory / DATA_COVARIANCE) as file:
            save_file({"data_covariance": values}, file)
    for name, covariance in checkpoint.learned.items():
        head: Any = covariance.head
        with replacing(directory / "heads" / f"{name}.safetensors") as file:
            save_file(head.state_dict(), file)
        description["learned"][name] = {
            "head": type(head).__name__,
            "config": head.config,
            "parameterisation": covariance.parameterisation.to_json(),
        }
    save_tables(checkpoint, directory)
    write_json(directory / "ocm.json", description)


def save_tables(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write only what was fitted by timestep into the directory of a checkpoint."""
    tables = {
        "scaled_variances": {
            name: c.scaled_variances.to_json() for name, c in checkpoint.analytic.items()
        },
        "calibrations": {name: table.to_json() for name, table in checkpoint.calibrations.items()},
    }
    write_json(Path(path) / "tables.json", tables)


def _schedule_entry(schedule: Schedule) -> dict[str, Any]:
    if schedule.name in SCHEDULES:
        usual = SCHEDULES[schedule.name](schedule.num_timesteps, **schedule.options)
        if _told_alike(usual, schedule) and torch.equal(
            usual.log_alpha_bar, schedule.log_alpha_bar
        ):
            entry = {"name": schedule.name, "num_timesteps": schedule.num_timesteps}
            return entry | ({"options": dict(schedule.options)} if schedule.options else {})
    if schedule.is_continuous:
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)} or discrete to be written, got the "
            f"path {schedule.name!r} of functions, or of a data_std or time of its own"
        )
    betas = [schedule.beta(t - 1, t) for t in range(1, schedule.num_timesteps + 1)]
    if not _told_alike(from_betas(betas), schedule):
        raise ValueError(
            "schedule must have data_std = 1 and time = t - 1 to be written by its betas, got "
            f"data_std = {schedule.data_std} and time(1) = {schedule.level(1).time}"
        )
    return {"name": schedule.name, "betas": betas}


def _told_alike(one: Schedule, other: Schedule) -> bool:
    """Return whether networks of two paths are told the same times and have the same unit."""
    places = torch.arange(1, one.num_timesteps + 1)
    return one.data_std == other.data_std and torch.equal(one.time(places), other.time(places))
