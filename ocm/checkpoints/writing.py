"""Writing checkpoints: a directory of safetensors and JSON, whole at every moment."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.layout import (
    DATA_COVARIANCE,
    DENOISER,
    FORMAT,
    HEADS,
    TABLES,
    replacing_parts,
    settle,
)
from ocm.covariances import LearnedCovariance
from ocm.diffusion.backbones.wrappers import is_sharded
from ocm.diffusion.schedules import SCHEDULES, Schedule, from_betas
from ocm.files import naming_unwritten, write_json, write_tensors


def save(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "14MB",
) -> None:
    """Write a checkpoint to the directory ``path``, which is made if need be.

    Whenever the process is killed, or the disk is full, a checkpoint that was there before is still
    there, whole, or the new one is. What does not change is not touched.

    Args:
        checkpoint: What to write.
        path: The directory.
        dtype: What the denoiser's weights are rounded to on disk, torch.float16 say; None leaves
            them as they are. :func:`load` reads them into float32 all the same: heads that were
            trained before belong to the weights before.
        max_shard_size: Most bytes of a file of the denoiser's weights, as ``save_pretrained`` of
            diffusers takes it; by default small enough to be carried one by one.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If ``fully_shard`` has spread the denoiser over processes, its schedule could
            not be read again as it is, or a weight is NaN or infinite, in ``dtype``.
    """
    directory, denoiser = Path(path), checkpoint.denoiser
    if is_sharded(denoiser.backbone):
        raise ValueError(
            "the denoiser must be whole to be written, and fully_shard has spread it over "
            "processes: load it again, and replace it in the checkpoint by that"
        )
    backbone = denoiser.backbone if dtype is None else copy.deepcopy(denoiser.backbone).to(dtype)
    _check_finite(checkpoint, backbone)
    description: dict[str, Any] = {
        **FORMAT,
        "schedule": _schedule_entry(denoiser.schedule),
        "prediction_type": denoiser.prediction_type,
        "image_shape": checkpoint.image_shape,
        "levels": checkpoint.levels,
        "data": checkpoint.data,
        "data_options": dict(checkpoint.data_options),
        "data_covariance": denoiser.data_covariance is not None,
        "x0_range": checkpoint.x0_range,
        "num_calibration": checkpoint.num_calibration,
        "learned": {name: _head_entry(c) for name, c in checkpoint.learned.items()},
    }
    with replacing_parts(directory, description) as beside, naming_unwritten(directory):
        backbone.save_pretrained(beside / DENOISER, max_shard_size=max_shard_size)
        (beside / HEADS).mkdir()
        for name, covariance in checkpoint.learned.items():
            write_tensors(beside / HEADS / f"{name}.safetensors", covariance.head.state_dict())
        if denoiser.data_covariance is not None:
            values = torch.as_tensor(denoiser.data_covariance)
            write_tensors(beside / DATA_COVARIANCE, {"data_covariance": values})
        write_json(beside / TABLES, _tables(checkpoint))


def save_tables(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write only what was fitted by timestep into the directory of a checkpoint."""
    settle(Path(path))
    write_json(Path(path) / TABLES, _tables(checkpoint))


def _tables(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "scaled_variances": {
            name: c.scaled_variances.to_json() for name, c in checkpoint.analytic.items()
        },
        "calibrations": {name: table.to_json() for name, table in checkpoint.calibrations.items()},
    }


def _head_entry(covariance: LearnedCovariance) -> dict[str, Any]:
    head: Any = covariance.head
    return {
        "head": type(head).__name__,
        "config": head.config,
        "parameterisation": covariance.parameterisation.to_json(),
    }


def _check_finite(checkpoint: Checkpoint, backbone: nn.Module) -> None:
    """Raise unless all weights that are to be written are finite."""
    weights = {"denoiser": backbone.state_dict()}
    if (values := checkpoint.denoiser.data_covariance) is not None:
        weights["denoiser"]["data_covariance"] = torch.as_tensor(values)
    weights |= {f"head {name}": c.head.state_dict() for name, c in checkpoint.learned.items()}
    for owner, tensors in weights.items():
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"a checkpoint must hold finite weights, and {name} of the {owner} has NaN or "
                    f"infinity in {tensor.dtype}: nothing was written"
                )


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
