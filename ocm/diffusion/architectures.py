"""How diffusers' backbones are called, and where a covariance head reads their features.

A head reads what enters a backbone's last output layer. An architecture that is not listed is one
more :class:`Architecture`, handed to :class:`ocm.Denoiser` or :func:`ocm.attach`. The heads that
fit one are in ``KINDS`` of :mod:`ocm.covariances.learned.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """What the project needs to know of a family of backbones.

    Attributes:
        class_name: The class of diffusers, as ``config.json`` names it.
        feature_layer: Name of the submodule whose input are the features: the normalisation
            before the last layer. None for a backbone that shows no features: no head reads it.
        call: From (backbone, x_t, the network's time of shape (B,), class labels or None) to the
            output, of the shape of x_t. Other conditions, such as ``encoder_hidden_states``, follow
            as keyword arguments where there are any (:meth:`ocm.Denoiser.condition`).
        num_classes: How many classes a backbone is trained with, or None for none.
        null_label: The label that stands for no class, or None.
    """

    class_name: str
    feature_layer: str | None
    call: Callable[..., Tensor]
    num_classes: Callable[[Any], int | None] = lambda backbone: None
    null_label: Callable[[Any], int | None] = lambda backbone: None

    def call_with_features(
        self, backbone: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, detached, the features that one evaluation went through.

        There are none without a feature layer; nor from a backbone that ``torch.compile`` compiled
        before this module had seen it, since compiled code passes by later hooks.
        """
        listener = self.listener(backbone)
        if listener is None:
            return self.call(backbone, x_t, time, labels, **conditions), None
        entered: list[Tensor] = []
        listener.entered = entered
        try:
            output = self.call(backbone, x_t, time, labels, **conditions)
        finally:
            listener.entered = None
        return output, entered[0].detach() if entered else None

    def required(self, features: Tensor | None) -> Tensor:
        """Return the features that an evaluation went through.

        Raises:
            ValueError: If there are none.
        """
        if features is not None:
            return features
        if self.feature_layer is None:
            raise ValueError(
                f"architecture must have a feature_layer for a head to read, got None for "
                f"{self.class_name!r}: the name of the layer of a module before its last one"
            )
        raise ValueError(
            f"backbone must not have been compiled and called before ocm saw it: nothing is heard "
            f"of its layer {self.feature_layer!r}; call torch.compiler.reset() once"
        )

    def listener(self, backbone: Any) -> _Listener | None:
        """Return what listens at the feature layer, and let it listen from the first call on.

        It stays, since to add a hook in each call would break the graph of ``torch.compile``.

        Raises:
            AttributeError: If there is no such layer.
        """
        if self.feature_layer is None:
            return None
        layer = unwrapped(backbone).get_submodule(self.feature_layer)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, _Listener):
                return hook
        listener = _Listener()
        layer.register_forward_pre_hook(listener)
        return listener


class _Listener:
    """Keeps what enters a layer while somebody listens; a class, so that modules can be copied."""

    entered: list[Tensor] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.entered is not None:
            self.entered.append(inputs[0])


