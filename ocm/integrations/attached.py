"""One line that turns a denoiser into one with a covariance: ``model = ocm.attach(unet)``.

The model that :func:`attach` returns is one of diffusers: pipelines save, load and move it. Its
output has twice the channels of x_t: what the backbone predicts, and the ratio of Var[x0 | x_t] to
the unit of its :class:`ocm.Parameterisation`, from the same pass through the backbone.

    scheduler = model.scheduler(pipeline.scheduler)
    pipeline = DDPMPipeline(unet=model, scheduler=scheduler)
    images = pipeline(num_inference_steps=10).images

``from_pretrained`` of such a pipeline logs that it expected a ``UNet2DModel``, and works.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ocm.checkpoints.weights import CheckpointError, load_weights
from ocm.covariances.learned.heads import HEADS, make_head
from ocm.covariances.learned.optimal import OptimalCovarianceMatching
from ocm.covariances.learned.parameterisation import PAPER, Parameterisation
from ocm.diffusion.architectures import ARCHITECTURES, architecture_of
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of, rebuilt
from ocm.diffusion.schedules import Schedule, linear
from ocm.integrations.flow_scheduler import OCMFlowScheduler
from ocm.integrations.gaussian_steps import CovarianceScheduler
from ocm.integrations.scheduler import LEARNED, OCMDDIMScheduler, OCMScheduler


class CovarianceModel(ModelMixin, ConfigMixin):
    """A diffusers backbone with a covariance head; made by :func:`attach` or ``from_pretrained``.

    ``config`` holds the backbone's entries too, as pipelines read them, except that
    ``out_channels`` is the 2C of this model. The model is saved as one file of weights and one of
    configuration.

    Args:
        backbone_class: Name of the backbone's class in diffusers.
        backbone_config: Its configuration.
        head_class: Name of the head's class in :mod:`ocm.covariances.learned.heads`.
        head_config: Its arguments.
        data_std: Of the head's :class:`ocm.Parameterisation`; None for infinity.
        positive: Of the same.
        backbone: The backbone itself, in place of one with random weights.
        head: The head itself.

    Raises:
        ValueError: If a class is not known.
    """

    __module__ = "ocm"  # where pipelines look for it, in a process that imports ocm alone

    # Modules, which are saved as weights.
    ignore_for_config = ["backbone", "head"]  # noqa: RUF012, as diffusers declares it

    @register_to_config
    def __init__(
        self,
        backbone_class: str,
        backbone_config: Mapping[str, Any],
        head_class: str,
        head_config: Mapping[str, Any],
        data_std: float | None = None,
        positive: bool = False,
        backbone: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if backbone_class not in ARCHITECTURES or head_class not in HEADS:
            raise ValueError(
                f"backbone_class must be one of {', '.join(ARCHITECTURES)} and head_class one of "
                f"{', '.join(HEADS)}, got {backbone_class!r} and {head_class!r}"
            )
        if backbone is None:
            backbone = getattr(diffusers, backbone_class).from_config(dict(backbone_config))
        self.backbone: Any = backbone
        self.head: nn.Module = HEADS[head_class](**head_config) if head is None else head

    @property
    def config(self) -> Any:
        """The backbone's configuration, and this model's own."""
        backbone = _public(self.backbone.config)
        out_channels = {"out_channels": 2 * backbone["in_channels"]}
        return FrozenDict(backbone | out_channels | dict(self._internal_dict))

    @property
    def parameterisation(self) -> Parameterisation:
        """What the head's output means."""
        return Parameterisation.from_json(self._internal_dict)

    def forward(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the prediction and the ratio of the variance, by one pass through the backbone.

        The head reads detached features: its gradients do not reach the backbone.

        Args:
            sample: x_t, shape (B, C, ...).
            timestep: diffusers' timestep t - 1 in 0 .. N-1: a number, or a tensor of shape (),
                (1,) or (B,).
            class_labels: Class of each sample, for a backbone that takes them.
            return_dict: Whether to return an output with ``sample``, shape (B, 2C, ...), rather
                than a tuple.

        Raises:
            ValueError: If the timesteps are neither one nor one for each sample.
        """
        architecture = architecture_of(self.backbone)
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timesteps) not in (1, len(sample)):
            raise ValueError(
                f"timestep must be one, or one for each of {len(sample)} samples, got "
                f"{len(timesteps)}"
            )
        prediction, features = architecture.call_with_features(
            self.backbone, sample, timesteps.expand(len(sample)), class_labels
        )
        ratio = self.parameterisation.ratio(self.head(features))
        both = torch.cat([prediction, ratio.to(prediction)], dim=1)
        return UNet2DOutput(both) if return_dict else (both,)

    def denoiser(self, schedule: Schedule | Any, prediction_type: str | None = None) -> Denoiser:
        """Return the backbone as a denoiser, frozen, for :func:`ocm.sample` and training.

        Args:
            schedule: A :class:`ocm.Schedule`, or a scheduler of diffusers.
            prediction_type: What the backbone predicts; None for what the scheduler says, and
                "epsilon" for a schedule.
        """
        if not isinstance(schedule, Schedule):
            if prediction_type is None:
                prediction_type = prediction_type_of(schedule)
            schedule = from_scheduler(schedule)
        return Denoiser(self.backbone, schedule, prediction_type or "epsilon").freeze()

    def covariance(
        self, schedule: Schedule | Any, prediction_type: str | None = None, **options: Any
    ) -> OptimalCovarianceMatching:
        """Return the covariance, for :func:`ocm.train_head` and :func:`ocm.sample`.

        Args:
            schedule: As in :meth:`denoiser`.
            prediction_type: As in :meth:`denoiser`.
            options: Fields of :class:`ocm.OptimalCovarianceMatching`: ``num_probes``, ``mode``.
        """
        denoiser = self.denoiser(schedule, prediction_type)
        return OptimalCovarianceMatching(denoiser, self.head, self.parameterisation, **options)

    def scheduler(self, scheduler: Any, **options: Any) -> CovarianceScheduler:
        """Return a scheduler like the given one that knows the unit of this model's variance.

        Args:
            scheduler: The scheduler that the backbone came with, or its saved configuration.
            options: Other arguments of the class that is returned, such as ``max_last_noise``.

        Returns:
            An :class:`ocm.OCMFlowScheduler` for one of flow matching, an
            :class:`ocm.OCMDDIMScheduler` for a DDIM scheduler, and an :class:`ocm.OCMScheduler` for
            the others that have betas. The variance is this model's, where the scheduler would
            take one of the backbone's ("learned_range") in its place.

        Raises:
            ValueError: If the scheduler is of another path, its noise levels are not those of its
                timesteps, or an option is none of the class's.
        """
        theirs = rebuilt(scheduler)
        fitting: type[CovarianceScheduler] = OCMScheduler
        if from_scheduler(theirs).name == "flow":
            fitting = OCMFlowScheduler
        elif "DDIM" in type(theirs).__name__:
            fitting = OCMDDIMScheduler
        given: dict[str, Any] = {"data_std": self._internal_dict["data_std"]}
        if theirs.config.get("variance_type") in LEARNED:
            given["variance_type"] = "fixed_small"
        made, unused = fitting.from_config(
            scheduler, return_unused_kwargs=True, **(given | options)
        )
        unknown = sorted(options.keys() & unused.keys())
        if unknown:
            raise ValueError(
                f"options must be arguments of {fitting.__name__}, got {', '.join(unknown)}"
            )
        return made  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> Any:
        """Load a model that ``save_pretrained`` wrote; the arguments are those of diffusers.

        Raises:
            ValueError: If the file lacks a weight or has one too many, where diffusers would warn
                and leave random weights.
        """
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path} holds the weights of another model: "
                    f"{problem} {sorted(map(str, info[problem]))[:3]}"
                )
        return (model, info) if wants_info else model


def attach(
    model: Any,
    head: nn.Module | str | os.PathLike[str] | None = None,
    *,
    kind: str = "simple",
    parameterisation: Parameterisation = PAPER,
) -> CovarianceModel:
    """Return a diffusion model that states its covariance beside its prediction.

    Args:
        model: ``UNet2DModel`` or ``DiTTransformer2DModel``, which becomes a part of what is
            returned.
        head: A trained head of :mod:`ocm.covariances.learned.heads`, moved to the device and dtype
            of the model; or a safetensors file with its weights; or None for an untrained one,
            which states the unit itself (ratio 1) until :func:`ocm.train_head` has seen it.
        kind: The kind of head, "simple" or "residual", where ``head`` is a file or None.
        parameterisation: What the head's output means: that of its training. The
            :class:`ocm.OCMScheduler` needs its ``data_std`` (:meth:`CovarianceModel.scheduler`).

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If the model's or the head's class is unknown.
        CheckpointError: A ValueError, if the file cannot be read or is of another head.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",))
        >>> model = attach(unet)
        >>> model(torch.zeros(2, 3, 8, 8), 999).sample.shape
        torch.Size([2, 6, 8, 8])
        >>> model.scheduler(DDPMScheduler()).config.prediction_type
        'epsilon'
    """
    # The denoiser checks the model; its schedule plays no part in it.
    denoiser = Denoiser(model, linear())
    if isinstance(head, nn.Module):
        chosen: Any = head
    else:
        chosen = make_head(denoiser, kind)
        if head is not None:
            load_weights(chosen, Path(head))
    attached = CovarianceModel(
        backbone_class=type(model).__name__,
        backbone_config=_public(model.config),
        head_class=type(chosen).__name__,
        head_config=getattr(chosen, "config", {}),
        backbone=model,
        head=chosen.to(device=denoiser.device, dtype=next(model.parameters()).dtype),
        **parameterisation.to_json(),
    )
    evaluated: CovarianceModel = attached.eval()
    return evaluated


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a constructor takes of a configuration of diffusers."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
