"""One line that turns a denoiser into one with a covariance: ``model = ocm.attach(unet)``.

The model that :func:`attach` returns is one of diffusers: pipelines save, load and move it, and
call it as they call its backbone. Its output is twice as long as x_t in dimension 1: what the
backbone predicts, and the ratio of Var[x0 | x_t] to the unit of its :class:`ocm.Parameterisation`,
from the same pass through the backbone. For images and videos these are twice the channels; for
the tokens of Flux, Qwen-Image and LTX-Video twice the tokens, laid out alike in both halves::

    scheduler = model.scheduler(pipeline.scheduler)
    pipeline = DDPMPipeline(unet=model, scheduler=scheduler)
    images = pipeline(num_inference_steps=10).images

Text-to-image and video work alike, ``StableDiffusion3Pipeline(transformer=model,
scheduler=scheduler, ...)``: what they condition on passes through, and guidance combines both
halves of the output by its weights. ``guidance_rescale`` must stay at 0, since it would mix the
halves; Qwen-Image's guidance rescales every token, the prediction's as it always does, and the
variance's by their own norm. ``from_pretrained`` of such a pipeline logs that it expected another
class of model, and works.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ocm.checkpoints.entries import CheckpointError, read_json
from ocm.checkpoints.weights import check_built, load_weights, weight_files
from ocm.covariances.learned.heads import HEADS, make_head
from ocm.covariances.learned.optimal import OptimalCovarianceMatching
from ocm.covariances.learned.parameterisation import BOUNDED, Parameterisation
from ocm.diffusion.backbones.architecture import Architecture, grid_of, packed
from ocm.diffusion.backbones.families import architecture_of
from ocm.diffusion.backbones.wrappers import (
    class_of,
    has_adapters,
    in_type_of,
    is_sharded,
    unwrapped,
)
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of, rebuilt
from ocm.diffusion.schedules import Schedule, linear
from ocm.integrations.flow_scheduler import OCMFlowScheduler
from ocm.integrations.gaussian_steps import CovarianceScheduler
from ocm.integrations.scheduler import LEARNED, OCMDDIMScheduler, OCMScheduler


class CovarianceModel(ModelMixin, ConfigMixin, CacheMixin):
    """A diffusers backbone with a covariance head; made by :func:`attach` or ``from_pretrained``.

    ``config`` holds the backbone's entries too, as pipelines read them, except that
    ``out_channels`` is that of the prediction alone: pipelines drop a variance that is told there.
    The model is saved as one file of weights and one of configuration.

    Args:
        backbone_class: Name of the backbone's class in diffusers.
        backbone_config: Its configuration.
        head_class: Name of the head's class in :mod:`ocm.covariances.learned.heads`.
        head_config: Its arguments.
        data_std: Of the head's :class:`ocm.Parameterisation`; None for infinity.
        positive: Of the same.
        backbone: The backbone itself, in place of one with random weights.
        head: The head itself.
        has_own_architecture: Whether it is called in a way of its own, which is not saved.
        architecture: That way.

    Raises:
        ValueError: If a class is not known.

    Example:
        >>> import torch, ocm
        >>> from diffusers import DDPMScheduler
        >>> from ocm.training.small_unet import small_unet
        >>> model = ocm.attach(small_unet((1, 8, 8), width=8))
        >>> covariance = model.covariance(DDPMScheduler())    # for ocm.train_head
        >>> ocm.sample(covariance.denoiser, covariance, (2, 1, 8, 8), steps=3).shape
        torch.Size([2, 1, 8, 8])
        >>> model(torch.zeros(2, 1, 8, 8), 999).sample.chunk(2, dim=1)[1].shape    # the ratio
        torch.Size([2, 1, 8, 8])
    """

    __module__ = "ocm"  # where pipelines look for it, in a process that imports ocm alone

    # Modules, which are saved as weights, and what is not saved.
    ignore_for_config = ["backbone", "head", "architecture"]  # noqa: RUF012, as diffusers has it
    # Loaded in half precision, a model keeps the digits of its variances.
    _keep_in_fp32_modules = ["head"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        backbone_class: str,
        backbone_config: Mapping[str, Any],
        head_class: str,
        head_config: Mapping[str, Any],
        data_std: float | None = None,
        positive: bool = False,
        has_own_architecture: bool = False,
        backbone: nn.Module | None = None,
        head: nn.Module | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__()
        known: Any = getattr(diffusers, backbone_class, None)
        is_known = isinstance(known, type) and issubclass(known, ModelMixin)
        if (backbone is None and not is_known) or head_class not in HEADS:
            raise ValueError(
                f"backbone_class must be one of diffusers and head_class one of {', '.join(HEADS)},"
                f" got {backbone_class!r} and {head_class!r}"
            )
        if backbone is None:
            backbone = known.from_config(dict(backbone_config))
        Parameterisation.from_json({"data_std": data_std, "positive": positive})
        self.backbone: Any = backbone
        self.head: nn.Module = HEADS[head_class](**head_config) if head is None else head
        self._given_architecture = architecture
        # Found once, since the graph of torch.compile does not hold the search.
        self._architecture = None if has_own_architecture else architecture_of(backbone)
        self._keep_in_fp32_modules = _kept_in_float32(class_of(backbone))

    @property
    def config(self) -> Any:
        """The backbone's configuration, and this model's own."""
        config = _config_of(self.backbone)
        if config.get("out_channels") == 2 * config.get("in_channels", 0):
            config["out_channels"] = config["in_channels"]
        return FrozenDict(config | dict(self._internal_dict))

    @property
    def architecture(self) -> Architecture:
        """How the backbone is called, and where the head reads.

        Raises:
            ValueError: If it is one of its own, and was not given to ``from_pretrained``.
        """
        architecture: Architecture | None = self._given_architecture or self._architecture
        if architecture is None:
            raise ValueError(
                "architecture must be given to from_pretrained, that of ocm.attach: it is not saved"
            )
        return architecture

    @property
    def parameterisation(self) -> Parameterisation:
        """What the head's output means."""
        return Parameterisation.from_json(self._internal_dict)

    def forward(
        self,
        sample: Tensor | None = None,
        timestep: float | Tensor | None = None,
        *further: Any,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        hidden_states: Tensor | None = None,
        **conditions: Any,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the prediction and the ratio of the variance, by one pass through the backbone.

        The head reads detached features: its gradients do not reach the backbone.

        Args:
            sample: x_t as the backbone takes it, shape (B, C, ...) or tokens (B, n, C); a backbone
                in half precision is shown it in that.
            timestep: What the backbone is told of the time: a number, or a tensor of shape (), (1,)
                or (B,), or of one for each token.
            further: What the backbone takes third, by place: class labels, or a text's embedding.
            class_labels: Class of each sample, for a backbone that takes them.
            return_dict: Whether to return an output with ``sample``, twice as long as x_t in
                dimension 1, rather than a tuple; both in the type of ``sample``.
            hidden_states: x_t by the name that transformers have for it.
            conditions: What else the backbone takes, ``encoder_hidden_states`` say.

        Raises:
            ValueError: If x_t or the timestep is missing, or timesteps are neither one nor one for
                each sample; or they are one for each of LTX-Video's tokens, by whose pipelines both
                halves of the output would be mixed.
        """
        x_t = hidden_states if sample is None else sample
        if x_t is None or timestep is None:
            raise ValueError("sample (or hidden_states) and timestep must be given")
        times = _on_device(timestep, x_t.device)
        if times.dim() < 2:
            times = times.reshape(-1)
            if len(times) not in (1, len(x_t)):
                raise ValueError(
                    f"timestep must be one, or one for each of {len(x_t)} samples, got {len(times)}"
                )
            times = times.expand(len(x_t))
        architecture, shown = self.architecture, in_type_of(self.backbone, x_t)
        is_packed = architecture.is_packed and self._given_architecture is None
        if is_packed and times.dim() > 1:
            raise ValueError(
                "timestep must be one for each sample, got one for each token: pipelines that "
                "start from an image take the output of LTX-Video apart, and its variance with it"
            )

        def call() -> Tensor:
            if self._given_architecture is not None:
                given = {name: value for name, value in conditions.items() if value is not None}
                labels = further[0] if further else class_labels
                return architecture.call(self.backbone, shown, times, labels, **given)
            given = conditions if class_labels is None else {"class_labels": class_labels}
            given = {**given, **conditions, "return_dict": False}
            if further:
                return _first(self.backbone(shown, times, *further, **given))
            # By name, since some take the text second.
            return _first(self.backbone(shown, timestep=times, **given))

        prediction, heard = architecture.heard(self.backbone, call)
        features, patch = architecture.required(heard), architecture.patch(unwrapped(self.backbone))
        if patch is not None:
            grid = (x_t.shape[1], *[1] * (len(patch) - 1))  # for a head that sees tokens alone
            features = features.unflatten(1, grid if is_packed else grid_of(x_t.shape, patch))
        ratio = self.parameterisation.ratio(self.head(features))
        if is_packed and patch is not None:
            ratio = packed(ratio, patch)
        # Without the variance that the backbone may state itself.
        both = torch.cat([prediction[:, : x_t.shape[1]].to(x_t), ratio.to(x_t)], dim=1)
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
        return Denoiser(
            self.backbone, schedule, prediction_type or "epsilon", self.architecture
        ).freeze()

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
        made: CovarianceScheduler
        made, unused = fitting.from_config(
            scheduler, return_unused_kwargs=True, **(given | options)
        )
        unknown = sorted(options.keys() & unused.keys())
        if unknown:
            raise ValueError(
                f"options must be arguments of {fitting.__name__}, got {', '.join(unknown)}"
            )
        return made

    def __getattr__(self, name: str) -> Any:
        """Return what the backbone has, for pipelines that look into it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "backbone" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.backbone, name)

    # Pipelines look for ``variant`` and others among its arguments.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save weights and configuration; the arguments are those of diffusers.

        Of a compiled or distributed backbone the module inside is saved.

        Raises:
            ValueError: If the backbone has adapters that are not merged, or is of no class of
                diffusers: it could not be loaded again.
        """
        called, backbone = self.backbone, unwrapped(self.backbone)
        if is_sharded(backbone):
            raise ValueError(
                "backbone must be whole to be saved, and fully_shard has spread it over processes: "
                "save model.head.state_dict(), and attach the head to a whole backbone"
            )
        if has_adapters(backbone):
            raise ValueError(
                "backbone has adapters, with which it cannot be loaded again: merge them by "
                "backbone.fuse_lora() and backbone.unload_lora(), or by merge_and_unload() of a "
                "peft model, and save then; save_lora_adapter() saves them on their own"
            )
        kind = class_of(backbone)
        if getattr(diffusers, kind.__name__, None) is not kind:
            raise ValueError(
                f"backbone must be of a class of diffusers to be loaded again, got {kind.__name__};"
                " save its state_dict() and that of the head yourself"
            )
        self.backbone = backbone
        try:
            super().save_pretrained(save_directory, **options)
        finally:
            self.backbone = called

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        architecture: Architecture | None = None,
        **options: Any,
    ) -> Any:
        """Load a model that ``save_pretrained`` wrote; the other arguments are those of diffusers.

        Args:
            pretrained_model_name_or_path: Where it is.
            architecture: That which :func:`attach` was given, which is not saved.
            options: Of diffusers, but that nothing is unpickled.

        Raises:
            CheckpointError: A ValueError that names the file, if it lacks a weight or has one too
                many, where diffusers would warn and leave random weights; or holds NaN, or a
                configuration of another model.
            ValueError: If ``use_safetensors`` is False.
        """
        if options.get("use_safetensors") is False:
            raise ValueError(
                "use_safetensors must be True, got False: weights are never unpickled, convert "
                "them to safetensors"
            )
        options["use_safetensors"] = True
        folder = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
        if folder.is_dir():
            config = read_json(folder / "config.json")
            files = weight_files(folder, options.get("variant"))
            check_built(lambda: cls.from_config(config), files, str(folder / "config.json"))
        wants_info = options.pop("output_loading_info", False)
        name = cls.load_config(pretrained_model_name_or_path, **options).get("backbone_class", "")
        kept = _kept_in_float32(getattr(diffusers, name, cls))
        # diffusers asks the class, and this one does not know its backbone's.
        kind: Any = type(cls.__name__, (cls,), {"_keep_in_fp32_modules": kept})
        parent: Any = super(CovarianceModel, kind)
        model, info = parent.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **options
        )
        model.__class__ = cls
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path} holds the weights of another model: "
                    f"{problem} {sorted(map(str, info[problem]))[:3]}"
                )
        if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
            raise CheckpointError(f"{pretrained_model_name_or_path} holds NaN or infinite weights")
        model._given_architecture = architecture
        return (model, info) if wants_info else model


def attach(
    model: Any,
    head: nn.Module | str | os.PathLike[str] | None = None,
    *,
    kind: str = "residual",
    parameterisation: Parameterisation = BOUNDED,
    architecture: Architecture | None = None,
) -> CovarianceModel:
    """Return a diffusion model that states its covariance beside its prediction.

    Args:
        model: One of :mod:`ocm.diffusion.backbones.families`, which becomes a part of what is
            returned, compiled or with adapters as it may be.
        head: A trained head of :mod:`ocm.covariances.learned.heads`, moved to the device of the
            model; or a safetensors file with its weights; or None for an untrained one,
            which states the unit itself (ratio 1) until :func:`ocm.train_head` has seen it. Its
            float32 stays, whatever the type of the model.
        kind: The kind of head, "simple" or "residual", where ``head`` is a file or None.
        parameterisation: What the head's output means: that of its training, for which the default
            is a good choice. The :class:`ocm.OCMScheduler` needs its ``data_std``
            (:meth:`CovarianceModel.scheduler`).
        architecture: How the model is called, for one that is not listed; then with a ``head``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If the model's or the head's class is unknown.
        CheckpointError: A ValueError, if the file cannot be read or is of another head.

    Example:
        >>> import torch, ocm
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",),
        ...     up_block_types=("UpBlock2D",))
        >>> model = ocm.attach(unet)
        >>> model(torch.zeros(2, 3, 8, 8), 999).sample.shape
        torch.Size([2, 6, 8, 8])
        >>> model.scheduler(DDPMScheduler()).config.prediction_type
        'epsilon'
    """
    # The denoiser checks the model; its schedule plays no part in it.
    denoiser = Denoiser(model, linear(), architecture=architecture)
    model = denoiser.backbone
    if isinstance(head, nn.Module):
        chosen: Any = head
    else:
        chosen = make_head(denoiser, kind)
        if head is not None:
            load_weights(chosen, Path(head))
    attached = CovarianceModel(
        backbone_class=class_of(model).__name__,
        backbone_config=_config_of(model),
        head_class=type(chosen).__name__,
        head_config=getattr(chosen, "config", {}),
        backbone=model,
        head=chosen.to(denoiser.device),
        has_own_architecture=architecture is not None,
        architecture=architecture,
        **parameterisation.to_json(),
    )
    evaluated: CovarianceModel = attached.eval()
    return evaluated


def _config_of(backbone: Any) -> dict[str, Any]:
    """Return what the constructor takes of the configuration of a model of diffusers."""
    config: Mapping[str, Any] = getattr(unwrapped(backbone), "config", {})
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _on_device(timestep: float | Tensor, device: torch.device) -> Tensor:
    """Return a timestep on a device; a single one is filled there, and nothing waits for it."""
    if not isinstance(timestep, Tensor):
        return torch.full((), timestep, device=device)
    if timestep.device.type == "cpu" and timestep.dim() == 0:
        return torch.full((), timestep.item(), dtype=timestep.dtype, device=device)
    return timestep.to(device)


def _first(output: tuple[Tensor, ...]) -> Tensor:
    return output[0]


def _kept_in_float32(backbone_class: Any) -> list[str]:
    """Return the modules that a model of diffusers keeps in float32, and the head."""
    kept = getattr(backbone_class, "_keep_in_fp32_modules", None) or []
    return list(dict.fromkeys(["head", *kept]))
