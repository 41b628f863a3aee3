"""How diffusers' backbones are called, and where a covariance head reads their features.

A head reads what enters a backbone's last output layer. An architecture that is not listed is one
more :class:`Architecture`, handed to :class:`ocm.Denoiser` or :func:`ocm.attach`. The heads that
fit one are in ``KINDS`` of :mod:`ocm.covariances.learned.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ocm.diffusion.backbones.wrappers import unwrapped


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
