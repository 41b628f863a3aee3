"""The backbone of the experiment: a U-Net of several resolutions, with attention at some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_ATTENTION_HEAD_SIZE = 32


def attention_unet(
    image_shape: tuple[int, int, int],
    *,
    widths: Sequence[int] = (64, 128, 192),
    attention_sizes: Sequence[int] = (16,),
    layers_per_block: int = 2,
    seed: int = 0,
) -> UNet2DModel:
    """Return an untrained ``UNet2DModel`` of several resolutions, with attention at some.

    By default it has 10 million parameters and, for images of 32 pixels, attention at 16: the form
    of the model that DDPM's authors trained on CIFAR-10 (Ho, Jain and Abbeel, 2020), a quarter of
    its size.

    Args:
        image_shape: (C, H, W), H and W multiples of 2^(number of widths - 1).
        widths: Channels of each resolution, from the first on, multiples of 32.
        attention_sizes: Heights at which the blocks attend, in heads of 32 channels; the middle
            block, at the lowest resolution, always does.
        layers_per_block: Residual layers of a block.
        seed: Seed of the weights; the global generator is left as it was.

    Raises:
        ValueError: If the image does not halve so often, a width is no multiple of 32, or there is
            no resolution of a size in ``attention_sizes``.

    Example:
        >>> unet = attention_unet((3, 16, 16), widths=(32, 64), attention_sizes=(8,))
        >>> unet.config.down_block_types
        ('DownBlock2D', 'AttnDownBlock2D')
    """
    from diffusers import UNet2DModel

    channels, rows, columns = image_shape
    halvings = 2 ** (len(widths) - 1)
    if rows % halvings or columns % halvings:
        raise ValueError(
            f"image_shape must have height and width of multiples of {halvings} for "
            f"{len(widths)} widths, got {image_shape}"
        )
    if not widths or any(width < 1 or width % _ATTENTION_HEAD_SIZE for width in widths):
        raise ValueError(
            f"widths must be multiples of {_ATTENTION_HEAD_SIZE}, one or more, got {tuple(widths)}"
        )
    sizes = [rows // 2**level for level in range(len(widths))]
    if not set(attention_sizes) <= set(sizes):
        raise ValueError(
            f"attention_sizes must be among the heights {sizes} of the resolutions, got "
            f"{tuple(attention_sizes)}"
        )
    attends = [size in attention_sizes for size in sizes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=(rows, columns),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            layers_per_block=layers_per_block,
            norm_num_groups=32,
            attention_head_dim=_ATTENTION_HEAD_SIZE,
        )
