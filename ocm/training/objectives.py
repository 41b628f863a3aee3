"""What is trained: a denoiser, and the head of a covariance on a frozen one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.covariances.learned.base import LearnedCovariance
from ocm.diffusion.backbones.wrappers import has_adapters
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.noise import chosen, noisy
from ocm.diffusion.predictions import target
from ocm.diffusion.schedules import per_sample
from ocm.training.batches import ImageSource
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
        backbone: Called in place of the denoiser's own: the same, wrapped for training.
    """
    schedule = denoiser.schedule
    x_t, noise = noisy(schedule, x0, t, seed, sample_offset)
    condition = None if labels is None else denoiser.condition(labels)
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
    directory: Path | None = None,
    resume: bool = True,
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
        directory: Where the state is written, and read again after an interruption; None for
            nowhere.
        resume: Whether to go on from a state in ``directory``; if not, it is removed.
        tensorboard: Whether to log for TensorBoard, into ``directory``.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss is not finite.
        ValueError: If the backbone has adapters, and no parameter requires gradients.
    """

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, labels: Tensor | None, sample_offset: int
    ) -> Tensor:
        return denoising_loss(
            denoiser,
            x0,
            t,
            seed=settings.seed,
            sample_offset=sample_offset,
            labels=labels,
            backbone=module,
        )

    _choose_parameters(denoiser.backbone)
    losses = train(
        "denoiser",
        denoiser.backbone,
        loss,
        images,
        labels,
        denoiser.schedule.num_timesteps,
        settings,
        is_continuous=denoiser.schedule.is_continuous,
        device=denoiser.device,
        directory=directory,
        resume=resume,
        details=None if directory is None else _told_apart_by(denoiser, images),
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
    name: str = "head",
    directory: Path | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[float]:
    """Train the head of a covariance by its own loss, on the frozen denoiser.

    For a denoiser with classes and a label for none, a tenth of the labels are that one: guidance
    reads the head in both branches.

    Args:
        covariance: Its head is trained in place and left in eval mode, without gradients; its
            denoiser is frozen first.
        images: Training data, shape (n, ...), in [-1, 1] for images.
        settings: Length, batch size, learning rate and seed.
        labels: Class of each image, for a backbone that takes them.
        name: What the progress bar calls it.
        directory: As in :func:`train_denoiser`.
        resume: As in :func:`train_denoiser`.
        tensorboard: Whether to log for TensorBoard, into ``directory``.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    denoiser = covariance.denoiser

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, labels: Tensor | None, sample_offset: int
    ) -> Tensor:
        condition = None
        if labels is not None:
            if denoiser.null_label is not None:
                few = chosen(len(labels), settings.seed, sample_offset, labels.device)
                labels = torch.where(few, denoiser.null_label, labels)
            condition = denoiser.condition(labels)
        return covariance.loss(
            x0, t, seed=settings.seed, sample_offset=sample_offset, condition=condition, head=module
        )

    denoiser.freeze()
    covariance.head.requires_grad_(True)
    losses = train(
        name,
        covariance.head,
        loss,
        images,
        labels,
        denoiser.schedule.num_timesteps,
        settings,
        is_continuous=denoiser.schedule.is_continuous,
        device=denoiser.device,
        directory=directory,
        resume=resume,
        details=None if directory is None else _details(covariance, images),
        tensorboard=tensorboard,
        progress=progress,
    )
    covariance.head.eval().requires_grad_(False)
    return losses


def _details(covariance: LearnedCovariance, images: Tensor | ImageSource) -> dict[str, Any]:
    """Return what tells one training of a head from another beside its settings."""
    plain = {k: v for k, v in vars(covariance).items() if isinstance(v, (str, int, float))}
    return {
        "covariance": type(covariance).__name__,
        **plain,
        **covariance.parameterisation.to_json(),
        "probes": repr(getattr(covariance, "probes", None)),
        "denoiser": _digest(_weights(covariance.denoiser.backbone)),
        **_told_apart_by(covariance.denoiser, images),
    }


def _told_apart_by(denoiser: Denoiser, images: Tensor | ImageSource) -> dict[str, str]:
    """Return what tells one training from another beside its settings, as digests."""
    some = images[torch.arange(0, len(images), max(1, len(images) // 64))]
    return {
        "prediction_type": denoiser.prediction_type,
        "schedule": _digest([denoiser.schedule.log_alpha_bar]),
        "images": _digest([some]),
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


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        # Flat, since a tensor of no dimensions cannot be viewed as bytes.
        flat = tensor.detach().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