class FunctionBackbone(nn.Module):
    """A function (x_t, time) -> output as a backbone, without parameters or features."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **conditions: Any) -> Tensor:
        """Return what the function returns."""
        return self.function(*args, **conditions)


def unwrapped(backbone: Any) -> Any:
    """Return the module inside of ``torch.compile``, DistributedDataParallel or peft's model.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> unwrapped(torch.compile(layer)) is layer
        True
    """
    while True:
        if isinstance(backbone, nn.parallel.DistributedDataParallel):
            backbone = backbone.module
        elif hasattr(backbone, "_orig_mod"):  # of torch.compile
            backbone = backbone._orig_mod
        elif hasattr(backbone, "get_base_model"):  # of peft
            backbone = backbone.get_base_model()
        else:
            return backbone


def device_of(backbone: nn.Module) -> torch.device:
    """Return where a backbone computes: where hooks take its weights, if it is offloaded.

    Example:
        >>> device_of(nn.Identity())
        device(type='cpu')
    """
    module = unwrapped(backbone)
    device = _device_of_hook(module)
    if device is None and hasattr(module, "_diffusers_hook"):  # its own offloading, by groups
        device = module.device
    if device is None:
        first = next(chain(module.parameters(), module.buffers()), None)
        device = torch.device("cpu") if first is None else first.device
    if device.type == "meta":
        device = next(filter(None, map(_device_of_hook, module.modules())), device)
    return device


def _device_of_hook(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    devices = (getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook]))
    return next((torch.device(device) for device in devices if device is not None), None)


def in_type_of(backbone: nn.Module, x: Tensor) -> Tensor:
    """Return x in the type of the backbone's weights, if that is half precision.

    Example:
        >>> in_type_of(nn.Linear(1, 1).bfloat16(), torch.zeros(1)).dtype
        torch.bfloat16
    """
    weights = (p.dtype for p in backbone.parameters() if p.is_floating_point())
    dtype = next(weights, x.dtype)
    return x.to(dtype) if dtype in (torch.float16, torch.bfloat16) else x


def has_adapters(backbone: nn.Module) -> bool:
    """Return whether peft's layers (LoRA and its kin) stand in place of some of its own.

    Example:
        >>> has_adapters(nn.Linear(1, 1))
        False
    """
    return any("base_layer" in module._modules for module in backbone.modules())


def _call(
    backbone: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    if labels is not None:
        conditions["class_labels"] = labels
    return _channels_of(x_t, backbone(x_t, time, **conditions))


def _call_dit(dit: Any, x_t: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "DiTTransformer2DModel needs a class label for each sample: pass "
            "condition=denoiser.condition(labels)"
        )
    return _call(dit, x_t, time, labels)


def _call_with_text(
    backbone: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
) -> Tensor:
    if conditions.get("encoder_hidden_states") is None:
        raise ValueError(
            f"{type(unwrapped(backbone)).__name__} needs the embedding of a text for each sample: "
            "pass condition=denoiser.condition(tensors={'encoder_hidden_states': embeddings})"
        )
    if labels is not None:
        conditions["class_labels"] = labels
    # By name, since some take the text second.
    return _channels_of(x_t, backbone(x_t, timestep=time, **conditions))


def _channels_of(x_t: Tensor, output: Any) -> Tensor:
    # A model that learned I-DDPM's variance beside the noise has twice the channels.
    sample: Tensor = output.sample
    return sample[:, : x_t.shape[1]]


def _num_class_embeds(unet: Any) -> int | None:
    count: int | None = unet.config.num_class_embeds
    return count


def _num_embeds_ada_norm(dit: Any) -> int | None:
    count: int | None = dit.config.num_embeds_ada_norm
    return count


UNET = Architecture("UNet2DModel", "conv_norm_out", _call, _num_class_embeds)
TEXT_UNET = Architecture(
    "UNet2DConditionModel", "conv_norm_out", _call_with_text, _num_class_embeds
)
DIT = Architecture(
    "DiTTransformer2DModel", "norm_out", _call_dit, _num_embeds_ada_norm, _num_embeds_ada_norm
)
PIXART = Architecture("PixArtTransformer2DModel", "norm_out", _call_with_text)

ARCHITECTURES = {
    architecture.class_name: architecture for architecture in (UNET, TEXT_UNET, DIT, PIXART)
}
# Of a plain function (x_t, time), and no features.
FUNCTION = Architecture("function", None, lambda backbone, x_t, time, labels: backbone(x_t, time))


def architecture_of(backbone: nn.Module) -> Architecture:
    """Return the architecture of a backbone, wrapped or not.

    Raises:
        ValueError: If its class is none of :data:`ARCHITECTURES`.

    Example:
        >>> architecture_of(nn.Linear(1, 1))    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: backbone must be one of UNet2DModel, ..., got Linear; ...
    """
    backbone = unwrapped(backbone)
    if isinstance(backbone, FunctionBackbone):
        return FUNCTION
    # fully_shard gives a module a class of its own, derived from what it was.
    names = [kind.__name__ for kind in type(backbone).__mro__]
    name = next((name for name in names if name in ARCHITECTURES), names[0])
    if name not in ARCHITECTURES:
        raise ValueError(
            f"backbone must be one of {', '.join(ARCHITECTURES)}, got {name}; for another pass "
            "architecture=ocm.Architecture(...), which says how it is called"
        )
    return ARCHITECTURES[name]
