"""Covariance heads: small networks on the features that enter a backbone's last layer.

A sampling step then costs one pass through the backbone and one small head. What the output o of
a head means is a matter of :class:`ocm.Parameterisation`; every head here starts at o = 0, and
computes in the type of its weights whatever autocast says: towards t = N a variance is a small
1 + o, of which bfloat16 would leave no digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.diffusion.backbones.architecture import unpacked
from ocm.diffusion.backbones.families import ARCHITECTURES
from ocm.diffusion.backbones.wrappers import unwrapped
from ocm.diffusion.denoiser import Denoiser


class CovarianceHead(nn.Module):
    """Group normalisation, SiLU and a 3x3 convolution that starts at zero.

    Args:
        in_channels: Channels of the backbone's features.
        out_channels: Channels of x_t.
        num_groups: Groups of the normalisation; divides ``in_channels``.

    Raises:
        ValueError: If it does not.

    Example:
        >>> import torch, ocm
        >>> ocm.CovarianceHead(32, 3, 8)(torch.randn(2, 32, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_groups": num_groups,
        }
        self.norm = nn.GroupNorm(num_groups, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        start_at_zero(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """Return o, of shape (B, out_channels, H, W), from features (B, in_channels, H, W)."""
        features = _for_group_norm(features.to(self.conv.weight.dtype))
        with outside_autocast(features):
            o: Tensor = self.conv(functional.silu(self.norm(features)))
        return o


class ResidualHead(nn.Module):
    """A residual block (GroupNorm, SiLU, convolution, twice) before the simple head.

    The larger head of Optimal Covariance Matching, for images of 64 pixels and more.

    Args:
        in_channels: Channels of the backbone's features.
        out_channels: Channels of x_t.
        num_groups: Groups of the normalisations; divides ``in_channels``.

    Raises:
        ValueError: If it does not.

    Example:
        >>> import torch, ocm
        >>> ocm.ResidualHead(32, 3, 8)(torch.randn(2, 32, 16, 16)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(num_groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1),
        )
        self.second = nn.Sequential(
            nn.GroupNorm(num_groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1),
        )
        self.head = CovarianceHead(in_channels, out_channels, num_groups)
        self.config = self.head.config

    def forward(self, features: Tensor) -> Tensor:
        """Return o, of shape (B, out_channels, H, W), from features (B, in_channels, H, W)."""
        features = _for_group_norm(features.to(self.head.conv.weight.dtype))
        with outside_autocast(features):
            o: Tensor = self.head(features + self.second(self.first(features)))
        return o


class TokenHead(nn.Module):
    """Layer normalisation, SiLU and a linear layer on the tokens of a transformer.

    Args:
        width: Channels of a token.
        out_channels: Channels of x_t.
        patch_size: Sides of the patch that a token stands for; one number for a square.
        residual: Whether a block of two linear layers stands first.

    Example:
        >>> import torch, ocm
        >>> ocm.TokenHead(24, 4, 2)(torch.randn(2, 4, 6, 24)).shape    # 4x6 patches of 2x2 pixels
        torch.Size([2, 4, 8, 12])
        >>> ocm.TokenHead(24, 4, (1, 2, 2))(torch.randn(2, 3, 4, 6, 24)).shape    # of 3 frames
        torch.Size([2, 4, 3, 8, 12])
    """

    def __init__(
        self,
        width: int,
        out_channels: int,
        patch_size: int | Sequence[int],
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "out_channels": out_channels,
            "patch_size": patch_size if isinstance(patch_size, int) else list(patch_size),
            "residual": residual,
        }
        self._patch = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
        self.block = (
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            if residual
            else None
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, math.prod(self._patch) * out_channels)
        start_at_zero(self.out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return o, of shape (B, out_channels, ...), from the tokens ``(B, *grid, width)``."""
        tokens = tokens.to(self.out.weight.dtype)
        with outside_autocast(tokens):
            if self.block is not None:
                tokens = tokens + self.block(tokens)
            patches = self.out(functional.silu(self.norm(tokens)))
        # Channels come last within a patch, as in the transformers themselves.
        patches = patches.unflatten(-1, (math.prod(self._patch), -1)).transpose(-1, -2)
        grid = tuple(tokens.shape[1:-1])
        return unpacked(patches.flatten(-2).flatten(1, len(grid)), grid, self._patch)


def outside_autocast(features: Tensor) -> torch.autocast:
    """Return the context in which layers compute in the type of their weights."""
    return torch.autocast(features.device.type, enabled=False)


def _for_group_norm(features: Tensor) -> Tensor:
    """Return the features in the layout whose gradients PyTorch can take.

    On a CPU the backward pass of GroupNorm crashes (PyTorch 2.13) for an input that lies channels
    last and needs no gradient: the features of a frozen backbone.
    """
    return features.contiguous() if features.device.type == "cpu" else features


def start_at_zero(layer: nn.Module) -> None:
    """Set weight and bias of the layer that puts out o to zero."""
    nn.init.zeros_(layer.get_parameter("weight"))
    nn.init.zeros_(layer.get_parameter("bias"))


# By class name, as checkpoints name them.
HEADS: dict[str, type[nn.Module]] = {
    head.__name__: head for head in (CovarianceHead, ResidualHead, TokenHead)
}


def _image_head(head: type[nn.Module], denoiser: Denoiser) -> nn.Module:
    unet = unwrapped(denoiser.backbone)
    norm = unet.conv_norm_out
    return head(norm.num_channels, unet.config.in_channels, norm.num_groups)


def _token_head(residual: bool, denoiser: Denoiser) -> nn.Module:
    model, architecture = unwrapped(denoiser.backbone), denoiser.architecture
    assert architecture is not None  # set by the denoiser
    patch = architecture.patch(model) or ()
    # One number for a square, as it was before there were others.
    sides: int | Sequence[int] = patch[0] if patch == patch[:1] * 2 else patch
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return TokenHead(width, architecture.channels(model), sides, residual)


_IMAGE_HEADS = {
    "simple": partial(_image_head, CovarianceHead),
    "residual": partial(_image_head, ResidualHead),
}
_TOKEN_HEADS = {"simple": partial(_token_head, False), "residual": partial(_token_head, True)}


def kinds_of(denoiser: Denoiser) -> Mapping[str, Callable[[Denoiser], nn.Module]]:
    """Return what makes the heads that fit a denoiser's features, by kind.

    Raises:
        ValueError: If none is known for its architecture.
    """
    architecture = denoiser.architecture
    assert architecture is not None  # set by the denoiser
    if architecture.class_name not in ARCHITECTURES:
        raise ValueError(
            f"denoiser must have a backbone of {', '.join(ARCHITECTURES)} for a head to be made, "
            f"got {architecture.class_name}; give a head that fits its features, "
            "ocm.CovarianceHead(in_channels, out_channels, num_groups) or "
            "ocm.TokenHead(width, out_channels, patch_size) say"
        )
    takes_tokens = architecture.patch(unwrapped(denoiser.backbone)) is not None
    return _TOKEN_HEADS if takes_tokens else _IMAGE_HEADS


def make_head(denoiser: Denoiser, kind: str = "residual", *, seed: int = 0) -> nn.Module:
    """Return an untrained covariance head that fits the features of a denoiser, on its device.

    Args:
        denoiser: Whose features the head reads.
        kind: "residual", or "simple" for the smaller one.
        seed: Seed of the weights that do not start at zero; the global generator stays as it was.

    Returns:
        A :class:`ocm.CovarianceHead`, :class:`ocm.ResidualHead` or :class:`ocm.TokenHead`, whose
        output o is zero.

    Raises:
        ValueError: If no head is known for the denoiser's architecture, or none of that kind.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> head = ocm.make_head(denoiser, "simple")
        >>> head(denoiser.predict(torch.zeros(2, 1, 8, 8), 500).features).shape
        torch.Size([2, 1, 8, 8])
    """
    kinds = kinds_of(denoiser)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[kind](denoiser).to(denoiser.device)
