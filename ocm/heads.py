"""The covariance head: a small network on the features that enter a backbone's last layer.

A sampling step then costs one pass through the backbone and one small head. The head predicts the
dimensionless h = beta_bar diag H, with H the Hessian of log q(x_t), from which
Var[x0 | x_t] = (beta_bar / alpha_bar) (1 + h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class CovarianceHead(nn.Module):
    """Group normalisation, SiLU and a 3x3 convolution that starts at zero.

    An untrained head predicts h = 0, the variance beta_bar / alpha_bar of x0 under a flat prior.

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
        self.norm = nn.GroupNorm(num_groups, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    @classmethod
    def for_unet(cls, unet: UNet2DModel) -> CovarianceHead:
        """Return an untrained head that fits the features of ``unet``."""
        return cls(
            in_channels=unet.conv_norm_out.num_channels,
            out_channels=unet.config.out_channels,
            num_groups=unet.conv_norm_out.num_groups,
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return h, of shape (B, out_channels, H, W), from features (B, in_channels, H, W)."""
        h: Tensor = self.conv(functional.silu(self.norm(features)))
        return h
