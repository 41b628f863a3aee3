"""``ocm train``: a denoiser and the heads of its covariances."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ocm.cli.options import (
    Device,
    HeadName,
    Quiet,
    Seed,
    prepare_directory,
    resolve_device,
    write_json,
)

if TYPE_CHECKING:
    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images
    from ocm.diffusion.denoiser import Denoiser


class ScheduleName(str, Enum):
    """Noise schedules."""

    linear = "linear"
    cosine = "cosine"


class PredictionName(str, Enum):
    """What a denoiser predicts."""

    epsilon = "epsilon"
    sample = "sample"
    v_prediction = "v_prediction"


class HeadKind(str, Enum):
    """Sizes of heads."""

    simple = "simple"
    residual = "residual"


class ParameterisationName(str, Enum):
    """What the output of a head means."""

    paper = "paper"
    preconditioned = "preconditioned"
    positive = "positive"


class Precision(str, Enum):
    """Mixed precision."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


# Of a new denoiser, refused beside --denoiser.
_OF_A_NEW_DENOISER = ("width", "schedule", "prediction_type", "denoiser_steps", "learning_rate")


def train(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint.")] = Path("runs/train"),
    data: Annotated[
        str,
        typer.Option(
            help="'digits', a folder of images, a parquet file or a folder of them, or the name "
            "of a data set on the Hugging Face Hub."
        ),
    ] = "digits",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side to which images are cropped and resized.")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(help="Folder of an AutoencoderKL: train in its latent space."),
    ] = None,
    denoiser: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or pipeline of diffusers, whose denoiser is kept, so that only "
            "heads are trained; the heads of a checkpoint are kept too."
        ),
    ] = None,
    head: Annotated[
        list[HeadName] | None,
        typer.Option(help="Covariance whose head is trained; may be given several times."),
    ] = None,
    head_kind: Annotated[HeadKind, typer.Option(help="Size of the heads.")] = HeadKind.simple,
    parameterisation: Annotated[
        ParameterisationName,
        typer.Option(
            help="What the heads predict: the papers' units; those of Gaussian data of the same "
            "variance, bounded at every noise level; or these with a positive variance."
        ),
    ] = ParameterisationName.paper,
    width: Annotated[
        int | None,
        typer.Option(min=8, help="Channels of a new denoiser, a multiple of 8. Default: 32."),
    ] = None,
    schedule: Annotated[
        ScheduleName | None,
        typer.Option(help="Noise schedule of a new denoiser, N = 1000. Default: cosine."),
    ] = None,
    prediction_type: Annotated[
        PredictionName | None,
        typer.Option(help="What a new denoiser predicts. Default: epsilon, the noise."),
    ] = None,
    denoiser_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps for a new denoiser. Default: 900.")
    ] = None,
    head_steps: Annotated[int, typer.Option(min=1, help="Steps for each head.")] = 400,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images in a step, over all processes.")
    ] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of a new denoiser. Default: 0.001.")
    ] = None,
    head_learning_rate: Annotated[float, typer.Option(help="Peak rate of the heads.")] = 1e-2,
    target_probes: Annotated[
        int, typer.Option(min=1, help="Probes M in each target of the OCM head.")
    ] = 1,
    forward_mode: Annotated[
        bool,
        typer.Option(
            "--forward-mode", help="Targets of the OCM head by forward mode: less memory."
        ),
    ] = False,
    mixed_precision: Annotated[Precision, typer.Option(help="Type of the passes.")] = Precision.no,
    accumulation: Annotated[
        int, typer.Option(min=1, help="Micro-batches in which a process takes a step.")
    ] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Flip images at random.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between states from which training goes on.")
    ] = 200,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log into --out for TensorBoard.")
    ] = False,
    hold_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Training images, the last ones, that nothing is trained on, for `ocm "
            "calibrate`. Default: a tenth, at most 1000; with --denoiser those of its checkpoint.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start anew, whatever checkpoint or unfinished training --out holds.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a denoiser and the heads of its covariances, or heads for a denoiser that exists.

    A training that was interrupted goes on where it was when the same command is given again,
    without --overwrite. On several processes: `torchrun -m ocm train ...`, or accelerate launch.
    """
    from ocm import checkpoints
    from ocm import data as datasets
    from ocm.cli.inputs import encoded, existing
    from ocm.evaluation.environment import environment
    from ocm.training.loop import mean_of_last
    from ocm.training.objectives import train_denoiser, train_head
    from ocm.training.settings import TrainingSettings

    place = resolve_device(device)
    prepare_directory(out)
    if (out / "ocm.json").exists() and not overwrite:
        raise ValueError(f"--out {out} holds a checkpoint; choose another or pass --overwrite")
    loop: dict[str, Any] = {
        "resume": not overwrite,
        "tensorboard": tensorboard,
        "progress": not quiet,
    }
    given = {
        "width": width,
        "schedule": schedule,
        "prediction_type": prediction_type,
        "denoiser_steps": denoiser_steps,
        "learning_rate": learning_rate,
    }
    settings = TrainingSettings(
        denoiser_steps or 900,
        batch_size,
        1e-3 if learning_rate is None else learning_rate,
        seed=seed,
        gradient_accumulation_steps=accumulation,
        mixed_precision=mixed_precision.value,
        horizontal_flip=flip,
        checkpoint_every=checkpoint_every,
    )
    # Another seed: the heads see other noisy images than those the denoiser was fitted to.
    head_settings = replace(
        settings, num_steps=head_steps, learning_rate=head_learning_rate, seed=seed + 1
    )
    images = datasets.load(data, image_size=image_size)
    if vae is not None:
        images = encoded(images, vae, place)
    record: dict[str, Any] = {"data": data, "head": asdict(head_settings), "head_loss": {}}
    record["head"] |= {"target_probes": target_probes, "parameterisation": parameterisation.value}
    start = time.perf_counter()
    if denoiser is None:
        schedule_name = (schedule or ScheduleName.cosine).value
        kind = (prediction_type or PredictionName.epsilon).value
        apart = min(len(images.train) // 10, 1000) if hold_out is None else hold_out
        shown = images.train[: _rest(images, apart)]
        (out / "ocm.json").unlink(missing_ok=True)
        model = _new_denoiser(images, width or 32, schedule_name, kind, seed, place)
        losses = train_denoiser(
            model, shown, settings, directory=out / "training" / "denoiser", **loop
        )
        base = checkpoints.Checkpoint(
            model, images.shape, images.levels, images.name, num_calibration=apart
        )
        record["denoiser"] = asdict(settings) | {
            "width": width or 32,
            "schedule": schedule_name,
            "prediction_type": kind,
        }
        record["denoiser_loss"] = mean_of_last(losses)
    else:
        for option in _OF_A_NEW_DENOISER:
            value: Any = given[option]
            if value is not None:
                raise ValueError(
                    f"--{option.replace('_', '-')} {getattr(value, 'value', value)} is for a new "
                    "denoiser; leave it out with --denoiser"
                )
        base = existing(denoiser, images, data, place)
        (out / "ocm.json").unlink(missing_ok=True)
        if hold_out is not None:
            if (denoiser / "ocm.json").exists() and hold_out > base.num_calibration:
                raise ValueError(
                    f"--hold-out must be at most {base.num_calibration}, the images that the "
                    f"denoiser in {denoiser} was not trained on, got {hold_out}"
                )
            base = replace(base, num_calibration=hold_out)
        shown = images.train[: _rest(images, base.num_calibration)]
        record["denoiser"] = str(denoiser)
    if vae is not None:
        base = replace(base, x0_range=None)
    learned = dict(base.learned)
    trained = list(dict.fromkeys(name.value for name in head or [HeadName.ocm]))
    for name in trained:
        covariance = untrained(
            name,
            base,
            images,
            kind=head_kind.value,
            parameterisation=parameterisation.value,
            target_probes=target_probes,
            forward_mode=forward_mode,
            seed=seed,
        )
        losses = train_head(
            covariance,
            shown,
            head_settings,
            labels=_labels(images, len(shown)) if base.denoiser.takes_labels else None,
            name=f"{name} head",
            directory=out / "training" / name,
            **loop,
        )
        learned[name] = covariance
        record["head_loss"][name] = mean_of_last(losses)
    if os.environ.get("RANK", "0") != "0":  # one of several processes, and not the first
        return
    record["trained_on"] = len(shown)
    record["seconds"] = round(time.perf_counter() - start, 2)
    record["environment"] = environment(place)
    kept = {name: table for name, table in base.calibrations.items() if name not in trained}
    checkpoints.save(replace(base, learned=learned, calibrations=kept), out)
    write_json(out / "train.json", record)
    summary = ", ".join(f"{name} {loss:.4f}" for name, loss in record["head_loss"].items())
    typer.echo(f"head loss {summary} after {record['seconds']:.0f} s")
    typer.echo(f"checkpoint: {out}   settings and losses: {out / 'train.json'}")


def untrained(
    name: str,
    checkpoint: Checkpoint,
    images: Images,
    *,
    kind: str = "simple",
    parameterisation: str = "paper",
    target_probes: int = 1,
    forward_mode: bool = False,
    seed: int = 0,
) -> Any:
    """Return a learned covariance with an untrained head.

    Args:
        name: A name of :data:`ocm.checkpoints.checkpoint.LEARNED`.
        checkpoint: The denoiser.
        images: Whose standard deviation is the unit of a preconditioned head.
        kind: "simple" or "residual".
        parameterisation: "paper", "preconditioned" or "positive".
        target_probes: Probes in each target of OCM.
        forward_mode: Whether OCM's targets come from forward mode.
        seed: Seed of the head's weights.
    """
    from ocm.checkpoints.checkpoint import LEARNED
    from ocm.covariances.learned.heads import make_head
    from ocm.covariances.learned.parameterisation import PAPER, Parameterisation

    units = PAPER
    if parameterisation != "paper":
        std = images.train[:1000].std().item()
        units = Parameterisation(round(std, 4), positive=parameterisation == "positive")
    options: dict[str, Any] = {}
    if name == "ocm":
        options = {"num_probes": target_probes, "mode": "jvp" if forward_mode else "vjp"}
    head = make_head(checkpoint.denoiser, kind, seed=seed)
    return LEARNED[name](checkpoint.denoiser, head, units, **options)


def _new_denoiser(
    images: Images, width: int, schedule: str, prediction_type: str, seed: int, place: Any
) -> Denoiser:
    from ocm.diffusion.backbones import small_unet
    from ocm.diffusion.denoiser import Denoiser
    from ocm.diffusion.schedules import SCHEDULES

    unet = small_unet(images.shape, width=width, seed=seed).to(place)
    return Denoiser(unet, SCHEDULES[schedule](1000), prediction_type)


def _rest(images: Images, kept: int) -> int:
    """Return how many training images are left for training."""
    if not 0 <= kept < len(images.train):
        raise ValueError(
            f"--hold-out must be below {len(images.train)}, the training images, got {kept}"
        )
    return len(images.train) - kept


def _labels(images: Images, count: int) -> Any:
    return None if images.train_labels is None else images.train_labels[:count]
