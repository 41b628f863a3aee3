"""``ocm info``: what a checkpoint or a pipeline holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ocm.cli import options

if TYPE_CHECKING:
    from torch import nn

    from ocm.checkpoints.checkpoint import Checkpoint


def info(
    checkpoint: options.ModelPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Say what a checkpoint or a pipeline of diffusers holds, covariances included."""
    import torch

    from ocm.cli.inputs import model_at

    found = described(model_at(checkpoint, torch.device("cpu")))
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    found = {"checkpoint": str(checkpoint), **found, "size": f"{size / 1e6:.1f} MB"}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = _lines(value) or ["none"]
        typer.echo(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            typer.echo(f"{'':<{width}}  {line}")


def described(loaded: Checkpoint) -> dict[str, Any]:
    """Return what is to be said of a checkpoint, as JSON values by name."""
    from ocm.checkpoints.catalogue import available
    from ocm.covariances.names import label

    denoiser, schedule = loaded.denoiser, loaded.denoiser.schedule
    low_high = "latents" if loaded.x0_range is None else "in [{:g}, {:g}]".format(*loaded.x0_range)
    shape = " x ".join(map(str, loaded.image_shape))
    time = "continuous" if schedule.is_continuous else "whole"
    return {
        "denoiser": _network(denoiser.backbone),
        "predicts": denoiser.prediction_type,
        "path": f"{schedule.name}, N = {schedule.num_timesteps}, {time} timesteps",
        "images": f"{shape}, {low_high}, {loaded.levels} grey levels",
        "classes": "yes" if denoiser.takes_labels else "no",
        "data": loaded.data or "not named",
        "kept from training": f"{loaded.num_calibration} images",
        "heads": {
            name: f"{label(name)}: {_network(learned.head)}"
            for name, learned in loaded.learned.items()
        },
        "fitted": {
            name: f"{len(a.scaled_variances.values)} timesteps"
            for name, a in loaded.analytic.items()
        },
        "calibrated": {
            name: f"{len(table.values)} timesteps" for name, table in loaded.calibrations.items()
        },
        "covariances": available(loaded),
    }


def _network(network: nn.Module) -> str:
    weights = list(network.parameters())
    types = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    count = sum(weight.numel() for weight in weights)
    return f"{type(network).__name__}, {count:,} parameters, {', '.join(types)}"


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}: {said}" for name, said in value.items()]
    return [", ".join(value)] if isinstance(value, list) else [str(value)]
