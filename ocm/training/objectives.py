"""What is trained: a denoiser, and the head of a covariance on a frozen one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.covariances.learned.base import LearnedCovariance
from ocm.diffusion.backbones.wrappers import has_adapters, is_part
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.noise import chosen, condition_of, noisy
from ocm.diffusion.predictions import target
from ocm.diffusion.schedules import per_sample
from ocm.training.batches import Conditions, ImageSource, rows_at
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    *,
    seed: int,
    sample_offset: int,
    labels: Tensor | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    backbone: nn.Module | None = None,
) -> Tensor:
    """Return the mean of (target - output(x_t, t))^2 (Ho, Jain and Abbeel, 2020).

    The target is the denoiser's ``prediction_type`` (:mod:`ocm.diffusion.predictions`).

    Args:
        denoiser: The denoiser in training.
        x0: Data, shape (B, ...).
        t: Timesteps in 1 .. N, int64 of shape (B,).
        seed: Seed of the noise.
        sample_offset: Number of samples that training has seen before these.
        labels: Class labels, for a backbone that takes them.
        conditions: Its further arguments by name, of shape (B, ...).
        backbone: Called in place of the denoiser's own: the same, wrapped for training.

    Returns:
        A number, shape (), differentiable for the parameters of the backbone.

    Raises:
        TypeError: If x0 is no floating-point tensor.
        ValueError: If there is not one timestep for each sample.

    Example:
        Noise of variance 1, predicted as 0:

        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.linear())
        >>> t = torch.full((16,), 500)
        >>> x0 = torch.zeros(16, 1, 8, 8)
        >>> loss = ocm.denoising_loss(denoiser, x0, t, seed=0, sample_offset=0)
        >>> abs(loss.item() - 1) < 0.2
        True
    """
    schedule = denoiser.schedule
    x_t, noise = noisy(schedule, x0, t, seed, sample_offset)
    condition = condition_of(denoiser, _by_name(labels, conditions))
    output = denoiser.output(x_t, t, condition=condition, backbone=backbone)
    alpha, sigma = (per_sample(scale, x0) for scale in (schedule.alpha(t), schedule.sigma(t)))
    wanted = target(denoiser.prediction_type, alpha, sigma, x0, noise, schedule.data_std)
    return functional.mse_loss(output, wanted)


def train_denoiser(
    denoiser: Denoiser,
    images: Tensor | ImageSource,
    settings: TrainingSettings,
    *,
    labels: Tensor | None = None,
    conditions: Conditions | None = None,
    null_conditions: Mapping[str, Tensor] | None = None,
    directory: Path | None = None,
    resume: bool = True,
    replace_other: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[float]:
    """Train the backbone to predict the noise, x0 or v, and freeze it.

    Where some of its parameters require gradients and others do not, as with adapters on a frozen
    model, those that do are trained; else all are.

    Args:
        denoiser: Its backbone is trained in place and left in eval mode, without gradients.
        images: Training data, shape (n, ...), in [-1, 1] for images.
        settings: Length, batch size, learning rate and seed.
        labels: Class of each image, for a backbone that takes them.
        conditions: Further arguments of the backbone by name, such as ``encoder_hidden_states``:
            a row for each image, in a tensor of shape (n, ...), which may be memory-mapped, or
            expanded where all rows are one. A name with a dot is an entry of a dictionary:
            "added_cond_kwargs.text_embeds".
        null_conditions: Those of no condition, shape (1, ...), the embedding of an empty text say:
            a tenth of the samples take them. "labels" may be among them; a network that drops
            labels by itself, as ``DiTTransformer2DModel`` does, needs none.
        directory: Where the state is written, and read again after an interruption; None for
            nowhere.
        resume: Whether to go on from a state in ``directory``; if not, it is removed.
        replace_other: Whether a state there that is damaged, or of another training, is removed, in
            place of an error.
        tensorboard: Whether to log for TensorBoard, into ``directory``.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss or its gradient is not finite.
        ValueError: If the backbone has adapters, and no parameter requires gradients; or conditions
            do not fit the images or each other.
        TrainingStateError: A ValueError, if the state in ``directory`` is damaged or of another
            training.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear())
        >>> images = torch.zeros(8, 1, 8, 8)
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> losses = ocm.train_denoiser(denoiser, images, settings, progress=False)
        >>> len(losses), any(p.requires_grad for p in denoiser.backbone.parameters())
        (2, False)
    """
    given = _by_name(labels, conditions)
    nulls = _checked(null_conditions or {}, given, denoiser)

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, rows: Mapping[str, Tensor], sample_offset: int
    ) -> Tensor:
        return denoising_loss(
            denoiser,
            x0,
            t,
            seed=settings.seed,
            sample_offset=sample_offset,
            conditions=_partly_null(rows, nulls, settings.seed, sample_offset),
            backbone=module,
        )

    _choose_parameters(denoiser.backbone)
    losses = train(
        "denoiser",
        denoiser.backbone,
        loss,
        images,
        given,
        denoiser.schedule.num_timesteps,
        settings,
        is_continuous=denoiser.schedule.is_continuous,
        device=denoiser.device,
        directory=directory,
        resume=resume,
        replace_other=replace_other,
        details=None if directory is None else _told_apart_by(denoiser, images, given, nulls),
        tensorboard=tensorboard,
        progress=progress,
    )
    denoiser.freeze()
    return losses


def train_head(
    covariance: LearnedCovariance,
    images: Tensor | ImageSource,
    settings: TrainingSettings,
    *,
    labels: Tensor | None = None,
    conditions: Conditions | None = None,
    null_conditions: Mapping[str, Tensor] | None = None,
    name: str = "head",
    directory: Path | None = None,
    resume: bool = True,
    replace_other: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[float]:
    """Train the head of a covariance by its own loss, on the frozen denoiser.

    A tenth of the samples take what stands for no condition, where there is such a thing, labels
    and all else alike: guidance reads the head in both branches.

    On several processes (``torchrun --nproc-per-node 8 script.py``) each takes a share of every
    batch, and the gradients of the head are averaged. The backbone may be sharded over them by
    ``torch.distributed.fsdp.fully_shard``, its blocks first and then itself, before it becomes a
    denoiser::

        torch.distributed.init_process_group()
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
            fully_shard(block)
        fully_shard(unet)
        denoiser = ocm.Denoiser(unet, schedule)

    The head is that of one process, to the rounding of sums.

    Args:
        covariance: Its head is trained in place and left in eval mode, without gradients; its
            denoiser is frozen first.
        images: Training data, shape (n, ...), in [-1, 1] for images.
        settings: Length, batch size, learning rate and seed.
        labels: Class of each image, for a backbone that takes them.
        conditions: As in :func:`train_denoiser`.
        null_conditions: As in :func:`train_denoiser`; that of labels is the denoiser's own by
            default.
        name: What the progress bar calls it.
        directory: As in :func:`train_denoiser`.
        resume: As in :func:`train_denoiser`.
        replace_other: As in :func:`train_denoiser`.
        tensorboard: Whether to log for TensorBoard, into ``directory``.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss or its gradient is not finite.
        ValueError: If conditions do not fit the images or each other.
        TrainingStateError: A ValueError, if the state in ``directory`` is damaged or of another
            training.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear())
        >>> covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser))
        >>> images = torch.zeros(8, 1, 8, 8)
        >>> settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
        >>> len(ocm.train_head(covariance, images, settings, progress=False))
        2
    """
    denoiser = covariance.denoiser
    given = _by_name(labels, conditions)
    none: dict[str, Tensor] = {}
    if "labels" in given and denoiser.null_label is not None:
        none["labels"] = torch.tensor([denoiser.null_label])
    nulls = _checked(none | dict(null_conditions or {}), given, denoiser)

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, rows: Mapping[str, Tensor], sample_offset: int
    ) -> Tensor:
        rows = _partly_null(rows, nulls, settings.seed, sample_offset)
        return covariance.loss(
            x0,
            t,
            seed=settings.seed,
            sample_offset=sample_offset,
            condition=condition_of(denoiser, rows),
            head=module,
        )

    denoiser.freeze()
    covariance.head.requires_grad_(True)
    losses = train(
        name,
        covariance.head,
        loss,
        images,
        given,
        denoiser.schedule.num_timesteps,
        settings,
        is_continuous=denoiser.schedule.is_continuous,
        device=denoiser.device,
        directory=directory,
        resume=resume,
        replace_other=replace_other,
        details=None if directory is None else _details(covariance, images, given, nulls),
        tensorboard=tensorboard,
        progress=progress,
    )
    covariance.head.eval().requires_grad_(False)
    return losses


def _by_name(labels: Tensor | None, conditions: Conditions | None) -> dict[str, Any]:
    return {**(conditions or {}), **({} if labels is None else {"labels": labels})}


def _checked(
    nulls: Mapping[str, Tensor], conditions: Conditions, denoiser: Denoiser
) -> dict[str, Tensor]:
    """Return what stands for no condition, on the denoiser's device, if it fits."""
    first = torch.tensor([0])
    for name, null in nulls.items():
        found = tuple(rows_at(conditions[name], first).shape) if name in conditions else None
        if found != tuple(null.shape):
            raise ValueError(
                f"null_conditions must be named as conditions are, and have the shape of a row of "
                f"them, {found or 'none'} for {name!r}, got {tuple(null.shape)}"
            )
    return {name: null.to(denoiser.device) for name, null in nulls.items()}


