"""A small denoiser in plain PyTorch: convolutions, group norms and attention, without diffusers."""

import math

import torch
from torch import nn
from torch.nn import functional

import ocm

CHANNELS, WIDTH, GROUPS, HEADS = 2, 16, 4, 2


class SmallBackbone(nn.Module):
    """A residual block and a block of attention, with random weights that all matter."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.GroupNorm(GROUPS, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm_attention = nn.GroupNorm(GROUPS, WIDTH)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.from_attention = nn.Linear(WIDTH, WIDTH)
        self.norm_out = nn.GroupNorm(GROUPS, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, x, level):
        angle = level.to(x.dtype)[:, None] * (math.pi / 2000)
        time = self.time(torch.cat([angle.cos(), angle.sin()], dim=1))[:, :, None, None]
        h = self.conv_in(x)
        h = h + self.conv(functional.silu(self.norm(h) + time))
        h = h + self.attention(self.norm_attention(h))
        return self.conv_out(functional.silu(self.norm_out(h)))

    def attention(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        tokens = self.from_attention(mixed.transpose(1, 2).flatten(2))
        return tokens.transpose(1, 2).reshape(h.shape)


ARCHITECTURE = ocm.Architecture(
    "SmallBackbone", "norm_out", lambda backbone, x_t, level, labels: backbone(x_t, level)
)


def small_backbone():
    torch.manual_seed(0)
    return SmallBackbone()


def small_denoiser(device="cpu"):
    return ocm.Denoiser(
        small_backbone().to(device), ocm.cosine(), architecture=ARCHITECTURE
    ).freeze()


def small_head(device="cpu"):
    """A head for its features whose weights are random in place of zero."""
    torch.manual_seed(1)
    head = ocm.CovarianceHead(WIDTH, CHANNELS, GROUPS)
    nn.init.normal_(head.conv.weight, std=0.1)
    return head.requires_grad_(False).to(device)
