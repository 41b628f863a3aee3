"""Latents that are normalised by tables, against the pipelines of diffusers themselves."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage_img2img import QwenImageImg2ImgPipeline
from small_autoencoders import MEAN, STD, make_ltx_vae, make_qwen_vae, make_vae, make_wan_vae

from ocm.integrations.latents import decode, encode

VIDEO = (1, 3, 5, 16, 16)


def seeded(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def outputs_of(pipeline, **options):
    """The latents and the video of the same draws, by the pipeline's own decoding."""
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for output_type in ("latent", "pt"):
        generator = torch.Generator().manual_seed(0)
        found.append(
            pipeline(
                height=32,
                width=32,
                num_frames=9,
                num_inference_steps=1,
                generator=generator,
                output_type=output_type,
                **options,
            ).frames
        )
    return found


def test_latents_of_wan_are_decoded_as_its_pipeline_does():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    vae = make_wan_vae()
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )
    prompt = {"prompt_embeds": seeded(1, 4, 8), "negative_prompt_embeds": seeded(1, 4, 8)}
    latents, video = outputs_of(pipeline, **prompt)
    ours = (decode(vae, latents) + 1) / 2
    torch.testing.assert_close(ours.clamp(0, 1), video.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("timestep_conditioning", [False, True])
def test_latents_of_ltx_are_decoded_as_its_pipeline_does(timestep_conditioning):
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=8,
    )  # fmt: skip
    vae = make_ltx_vae(timestep_conditioning=timestep_conditioning)
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    mask = torch.ones(1, 4, dtype=torch.long)
    prompt = {
        "prompt_embeds": seeded(1, 4, 8),
        "negative_prompt_embeds": seeded(1, 4, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
    }
    packed, video = outputs_of(pipeline, **prompt)
    scale, frames = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    latents = pipeline._unpack_latents(packed, 8 // frames + 1, 32 // scale, 32 // scale, 1, 1)
    ours = (decode(vae, latents) + 1) / 2
    torch.testing.assert_close(ours.clamp(0, 1), video.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_latents_of_ltx_are_encoded_as_its_pipeline_does():
    vae, video = make_ltx_vae(), seeded(*VIDEO)
    with torch.no_grad():
        means = vae.encode(video).latent_dist.mean
    theirs = LTXPipeline._normalize_latents(means, vae.latents_mean, vae.latents_std, 0.8)
    torch.testing.assert_close(encode(vae, video, mean=True), theirs)


def test_latents_of_qwen_image_are_encoded_as_its_pipeline_does():
    vae, images = make_qwen_vae(), seeded(1, 3, 1, 16, 16)
    theirs = QwenImageImg2ImgPipeline._encode_vae_image(
        SimpleNamespace(vae=vae), images, torch.Generator().manual_seed(0)
    )
    # Theirs draws around the mean; the same draws of ours would need its generator.
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        drawn = posterior.sample(torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(table).reshape(1, 4, 1, 1, 1) for table in (MEAN, STD))
    torch.testing.assert_close(theirs, (drawn - mean) / std)
    torch.testing.assert_close(encode(vae, images, mean=True), (posterior.mean - mean) / std)
    torch.testing.assert_close(
        decode(vae, encode(vae, images, mean=True)), vae.decode(posterior.mean).sample.detach()
    )


def test_tables_and_a_scaling_factor_are_those_of_stable_diffusion_xl():
    vae, images = make_vae(latents_mean=MEAN, latents_std=STD), seeded(2, 3, 8, 8)
    z = encode(vae, images, mean=True)
    with torch.no_grad():
        means = vae.encode(images).latent_dist.mean
        mean, std = (torch.tensor(table).reshape(1, 4, 1, 1) for table in (MEAN, STD))
        torch.testing.assert_close(z, (means - mean) * 0.4 / std)
        torch.testing.assert_close(decode(vae, z), vae.decode(z * std / 0.4 + mean).sample)