def _partly_null(
    rows: Mapping[str, Tensor], nulls: Mapping[str, Tensor], seed: int, sample_offset: int
) -> dict[str, Tensor]:
    """Return the rows, those of a tenth of the samples replaced."""
    replaced = dict(rows)
    for name, null in nulls.items():
        values = rows[name]
        few = chosen(len(values), seed, sample_offset, values.device)
        few = few.reshape(-1, *[1] * (values.dim() - 1))
        replaced[name] = torch.where(few, null.to(values), values)
    return replaced


def _details(
    covariance: LearnedCovariance,
    images: Tensor | ImageSource,
    conditions: Conditions,
    nulls: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return what tells one training of a head from another beside its settings."""
    known = vars(covariance).items()
    # As JSON gives them back.
    plain: dict[str, Any] = {k: list(v) for k, v in known if isinstance(v, tuple)}
    plain |= {k: v for k, v in known if isinstance(v, (str, int, float))}
    return {
        "covariance": type(covariance).__name__,
        **plain,
        **covariance.parameterisation.to_json(),
        "probes": repr(getattr(covariance, "probes", None)),
        "denoiser": _digest(_weights(covariance.denoiser.backbone)),
        **_told_apart_by(covariance.denoiser, images, conditions, nulls),
    }


def _told_apart_by(
    denoiser: Denoiser,
    images: Tensor | ImageSource,
    conditions: Conditions,
    nulls: Mapping[str, Tensor],
) -> dict[str, str]:
    """Return what tells one training from another beside its settings, as digests."""
    some = torch.arange(0, len(images), max(1, len(images) // 64))
    rows = {name: rows_at(conditions[name], some) for name in sorted(conditions)}
    rows |= {f"null.{name}": nulls[name] for name in sorted(nulls)}
    return {
        "prediction_type": denoiser.prediction_type,
        "schedule": _digest([denoiser.schedule.log_alpha_bar]),
        "images": _digest([images[some]]),
        **{f"conditions.{name}": _digest([values]) for name, values in rows.items()},
    }


def _choose_parameters(backbone: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        if has_adapters(backbone):
            raise ValueError(
                "denoiser must say which weights of a backbone with adapters are to be trained, "
                "and none requires gradients: call requires_grad_() on those of the adapter"
            )
        backbone.requires_grad_(True)


def _weights(backbone: nn.Module) -> list[Tensor]:
    """Return the tensors of a state, those that accelerate holds elsewhere too."""
    weights = backbone.state_dict()
    if any(weight.is_meta for weight in weights.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        stored = get_state_dict_offloaded_model(backbone)
        return [stored[name] for name in weights]
    return list(weights.values())


def _digest(tensors: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach()
        if is_part(values):  # all processes are here
            values = values.full_tensor()
        # Flat, since a tensor of no dimensions cannot be viewed as bytes.
        flat = values.cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
