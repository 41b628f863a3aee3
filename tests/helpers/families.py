"""A small model of every family of diffusers, and x0_hat as the family's pipeline computes it.

``FAMILIES`` has, by the class of the backbone: how a small one is made, the shape of x_t, its
path, what it predicts, its conditions, and ``native``: its output by the calls of its pipeline,
with the pipeline's own packing. So there is a second way of computing what :mod:`ocm` computes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import diffusers
import torch
from diffusers import FluxPipeline, LTXPipeline

import ocm

WIDTH, TEXT = 12, 5


@dataclass(frozen=True)
class Family:
    """A small model of a family; see the module."""

    config: dict
    shape: tuple[int, ...]
    native: Callable
    schedule: Callable = ocm.flow
    prediction_type: str = "flow_prediction"
    conditions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    classes: int | None = None
    kind: str = ""

    def make(self, seed=0):
        """Return the model, in eval mode, no weight of which is zero."""
        torch.manual_seed(seed)
        model = getattr(diffusers, self.kind)(**self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.25)
        return model.eval().requires_grad_(False)

    def denoiser(self, backbone, **options):
        """Return the denoiser of a backbone of this family."""
        return ocm.Denoiser(backbone, self.schedule(), self.prediction_type, **options).freeze()

    def x_t(self, batch=2, seed=1):
        """Return noisy samples."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.shape, generator=generator)

    def labels(self, batch=2):
        """Return a class for each sample, or None."""
        return None if self.classes is None else torch.arange(1, 1 + batch) % self.classes

    def tensors(self, batch=2, seed=2):
        """Return the conditions of each sample by name."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(batch, *shape, generator=generator)
            for name, shape in self.conditions.items()
        }

    def condition(self, denoiser, batch=2, **options):
        """Return the condition of a denoiser's call, or None."""
        labels, tensors = self.labels(batch), self.tensors(batch)
        if labels is None and not tensors:
            return None
        return denoiser.condition(labels, tensors=tensors, **options)

    def x0_hat(self, backbone, x, t, labels=None, **tensors):
        """Return x0_hat of (x, t) and Cov's factor sigma^2 / alpha, by formulas written out."""
        if self.prediction_type == "flow_prediction":
            sigma = torch.tensor(t / 1000, dtype=torch.float64)
            time = (1000 * sigma).float()
            alpha, velocity = 1 - sigma, self.native(backbone, x, time, **tensors)
            return x - sigma.to(x) * velocity, sigma**2 / alpha
        scheduler = diffusers.DDPMScheduler()
        alpha_bar = (1 - scheduler.betas.double()).cumprod(0)[t - 1]
        given = tensors if labels is None else {"class_labels": labels, **tensors}
        noise = self.native(backbone, x, torch.tensor(t - 1), **given)[:, : x.shape[1]]
        clean = (x - (1 - alpha_bar).sqrt().to(x) * noise) / alpha_bar.sqrt().to(x)
        return clean, (1 - alpha_bar) / alpha_bar.sqrt()


def _plain(model, x, time, **given):
    return model(x, timestep=time.expand(len(x)), return_dict=False, **given)[0]


def _sana(model, x, time, **given):
    return _plain(model, x, time * model.config.timestep_scale, **given)


def _flux(model, x, time, **given):
    batch, channels, height, width = x.shape
    tokens = FluxPipeline._pack_latents(x, batch, channels, height, width)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype)
    text_ids = torch.zeros(given["encoder_hidden_states"].shape[1], 3).to(x)
    output = _plain(model, tokens, time / 1000, img_ids=ids, txt_ids=text_ids, **given)
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


def _qwen(model, x, time, **given):
    batch, channels, height, width = x.shape
    tokens = FluxPipeline._pack_latents(x, batch, channels, height, width)
    shapes = [[(1, height // 2, width // 2)]] * batch
    output = _plain(model, tokens, time / 1000, img_shapes=shapes, **given)
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


def _ltx(model, x, time, **given):
    _, _, frames, height, width = x.shape
    output = _plain(
        model,
        LTXPipeline._pack_latents(x),
        time,
        num_frames=frames,
        height=height,
        width=width,
        encoder_attention_mask=None,
        rope_interpolation_scale=(8 / 25, 32, 32),
        **given,
    )
    return LTXPipeline._unpack_latents(output, frames, height, width)


_UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_HEADS = {"num_attention_heads": 2, "num_layers": 1}
_LINEAR = {"schedule": ocm.linear, "prediction_type": "epsilon"}
_TEXTS = {"encoder_hidden_states": (TEXT, WIDTH)}
_POOLED = {**_TEXTS, "pooled_projections": (6,)}
_DIT = {
    **_HEADS,
    "attention_head_dim": 8,
    "in_channels": 2,
    "sample_size": 4,
    "patch_size": 2,
    "norm_num_groups": 4,
}

_MADE = {
    "UNet2DModel": Family(
        {
            **_UNET,
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",),
            "attention_head_dim": 4,
        },
        (2, 2, 6),
        _plain,
        **_LINEAR,
    ),
    "UNet2DConditionModel": Family(
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
        },
        (2, 2, 6),
        _plain,
        conditions=_TEXTS,
        **_LINEAR,
    ),
    "DiTTransformer2DModel": Family(
        {**_DIT, "out_channels": 2, "num_embeds_ada_norm": 5},
        (2, 4, 4),
        _plain,
        classes=5,
        **_LINEAR,
    ),
    "PixArtTransformer2DModel": Family(
        {
            **_DIT,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
            "use_additional_conditions": False,
        },
        (2, 2, 6),
        partial(_plain, added_cond_kwargs={}),
        conditions=_TEXTS,
        **_LINEAR,
    ),
    "SanaTransformer2DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 8,
            "in_channels": 2,
            "out_channels": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
            "sample_size": 4,
            "patch_size": 1,
            "timestep_scale": 0.5,
        },
        (2, 2, 3),
        _sana,
        conditions=_TEXTS,
    ),
    "SD3Transformer2DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 8,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "out_channels": 2,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 8,
        },
        (2, 2, 6),
        _plain,
        conditions=_POOLED,
    ),
    "FluxTransformer2DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 8,
            "num_single_layers": 1,
            "in_channels": 8,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": 6,
            "axes_dims_rope": (2, 2, 4),
        },
        (2, 2, 6),
        _flux,
        conditions=_POOLED,
    ),
    "QwenImageTransformer2DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 8,
            "in_channels": 8,
            "out_channels": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (2, 2, 4),
        },
        (2, 2, 6),
        _qwen,
        conditions=_TEXTS,
    ),
    "WanTransformer3DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 12,
            "in_channels": 2,
            "out_channels": 2,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 24,
        },
        (2, 2, 2, 4),
        _plain,
        conditions=_TEXTS,
    ),
    "LTXVideoTransformer3DModel": Family(
        {
            **_HEADS,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
        },
        (4, 2, 1, 3),
        _ltx,
        conditions=_TEXTS,
    ),
}
FAMILIES = {name: Family(**{**vars(family), "kind": name}) for name, family in _MADE.items()}
