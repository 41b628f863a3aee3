"""A small backbone to train from scratch, for images of a few pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def small_unet(
    image_shape: tuple[int, int, int],
    *,
    width: int = 32,
    seed: int = 0,
    num_classes: int | None = None,
) -> UNet2DModel:
    """Return an untrained ``UNet2DModel`` of two resolutions, 0.63 million parameters by default.

    Args:
        image_shape: (C, H, W), H and W even.
        width: Channels of the first resolution, a multiple of 8; the second has twice as many.
        seed: Seed of the weights; the global generator is left as it was.
        num_classes: Number of classes whose labels it takes; None for a model without.

    Raises:
        ValueError: If H or W is odd, or the width no multiple of 8.

    Example:
        >>> small_unet((1, 8, 8)).config.block_out_channels
        (32, 64)
    """
    from diffusers import UNet2DModel

    channels, rows, columns = image_shape
    if rows % 2 or columns % 2:
        raise ValueError(f"image_shape must have even height and width, got {image_shape}")
    if width < 8 or width % 8:
        raise ValueError(f"width must be a multiple of 8, got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=(rows, columns),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
            num_class_embeds=num_classes,
        )
