"""Videos of images that move in front of nothing, and a small network that denoises them.

A stand-in for the latents of videos, x_t of shape (B, C, F, H, W): 2x2 pixels of a frame are
channels of one place, so that decoding is a permutation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import ocm

SIDE, _OBJECT, _FASTEST = 16, 10, 1.5
_GROUPS = 4


def moving(images: Tensor, num_frames: int, seed: int) -> Tensor:
    """Return videos (n, 1, F, 16, 16) of images (n, 1, H, W), scaled down, that bounce at the edge.

    They start anywhere and move by up to 1.5 pixels a frame along each axis.
    """
    generator = torch.Generator().manual_seed(seed)
    small = functional.interpolate(images, size=_OBJECT, mode="area")
    room = SIDE - _OBJECT
    start = room * torch.rand(len(images), 2, generator=generator)
    speed = _FASTEST * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    videos = torch.full((len(images), 1, num_frames, SIDE, SIDE), -1.0)
    for f in range(num_frames):
        way = (start + f * speed) % (2 * room)
        places = torch.minimum(way, 2 * room - way).round().long().tolist()
        for video, image, (top, left) in zip(videos, small, places, strict=True):
            video[:, f, top : top + _OBJECT, left : left + _OBJECT] = image
    return videos


def folded(videos: Tensor) -> Tensor:
    """Return videos (n, 1, F, 2 h, 2 w) as latents (n, 4, F, h, w)."""
    return functional.pixel_unshuffle(videos.transpose(1, 2), 2).transpose(1, 2)


def unfolded(latents: Tensor) -> Tensor:
    """Return the videos of latents."""
    return functional.pixel_shuffle(latents.transpose(1, 2), 2).transpose(1, 2)


class VideoNetwork(nn.Module):
    """Residual blocks of convolutions over time and space."""

    def __init__(self, channels: int = 4, width: int = 24, num_blocks: int = 3) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv3d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_activated(width) for _ in range(2 * num_blocks))
        self.last = nn.Conv3d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the prediction, of the shape of x."""
        frequencies = torch.exp(
            -math.log(1000.0) * torch.arange(self.width // 2, device=x.device) / (self.width // 2)
        )
        angles = time.to(x.dtype)[:, None] * frequencies
        shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None, None]
        h = self.first(x)
        for before, after in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            h = h + after(before(h) + shift)
        prediction: Tensor = self.last(h)
        return prediction


def _activated(width: int) -> nn.Module:
    convolution = nn.Conv3d(width, width, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(_GROUPS, width), nn.SiLU(), convolution)


def video_denoiser(seed: int) -> ocm.Denoiser:
    """Return an untrained denoiser of latents of videos."""
    torch.manual_seed(seed)
    architecture = ocm.Architecture("VideoNetwork", None, lambda net, x, time, _: net(x, time))
    return ocm.Denoiser(VideoNetwork(), ocm.cosine(), "v_prediction", architecture)
