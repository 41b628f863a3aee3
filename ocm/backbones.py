"""Small backbones to train from scratch, for images of a few pixels; all are diffusers'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def small_unet(image_shape: tuple[int, int, int], *, seed: int = 0) -> UNet2DModel:
    """Return an untrained ``UNet2DModel`` of 0.63 million parameters and two resolutions.

    Args:
        image_shape: (C, H, W), H and W even.
        seed: Seed of the weights; the global generator is left as it was.

    Raises:
        ValueError: If H or W is odd.

    Example:
        >>> small_unet((1, 8, 8)).config.block_out_channels
        (32, 64)
    """
    from diffusers import UNet2DModel

    channels, height, width = image_shape
    if height % 2 or width % 2:
        raise ValueError(f"image_shape must have even height and width, got {image_shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )
