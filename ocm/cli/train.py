"""``ocm train``: a denoiser and the heads of its covariances."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ocm.cli import options
from ocm.files import write_json

if TYPE_CHECKING:
    from ocm.checkpoints.checkpoint import Checkpoint

# Options that go with no --denoiser.
_OF_A_NEW_DENOISER = (
    *("width", "schedule", "prediction_type", "class_conditional"),
    *("denoiser_steps", "learning_rate"),
)


def train(
    context: typer.Context,
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
    image_column: Annotated[
        str | None, typer.Option(help="Column of the images. Default: the one that holds images.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of integer labels. Default: the one of classes.")
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Column of texts. The text encoders of the pipeline --denoiser encode them."
        ),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings in place of --caption-column: a safetensors file that holds a tensor "
            "for each argument of the denoiser, with a row for each row of the train split, in the "
            "order of its files. null.NAME, of shape (1, ...), is the embedding of no text."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most images of each split, after shuffling.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read images ahead of the steps.")
    ] = 0,
    vae: options.Vae = None,
    denoiser: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or pipeline of diffusers, with the denoiser to train heads for. The "
            "denoiser stays as it is; so do the other heads of a checkpoint."
        ),
    ] = None,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Spread the weights of --denoiser over the processes, if it is too large for one "
            "device.",
        ),
    ] = False,
    head: Annotated[
        list[options.HeadName] | None,
        typer.Option(
            help="Covariance whose head is trained; may be given several times. Default: ml, by "
            "the likelihood of chains of few steps."
        ),
    ] = None,
    head_kind: Annotated[
        Literal["simple", "residual"], typer.Option(help="Size of the heads: residual is larger.")
    ] = "residual",
    parameterisation: Annotated[
        Literal["paper", "preconditioned", "positive"],
        typer.Option(
            help="Units of what the heads predict. positive: a positive ratio to the posterior "
            "variance of Gaussian data, which is bounded at every noise level. preconditioned: the "
            "same ratio, of any sign. paper: the papers' units, which multiply errors by up to "
            "25000 where the noise is high."
        ),
    ] = "positive",
    start_from: Annotated[
        Literal["ocm", "npr"] | None,
        typer.Option(help="Head of --denoiser from which --head ml starts, in the same units."),
    ] = None,
    width: Annotated[
        int, typer.Option(min=8, help="Channels of a new denoiser, a multiple of 8.")
    ] = 32,
    schedule: Annotated[
        Literal["linear", "cosine", "vp", "flow", "edm", "trigflow"],
        typer.Option(
            help="Path from data to noise of a new denoiser, N = 1000: the discrete schedules "
            "linear and cosine, vp in continuous time, flow matching, EDM's or TrigFlow's."
        ),
    ] = "cosine",
    prediction_type: Annotated[
        Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "trigflow"] | None,
        typer.Option(
            help="What a new denoiser predicts. Default: that of the path's family; epsilon, the "
            "noise, for linear, cosine and vp."
        ),
    ] = None,
    class_conditional: Annotated[
        bool,
        typer.Option(
            "--class-conditional",
            help="Give a new denoiser the classes of the images. `ocm sample --label` names one.",
        ),
    ] = False,
    denoiser_steps: Annotated[int, typer.Option(min=1, help="Steps for a new denoiser.")] = 900,
    head_steps: Annotated[int, typer.Option(min=1, help="Steps for each head.")] = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images in a step, over all processes.")
    ] = 64,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of a new denoiser.")
    ] = 1e-3,
    head_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the heads.")
    ] = 3e-3,
    target_probes: Annotated[
        int, typer.Option(min=1, help="Probes M in each target of the OCM head.")
    ] = 1,
    forward_mode: Annotated[
        bool,
        typer.Option(
            "--forward-mode",
            help="Compute targets of the OCM head in forward mode, which takes less memory.",
        ),
    ] = False,
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"], typer.Option(help="Type that losses are computed in.")
    ] = "no",
    accumulation: Annotated[
        int, typer.Option(min=1, help="Micro-batches that a process splits a step into.")
    ] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Flip images at random.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between the saved states of a training.")
    ] = 200,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log losses into --out for TensorBoard.")
    ] = False,
    hold_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many training images to keep from training, for `ocm calibrate`: the last "
            "ones. Default: a tenth, at most 1000; with --denoiser, as its checkpoint did.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the checkpoint in --out, once the new one is whole, and the unfinished "
            "training of other settings there. That of the same settings goes on.",
        ),
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Train a denoiser and the heads of its covariances, or heads for a denoiser that exists.

    An interrupted training goes on where it was when you give the same command again. Ctrl-C and
    SIGTERM keep the step that they come in; a second Ctrl-C keeps the last state that was written.
    For several processes: `torchrun --nproc-per-node N -m ocm train ...`, or accelerate launch.
    """
    import torch

    from ocm import checkpoints
    from ocm import data as datasets
    from ocm.cli.inputs import conditioned, encoded, existing, model_at
    from ocm.evaluation.environment import environment
    from ocm.training import processes
    from ocm.training.settings import TrainingSettings
    from ocm.training.state import remove_states
    from ocm.training.workflow import NewDenoiser, NewHeads, train_checkpoint

    for option, rate in {"": learning_rate, "head-": head_learning_rate}.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"--{option}learning-rate must be positive and finite, got {rate}")
    if width % 8:
        raise ValueError(f"--width must be a multiple of 8, got {width}")
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is missing: pip install tensorboard")
    place = options.resolve_device(device)
    options.prepare_directory(out)
    if (out / "ocm.json").exists() and not overwrite:
        raise ValueError(
            f"--out {out} holds a finished checkpoint, whose learning rate ended at zero: it "
            "cannot go on. Heads are trained anew, and as long as --head-steps says, by `ocm train "
            f"--denoiser {out} --out OTHER --head NAME`; a denoiser by another --out; and "
            f"--overwrite replaces this one{_unfinished(out)}"
        )
    settings = TrainingSettings(
        denoiser_steps,
        batch_size,
        learning_rate,
        seed=seed,
        gradient_accumulation_steps=accumulation,
        mixed_precision=mixed_precision,
        horizontal_flip=flip,
        checkpoint_every=checkpoint_every,
        num_workers=workers,
    )
    heads = NewHeads(
        # Another seed: the heads see other noisy images than those the denoiser was fitted to.
        replace(settings, num_steps=head_steps, learning_rate=head_learning_rate, seed=seed + 1),
        tuple(name.value for name in head or [options.HeadName["ml"]]),
        head_kind,
        parameterisation,
        target_probes,
        forward_mode,
        start_from,
        None if vae is not None else (-1.0, 1.0),
        seed,
    )
    for name in _OF_A_NEW_DENOISER:
        source = context.get_parameter_source(name)
        if denoiser is not None and source is not None and source.name != "DEFAULT":
            raise ValueError(
                f"--{name.replace('_', '-')} {context.params[name]} is for a new denoiser; leave "
                "it out with --denoiser"
            )
    if denoiser is None and (caption_column or conditions):
        raise ValueError("--caption-column and --conditions are for a --denoiser that takes texts")
    if start_from is not None and (denoiser is None or "ml" not in heads.names):
        raise ValueError(
            f"--start-from {start_from} is for --head ml and a --denoiser with such a head"
        )
    if denoiser is None and shard:
        raise ValueError("--shard is for a --denoiser, which is frozen")
    if caption_column and conditions:
        raise ValueError("--caption-column and --conditions must not both be given")
    # Together from here on, so that none waits long for one that has ended.
    processes.check_fits(settings, processes.join(place))
    if denoiser is not None:
        _check_start(denoiser, start_from)
    images = datasets.load(
        data,
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
        caption_column=caption_column,
        limit=limit,
        progress=not quiet,
    )
    images = conditioned(images, conditions, denoiser, place)
    if vae is not None:
        images = encoded(images, vae, place)
    start: NewDenoiser | Checkpoint
    if denoiser is None:
        start = NewDenoiser(settings, width, schedule, prediction_type, hold_out, class_conditional)
    else:
        start = existing(denoiser, images, hold_out, torch.device("cpu") if shard else place)
        if shard:
            processes.shard(start.denoiser.backbone, place)
    try:
        trained, record = train_checkpoint(
            images,
            start,
            heads,
            out,
            device=place,
            replace_other=overwrite,
            tensorboard=tensorboard,
            progress=not quiet,
        )
        if os.environ.get("RANK", "0") != "0":  # one of several processes, and not the first
            return
        if denoiser is not None:
            record["denoiser"] = str(denoiser)
        if denoiser is not None and shard:  # it has not changed, and here is a part of it
            whole = model_at(denoiser, torch.device("cpu"), images.shape[1:]).denoiser.backbone
            trained = replace(trained, denoiser=replace(trained.denoiser, backbone=whole))
        if conditions is not None:
            record["conditions"] = str(conditions)
        if vae is not None:
            trained = replace(trained, x0_range=None)
        # First, since the training is finished once the checkpoint is there.
        write_json(out / "train.json", record | {"environment": environment(place)})
        checkpoints.save(trained, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(out)) from None
    # Those of other trainings are unfinished, and stay.
    for name in heads.names if denoiser is not None else ("denoiser", *heads.names):
        remove_states(out / "training" / name)
    summary = ", ".join(f"{name} {loss:.4f}" for name, loss in record["head_loss"].items())
    typer.echo(f"head loss {summary} after {record['seconds']:.0f} s")
    typer.echo(f"checkpoint: {out}   settings and losses: {out / 'train.json'}")


