"""Covariance heads: small networks on the features that enter a backbone's last layer.

A sampling step then costs one pass through the backbone and one small head. What the output o of
a head means is a matter of :class:`ocm.Parameterisation`; every head here starts at o = 0, and
computes in the type of its weights whatever autocast says: towards t = N a variance is a small
1 + o, of which bfloat16 would leave no digit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ocm.diffusion.backbones.wrappers import unwrapped
from ocm.diffusion.denoiser import Denoiser


class CovarianceHead(nn.Module):
    """Group normalisation, SiLU and a 3x3 convolution that starts at zero.

    Args:
        in_channels: Channels of the backbone's features.
        out_channels: Channels of x_t.
        num_groups: Groups of the normalisation; divides ``in_channels``.

    Example:
        >>> import torch
        >>> CovarianceHead(32, 3, 8)(torch.randn(2, 32, 16, 16)).shape
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
        _start_at_zero(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """Return o, of shape (B, out_channels, H, W), from features (B, in_channels, H, W)."""
        features = _for_group_norm(features.to(self.conv.weight.dtype))
        with _outside_autocast(features):
            o: Tensor = self.conv(functional.silu(self.norm(features)))
        return o


class ResidualHead(nn.Module):
    """A residual block (GroupNorm, SiLU, convolution, twice) before the simple head.

    The larger head of Optimal Covariance Matching, for images of 64 pixels and more.

    Args:
        in_channels: Channels of the backbone's features.
        out_channels: Channels of x_t.
        num_groups: Groups of the normalisations; divides ``in_channels``.

    Example:
        >>> import torch
        >>> ResidualHead(32, 3, 8)(torch.randn(2, 32, 16, 16)).shape
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
        with _outside_autocast(features):
            o: Tensor = self.head(features + self.second(self.first(features)))
        return o


class TokenHead(nn.Module):
    """Layer normalisation, SiLU and a linear layer on the tokens of a transformer.

    Args:
        width: Channels of a token.
        out_channels: Channels of x_t.
        patch_size: Side of the patch that a token stands for.
        residual: Whether a block of two linear layers stands first.

    Example:
        >>> import torch
        >>> TokenHead(24, 4, 2)(torch.randn(2, 16, 24)).shape    # 4x4 patches of 2x2 pixels
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self, width: int, out_channels: int, patch_size: int, residual: bool = False
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "out_channels": out_channels,
            "patch_size": patch_size,
            "residual": residual,
        }
        self.block = (
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            if residual
            else None
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)
        _start_at_zero(self.out)
        self._patch_size, self._out_channels = patch_size, out_channels

    def forward(self, tokens: Tensor) -> Tensor:
        """Return o, of shape (B, out_channels, H, W), from the tokens (B, n, width) of a square."""
        tokens = tokens.to(self.out.weight.dtype)
        with _outside_autocast(tokens):
            if self.block is not None:
                tokens = tokens + self.block(tokens)
            patches = self.out(functional.silu(self.norm(tokens)))
        side, p = round(tokens.shape[1] ** 0.5), self._patch_size
        o = patches.reshape(len(tokens), side, side, p, p, self._out_channels)
        o = o.permute(0, 5, 1, 3, 2, 4)
        image: Tensor = o.reshape(len(tokens), self._out_channels, side * p, side * p)
        return image


def _outside_autocast(features: Tensor) -> torch.autocast:
    return torch.autocast(features.device.type, enabled=False)


def _for_group_norm(features: Tensor) -> Tensor:
    """Return the features in the layout whose gradients PyTorch can take.

    On a CPU the backward pass of GroupNorm crashes (PyTorch 2.13) for an input that lies channels
    last and needs no gradient: the features of a frozen backbone.
    """
    return features.contiguous() if features.device.type == "cpu" else features


def _start_at_zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.get_parameter("weight"))
    nn.init.zeros_(layer.get_parameter("bias"))


# By class name, as checkpoints name them.
HEADS: dict[str, type[nn.Module]] = {
    head.__name__: head for head in (CovarianceHead, ResidualHead, TokenHead)
}


def _image_head(head: type[nn.Module], unet: Any) -> nn.Module:
    norm = unet.conv_norm_out
    return head(norm.num_channels, unet.config.in_channels, norm.num_groups)


def _token_head(dit: Any, residual: bool) -> nn.Module:
    return TokenHead(dit.inner_dim, dit.config.in_channels, dit.config.patch_size, residual)


_IMAGE_HEADS = {
    "simple": partial(_image_head, CovarianceHead),
    "residual": partial(_image_head, ResidualHead),
}
_TOKEN_HEADS = {
    "simple": partial(_token_head, residual=False),
    "residual": partial(_token_head, residual=True),
}
# The kinds of heads that fit a backbone, by the class of the backbone.
KINDS: dict[str, Mapping[str, Callable[[Any], nn.Module]]] = {
    "UNet2DModel": _IMAGE_HEADS,
    "UNet2DConditionModel": _IMAGE_HEADS,
    "DiTTransformer2DModel": _TOKEN_HEADS,
    "PixArtTransformer2DModel": _TOKEN_HEADS,
}


def make_head(denoiser: Denoiser, kind: str = "simple", *, seed: int = 0) -> nn.Module:
    """Return an untrained covariance head that fits the features of a denoiser, on its device.

    Args:
        denoiser: Whose features the head reads.
        kind: "simple", or "residual" for the larger one.
        seed: Seed of the weights that do not start at zero; the global generator stays as it was.

    Raises:
        ValueError: If no head is known for the denoiser's architecture, or none of that kind.
    """
    assert denoiser.architecture is not None  # set by the denoiser
    name = denoiser.architecture.class_name
    if name not in KINDS:
        raise ValueError(
            f"denoiser must have a backbone of {', '.join(KINDS)} for a head to be made, got "
            f"{name}; give a head that fits its features, ocm.CovarianceHead(in_channels, "
            "out_channels, num_groups) or ocm.TokenHead(width, out_channels, patch_size) say"
        )
    if kind not in KINDS[name]:
        raise ValueError(f"kind must be one of {', '.join(KINDS[name])}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[name][kind](unwrapped(denoiser.backbone)).to(denoiser.device)
