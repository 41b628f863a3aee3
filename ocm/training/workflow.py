"""A checkpoint from a data set: a denoiser, or one that exists, and the heads of covariances."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances import LearnedCovariance, MaximumLikelihood
from ocm.covariances.learned.heads import make_head
from ocm.covariances.learned.parameterisation import PAPER, Parameterisation
from ocm.covariances.names import LEARNED
from ocm.data import Images
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import SCHEDULES
from ocm.training.loop import mean_of_last
from ocm.training.objectives import train_denoiser, train_head
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet

_NUM_TIMESTEPS = 1000
# What networks of a path predict, where that is not the noise.
_USUAL = {"flow": "flow_prediction", "edm": "edm", "trigflow": "trigflow"}
# Images that tell the variance of the data.
_TELLING = 1000
# Most images that are kept from training where no number is given.
_MAX_HELD_BACK = 1000


@dataclass(frozen=True)
class NewDenoiser:
    """A denoiser to be trained.

    Attributes:
        training: Settings of its loop.
        width: Channels of the U-Net, a multiple of 8.
        schedule: Name of the path, of 1000 timesteps.
        prediction_type: What it predicts; None for what the path's family does.
        hold_out: Training images, the last ones, that nothing is trained on; None for a tenth, at
            most 1000.
        class_conditional: Whether it takes the classes of the images.
    """

    training: TrainingSettings
    width: int = 32
    schedule: str = "cosine"
    prediction_type: str | None = None
    hold_out: int | None = None
    class_conditional: bool = False


@dataclass(frozen=True)
class NewHeads:
    """Heads to be trained on a denoiser.

    Attributes:
        training: Settings of each of their loops.
        names: Names of :data:`ocm.covariances.names.LEARNED`.
        kind: "simple" or "residual".
        parameterisation: "positive": bounded units, those of Gaussian data of the images' standard
            deviation, and a variance above zero; "preconditioned": these units alone; "paper": the
            papers'.
        target_probes: Probes in each target of OCM.
        forward_mode: Whether OCM's targets come from forward mode.
        start_from: A head of the checkpoint, whose weights and units those of ``ml`` start from.
        x0_range: Where the data lie; None for data without bounds.
        seed: Seed of their weights.
    """

    training: TrainingSettings
    names: tuple[str, ...] = ("ml",)
    kind: str = "residual"
    parameterisation: str = "positive"
    target_probes: int = 1
    forward_mode: bool = False
    start_from: str | None = None
    x0_range: tuple[float, float] | None = (-1.0, 1.0)
    seed: int = 0


def train_checkpoint(
    images: Images,
    start: NewDenoiser | Checkpoint,
    heads: NewHeads,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = True,
    replace_other: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Train a denoiser, unless there is one, and heads for it.

    Args:
        images: The data set.
        start: A denoiser to train, or a checkpoint: its denoiser and other heads are kept, and
            calibrations of heads that are trained anew are not.
        heads: The heads to train.
        out: Whose folder ``training`` keeps the states from which an interrupted training goes on.
        device: Where a new denoiser is trained.
        resume: Whether to go on from such states.
        replace_other: Whether those of other settings are removed, in place of an error.
        tensorboard: Whether to log for TensorBoard, into these folders.
        progress: Whether to show progress bars.

    Returns:
        The checkpoint, which is not written, and the settings and losses as JSON values.

    Raises:
        ValueError: If no images are left to train on, or there are no classes for a
            class-conditional denoiser, or none of the head that another is to start from.
    """
    began = time.perf_counter()
    loop: dict[str, Any] = {
        "resume": resume,
        "replace_other": replace_other,
        "tensorboard": tensorboard,
        "progress": progress,
    }
    kept = start.num_calibration if isinstance(start, Checkpoint) else start.hold_out
    if kept is None:
        kept = min(len(images.train) // 10, _MAX_HELD_BACK)
    if not 0 <= kept < len(images.train):
        raise ValueError(
            f"hold_out must be below {len(images.train)}, the training images, got {kept}"
        )
    num_classes = None
    if isinstance(start, NewDenoiser) and start.class_conditional:
        num_classes = images.num_classes
        if images.train_labels is None:
            raise ValueError(
                f"class_conditional must be False for data {images.name!r}, which have no classes; "
                "name their column by label_column"
            )
    shown = images.first(len(images.train) - kept)
    record: dict[str, Any] = {"data": images.name, "data_options": dict(images.options)}
    if isinstance(start, Checkpoint):
        base = start
    else:
        unet = small_unet(
            images.shape, width=start.width, seed=start.training.seed, num_classes=num_classes
        )
        schedule = SCHEDULES[start.schedule](_NUM_TIMESTEPS)
        kind = start.prediction_type or _USUAL.get(start.schedule, "epsilon")
        denoiser = Denoiser(unet.to(device), schedule, kind)
        losses = train_denoiser(
            denoiser,
            shown.train,
            start.training,
            labels=None if num_classes is None else shown.train_labels,
            directory=out / "training" / "denoiser",
            **loop,
        )
        base = Checkpoint(
            denoiser,
            images.shape,
            images.levels,
            images.name,
            num_calibration=kept,
            data_options=images.options,
        )
        record["denoiser"] = asdict(start.training) | {
            "width": start.width,
            "schedule": start.schedule,
            "prediction_type": kind,
            "num_classes": num_classes,
        }
        record["denoiser_loss"] = mean_of_last(losses)
    base = replace(base, denoiser=_knowing_its_data(base.denoiser, shown))
    learned, head_losses = dict(base.learned), {}
    for name in dict.fromkeys(heads.names):
        learned[name] = _untrained(name, base, images, heads)
        origin = f" from {heads.start_from}" if name == "ml" and heads.start_from else ""
        losses = train_head(
            learned[name],
            shown.train,
            heads.training,
            labels=shown.train_labels if base.denoiser.takes_labels else None,
            conditions=shown.train_conditions,
            null_conditions=shown.null_conditions,
            name=f"{name} head{origin}",  # a state goes on from the same
            directory=out / "training" / name,
            **loop,
        )
        head_losses[name] = mean_of_last(losses)
    tables = {name: table for name, table in base.calibrations.items() if name not in head_losses}
    record |= {
        "head": asdict(heads.training)
        | {"target_probes": heads.target_probes, "parameterisation": heads.parameterisation},
        "head_loss": head_losses,
        "trained_on": len(shown.train),
        "seconds": round(time.perf_counter() - began, 2),
    }
    return replace(base, learned=learned, calibrations=tables), record


def _knowing_its_data(denoiser: Denoiser, images: Images) -> Denoiser:
    """Return the denoiser with variances of its data, where x_N does not tell them."""
    N = denoiser.schedule.num_timesteps
    if denoiser.data_covariance is not None or denoiser.schedule.has_signal(N):
        return denoiser
    return replace(denoiser, data_covariance=images.train[:_TELLING].var(dim=0))


def _untrained(name: str, base: Checkpoint, images: Images, heads: NewHeads) -> LearnedCovariance:
    """Return a learned covariance whose units are those of these images, but for the papers'."""
    # Latents have no bounds, and no grey levels either.
    of_bound = {
        "levels": None if heads.x0_range is None else images.levels,
        "x0_range": heads.x0_range,
    }
    if name == "ml" and heads.start_from is not None:
        if heads.start_from not in base.learned:
            raise ValueError(
                f"start_from must be a head of the checkpoint, {', '.join(base.learned) or 'none'}"
                f", got {heads.start_from!r}"
            )
        start = MaximumLikelihood.of(base.learned[heads.start_from], **of_bound)
        return replace(start, head=copy.deepcopy(start.head))
    units = PAPER
    if heads.parameterisation != "paper":
        std = images.train[:_TELLING].std().item()
        units = Parameterisation(round(std, 4), positive=heads.parameterisation == "positive")
    options: dict[str, Any] = {}
    if name == "ocm":
        mode = "jvp" if heads.forward_mode else "vjp"
        options = {"num_probes": heads.target_probes, "mode": mode}
    elif name == "ml":
        options = of_bound
    head = make_head(base.denoiser, heads.kind, seed=heads.seed)
    return LEARNED[name](base.denoiser, head, units, **options)