def _check_start(denoiser: Path, start_from: str | None) -> None:
    """Raise unless there is a model, and the head that another is to start from."""
    from ocm import checkpoints

    if checkpoints.is_pipeline(denoiser) or (
        start_from is None and (denoiser / "ocm.json").exists()
    ):
        return
    learned = checkpoints.load(denoiser).learned
    if start_from not in learned:
        raise ValueError(
            f"--start-from must be a head of --denoiser {denoiser}, which has "
            f"{', '.join(learned) or 'none'}, got {start_from}"
        )


def _steps_kept(out: Path) -> str:
    """Return which trainings have a state in ``out``, and of which step."""
    from ocm.training.state import newest_step

    steps = {path.name: newest_step(path) for path in sorted((out / "training").glob("*"))}
    return ", ".join(f"{name} at step {step}" for name, step in steps.items() if step is not None)


def _kept(out: Path) -> str:
    """Return what an interrupted training leaves in ``out``, and how to go on."""
    if kept := _steps_kept(out):
        return f"kept in {out / 'training'}: {kept}. The same command goes on"
    return "no state was written yet: the same command starts again"


def _unfinished(out: Path) -> str:
    """Return what to add to an error where ``out`` has an unfinished training too."""
    kept = _steps_kept(out)
    return f"; its unfinished training, {kept}, goes on with --overwrite too" if kept else ""
