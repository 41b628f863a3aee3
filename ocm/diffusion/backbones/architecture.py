"""How a backbone is called, and where a covariance head reads its features.

A head reads what enters a backbone's last output layer. The families of diffusers are in
:mod:`ocm.diffusion.backbones.families`; another one is an :class:`Architecture` of your own, handed
to :class:`ocm.Denoiser` or :func:`ocm.attach`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ocm.diffusion.backbones.wrappers import unwrapped

T = TypeVar("T")


@dataclass(frozen=True)
class Architecture:
    """What the project needs to know of a family of backbones.

    Attributes:
        class_name: The class of diffusers, as ``config.json`` names it.
        feature_layer: Name of the submodule whose input are the features: the normalisation
            before the last layer. None for a backbone that shows no features: no head reads it.
        call: From (backbone, x_t, the network's time of shape (B,), class labels or None) to the
            output, of the shape of x_t; a variance that was learned beside it may follow as C
            further channels. Other conditions, such as ``encoder_hidden_states``, are keyword
            arguments where there are any (:meth:`ocm.Denoiser.condition`).
        num_classes: How many classes a backbone is trained with, or None for none.
        null_label: The label that stands for no class, or None.
        patch: Sides of the patch of x_t that a token stands for, one for each dimension behind the
            channels; None for features that are laid out as x_t is.
        is_packed: Whether diffusers shows the backbone tokens, whose channels are those of a whole
            patch. Then ``call`` packs x_t, so that everything else sees images.

    Raises:
        ValueError: In :class:`ocm.Denoiser`, if the backbone has no such feature layer.

    Example:
        A network of your own, whose head reads what enters its last convolution:

        >>> import torch, ocm
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 1))
        >>> own = ocm.Architecture("Sequential", "2", lambda net, x_t, time, labels: net(x_t))
        >>> denoiser = ocm.Denoiser(net, ocm.linear(), architecture=own).freeze()
        >>> covariance = ocm.NPR(denoiser, ocm.CovarianceHead(8, 1, num_groups=4))
        >>> covariance.at(denoiser.predict(torch.zeros(2, 1, 4, 4), 500)).diagonal().shape
        torch.Size([2, 1, 4, 4])
    """

    class_name: str
    feature_layer: str | None
    call: Callable[..., Tensor]
    num_classes: Callable[[Any], int | None] = lambda backbone: None
    null_label: Callable[[Any], int | None] = lambda backbone: None
    patch: Callable[[Any], tuple[int, ...] | None] = lambda backbone: None
    is_packed: bool = False

    def channels(self, backbone: Any) -> int:
        """Return the channels of x_t, by the configuration of a model of diffusers."""
        model = unwrapped(backbone)
        patch = (self.patch(model) if self.is_packed else None) or ()
        channels: int = model.config.in_channels
        return channels // math.prod(patch)

    def call_with_features(
        self, backbone: Any, x_t: Tensor, time: Tensor, labels: Tensor | None, **conditions: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, detached, the features that one evaluation went through.

        Those of tokens have the shape ``(B, *grid, width)``, a grid of the patches of x_t. There
        are none without a feature layer; nor from a backbone that ``torch.compile`` compiled before
        this module had seen it, since compiled code passes by later hooks.

        Raises:
            ValueError: If the patches do not divide x_t.
        """
        patch = self.patch(unwrapped(backbone))
        grid = None if patch is None else grid_of(x_t.shape, patch)
        output, features = self.heard(
            backbone, lambda: self.call(backbone, x_t, time, labels, **conditions)
        )
        if features is not None and grid is not None:
            features = features.unflatten(1, grid)
        return output, features

    def heard(self, backbone: Any, call: Callable[[], T]) -> tuple[T, Tensor | None]:
        """Return what a call of the backbone returns, and what entered the feature layer in it."""
        listener = self.listener(backbone)
        if listener is None:
            return call(), None
        entered: list[Tensor] = []
        listener.entered = entered
        try:
            returned = call()
        finally:
            listener.entered = None
        return returned, entered[0].detach() if entered else None

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


def grid_of(shape: Sequence[int], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many patches a sample has in each dimension behind its channels.

    Args:
        shape: Of x_t, (B, C, ...).
        patch: Sides of a patch.

    Raises:
        ValueError: If x_t has other dimensions, or is not made of whole patches.

    Example:
        >>> grid_of((1, 16, 8, 12), (2, 2))
        (4, 6)
    """
    sides = shape[2:]
    if len(sides) != len(patch) or any(side % p for side, p in zip(sides, patch, strict=True)):
        raise ValueError(
            f"x_t must have {len(patch)} dimensions behind its channels, multiples of {patch}, the "
            f"patch of a token, got the shape {tuple(shape)}"
        )
    return tuple(side // p for side, p in zip(sides, patch, strict=True))


def packed(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Return the patches of x as tokens (B, n, C prod(patch)), channels first in each of them.

    Example:
        >>> import torch
        >>> packed(torch.arange(16.0).reshape(1, 1, 4, 4), (2, 2))[0, 1]
        tensor([2., 3., 6., 7.])
    """
    grid, k = grid_of(x.shape, patch), len(patch)
    for dim in reversed(range(k)):
        x = x.unflatten(dim + 2, (grid[dim], patch[dim]))
    order = [0, *range(2, 2 + 2 * k, 2), 1, *range(3, 3 + 2 * k, 2)]
    return x.permute(order).flatten(1 + k).flatten(1, k)


def unpacked(tokens: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Return what :func:`packed` took apart.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 6, 2)
        >>> torch.equal(unpacked(packed(x, (1, 2, 2)), (4, 3, 1), (1, 2, 2)), x)
        True
    """
    k = len(patch)
    x = tokens.unflatten(2, (-1, *patch)).unflatten(1, grid)
    order = [0, k + 1, *(dim for i in range(k) for dim in (1 + i, k + 2 + i))]
    whole: Tensor = x.permute(order)
    for dim in range(k):
        whole = whole.flatten(2 + dim, 3 + dim)
    return whole
