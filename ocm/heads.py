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
    from ocm.denoiser import Denoiser


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
        nn.init.zeros_(self.conv.get_parameter("bias"))

    @classmethod
    def for_denoiser(cls, denoiser: Denoiser) -> CovarianceHead:
        """Return an untrained head that fits the features of a denoiser, on its device.

        Raises:
            ValueError: If the feature layer is no group normalisation, whose groups the head takes.
        """
        layer = denoiser.unet.get_submodule(denoiser.feature_layer)
        if not isinstance(layer, nn.GroupNorm):
            raise ValueError(
                f"feature_layer must be a GroupNorm, got {type(layer).__name__} for "
                f"{denoiser.feature_layer!r}; make the head with CovarianceHead(...) instead"
            )
        head = cls(layer.num_channels, denoiser.unet.config.out_channels, layer.num_groups)
        return head.to(denoiser.device)

    def forward(self, features: Tensor) -> Tensor:
        """Return h, of shape (B, out_channels, H, W), from features (B, in_channels, H, W)."""
        h: Tensor = self.conv(functional.silu(self.norm(features)))
        return h
