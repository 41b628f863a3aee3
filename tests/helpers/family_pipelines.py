"""Small pipelines of diffusers around the models of :mod:`families`, text given as embeddings.

``python tests/helpers/family_pipelines.py FOLDER OUT`` loads every pipeline in a folder, in a
process that imports ocm alone before, and writes what they draw.
"""

import sys
from pathlib import Path

import torch


def make_vae(latent_channels, **options):
    """Return a small AutoencoderKL that takes two pixels together."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        **options,
    ).eval()


def make_video_vae(kind):
    """Return a small autoencoder of Wan's, Qwen-Image's or LTX-Video's."""
    import diffusers

    torch.manual_seed(1)
    if kind == "AutoencoderKLLTXVideo":
        return diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ).eval()
    return getattr(diffusers, kind)(
        base_dim=3,
        z_dim=2,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.2, -0.1],
        latents_std=[1.5, 0.8],
    ).eval()


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
# By pipeline: its backbone's family, and what it is loaded with beside its folder.
PIPELINES = {
    "StableDiffusionPipeline": ("UNet2DConditionModel", NO_TEXT),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", NO_TEXT),
    "SanaPipeline": ("SanaTransformer2DModel", NO_TEXT),
    "StableDiffusion3Pipeline": (
        "SD3Transformer2DModel",
        {**NO_TEXTS, "text_encoder_3": None, "tokenizer_3": None},
    ),
    "FluxPipeline": ("FluxTransformer2DModel", NO_TEXTS),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", NO_TEXT),
    "WanPipeline": ("WanTransformer3DModel", NO_TEXT),
    "LTXPipeline": ("LTXVideoTransformer3DModel", NO_TEXT),
}
VIDEO = ("WanPipeline", "LTXPipeline")


def scheduler_of(name):
    """Return a scheduler as such a pipeline comes with."""
    import diffusers

    if name in ("StableDiffusionPipeline", "PixArtSigmaPipeline"):
        return diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
    dynamic = name in ("FluxPipeline", "QwenImagePipeline", "LTXPipeline")
    options = {"use_dynamic_shifting": True} if dynamic else {"shift": 3.0}
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def make_pipeline(name, backbone, scheduler):
    """Return the pipeline of a backbone and a scheduler."""
    import diffusers

    parts = {"transformer": backbone, "scheduler": scheduler, **PIPELINES[name][1]}
    if name in ("WanPipeline", "QwenImagePipeline"):
        vae = make_video_vae(f"AutoencoderKL{name.removesuffix('Pipeline')}")
    elif name == "LTXPipeline":
        vae = make_video_vae("AutoencoderKLLTXVideo")
    elif name == "SanaPipeline":
        torch.manual_seed(1)
        vae = diffusers.AutoencoderDC(
            latent_channels=2,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        ).eval()
    else:
        vae = make_vae(2, scaling_factor=0.4, shift_factor=0.1)
    if name == "StableDiffusionPipeline":
        parts["unet"] = parts.pop("transformer")
        parts |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    pipeline = getattr(diffusers, name)(vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(name, pipeline, steps=3, scale=3.0, **options):
    """Return what a pipeline draws for two texts, guided."""
    from families import FAMILIES

    family = FAMILIES[PIPELINES[name][0]]
    given, null = family.tensors(), family.tensors(seed=9)
    texts = {
        "prompt_embeds": given["encoder_hidden_states"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
    }
    if "pooled_projections" in given:
        texts["pooled_prompt_embeds"] = given["pooled_projections"]
        texts["negative_pooled_prompt_embeds"] = null["pooled_projections"]
    if name in ("PixArtSigmaPipeline", "SanaPipeline", "LTXPipeline"):
        mask = torch.ones(2, texts["prompt_embeds"].shape[1])
        texts |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if name == "QwenImagePipeline":
        mask = torch.ones(2, texts["prompt_embeds"].shape[1], dtype=torch.long)
        texts |= {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    own = name in ("FluxPipeline", "QwenImagePipeline")
    guidance = "true_cfg_scale" if own else "guidance_scale"
    if name in ("PixArtSigmaPipeline", "SanaPipeline"):
        texts |= {"use_resolution_binning": False, "negative_prompt": None}
    # Latents of 2 x 6, or as their autoencoders allow.
    height, width = {
        "StableDiffusion3Pipeline": (4, 12),
        "FluxPipeline": (4, 12),
        "WanPipeline": (16, 32),
        "QwenImagePipeline": (16, 48),
        "SanaPipeline": (32, 32),
        "LTXPipeline": (32, 96),
    }.get(name, (8, 24))
    if name in VIDEO:
        options["num_frames"] = 5 if name == "WanPipeline" else 9
    options = {"output_type": "pt", **options}
    torch.manual_seed(0)
    drawn = pipeline(
        **texts,
        **{guidance: scale},
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        **options,
    )
    return drawn.frames if name in VIDEO else drawn.images


def main(folder, out):
    """Load all pipelines of a folder and write what they draw."""
    import ocm  # noqa: F401, before diffusers, and alone

    names = [name for name in PIPELINES if (folder / name).is_dir()]
    from diffusers import DiffusionPipeline

    drawn = {}
    for name in names:
        pipeline = DiffusionPipeline.from_pretrained(folder / name, **PIPELINES[name][1])
        assert type(pipeline).__name__ == name
        pipeline.set_progress_bar_config(disable=True)
        drawn[name] = draw(name, pipeline)
    from safetensors.torch import save_file

    save_file({name: images.contiguous() for name, images in drawn.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
