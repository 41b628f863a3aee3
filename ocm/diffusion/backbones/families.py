"""The backbones of diffusers: how each family is called, and where its features are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocm.diffusion.backbones.architecture import Architecture, FunctionBackbone
from ocm.diffusion.backbones.wrappers import unwrapped


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
    name = type(backbone).__name__
    if isinstance(backbone, FunctionBackbone):
        return FUNCTION
    if name not in ARCHITECTURES:
        raise ValueError(
            f"backbone must be one of {', '.join(ARCHITECTURES)}, got {name}; for another pass "
            "architecture=ocm.Architecture(...), which says how it is called"
        )
    return ARCHITECTURES[name]
