"""How diffusers' backbones are called, and where a covariance head reads their features.

A head reads what enters a backbone's last output layer. diffusers counts noise levels from 0, so
that timestep t here is t - 1 there. An architecture that is not listed is one more
:class:`Architecture`, handed to :class:`ocm.Denoiser`. The heads that fit one are in ``KINDS`` of
:mod:`ocm.covariances.learned.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """What the project needs to know of a family of backbones.

    Attributes:
        class_name: The class of diffusers, as ``config.json`` names it.
        feature_layer: Name of the submodule whose input are the features: the normalisation
            before the last layer.
        call: From (backbone, x_t, t - 1 of shape (B,), class labels or None) to the output, of the
            shape of x_t.
        num_classes: How many classes a backbone is trained with, or None for none.
        null_label: The label that stands for no class, or None.
    """

    class_name: str
    feature_layer: str
    call: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    num_classes: Callable[[Any], int | None] = lambda backbone: None
    null_label: Callable[[Any], int | None] = lambda backbone: None

    def call_with_features(
        self, backbone: Any, x_t: Tensor, level: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output and, detached, the features that one evaluation went through."""
        entered: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entered.append(inputs[0])

        hook = backbone.get_submodule(self.feature_layer).register_forward_pre_hook(note)
        try:
            output = self.call(backbone, x_t, level, labels)
        finally:
            hook.remove()
        return output, entered[0].detach()


def _call_unet(unet: Any, x_t: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
    output: Tensor = unet(x_t, level, class_labels=labels).sample
    return output


UNET = Architecture(
    "UNet2DModel", "conv_norm_out", _call_unet, lambda unet: unet.config.num_class_embeds
)


def _call_dit(dit: Any, x_t: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "DiTTransformer2DModel needs a class label for each sample: pass "
            "condition=denoiser.condition(labels)"
        )
    output: Tensor = dit(x_t, timestep=level, class_labels=labels).sample
    # A model that learned I-DDPM's variance beside the noise has twice the channels.
    return output[:, : x_t.shape[1]]


DIT = Architecture(
    "DiTTransformer2DModel",
    "norm_out",
    _call_dit,
    lambda dit: dit.config.num_embeds_ada_norm,
    lambda dit: dit.config.num_embeds_ada_norm,
)

ARCHITECTURES = {architecture.class_name: architecture for architecture in (UNET, DIT)}


def architecture_of(backbone: nn.Module) -> Architecture:
    """Return the architecture of a backbone.

    Raises:
        ValueError: If its class is none of :data:`ARCHITECTURES`.

    Example:
        >>> architecture_of(nn.Linear(1, 1))    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: backbone must be one of UNet2DModel, DiTTransformer2DModel, got Linear; ...
    """
    name = type(backbone).__name__
    if name not in ARCHITECTURES:
        raise ValueError(
            f"backbone must be one of {', '.join(ARCHITECTURES)}, got {name}; for another pass "
            "architecture=ocm.Architecture(...), which says how it is called"
        )
    return ARCHITECTURES[name]
