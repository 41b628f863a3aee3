"""Text-to-image pipelines of diffusers with tiny random models, and tokens of one letter."""

import string
from types import SimpleNamespace

import diffusers
import torch
import transformers
from diffusers.pipelines.wan import pipeline_wan
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

WIDTH = 8
LETTERS = ["<pad>", "<eos>", "<bos>", "<unk>", *string.printable]
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def tokenizer(length=12):
    table = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, "<unk>"))
    table.pre_tokenizer = Split(Regex("(?m)."), "isolated")
    table.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=table, model_max_length=length, pad_token="<pad>", eos_token="<eos>",
        bos_token="<bos>", unk_token="<unk>",
    )  # fmt: skip


def random_weights(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def clip(kind=transformers.CLIPTextModel, seed=0):
    config = transformers.CLIPTextConfig(
        vocab_size=len(LETTERS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=12, projection_dim=WIDTH, eos_token_id=1,
        bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return random_weights(kind(config), seed)


def t5(seed=0):
    config = transformers.T5Config(
        vocab_size=len(LETTERS), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=2, num_heads=2
    )
    return random_weights(transformers.T5EncoderModel(config), seed)


def heads(**options):
    return {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, **options}


def unet():
    """One whose output depends on the text about as much as on the image."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    random_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn2." in name:
                parameter.mul_(8)
    return model


def stable_diffusion(model=None, scheduler=None):
    return diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=clip(), tokenizer=tokenizer(), unet=model or unet(),
        scheduler=scheduler or diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_3(third=True):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, caption_projection_dim=8,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, **heads(),
    )  # fmt: skip
    projected, wide = transformers.CLIPTextModelWithProjection, None
    if third:
        wide = random_weights(transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=len(LETTERS), d_model=2 * WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1,
                num_heads=2,
            )
        ))  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=FLOW(), vae=None, text_encoder=clip(projected),
        tokenizer=tokenizer(), text_encoder_2=clip(projected, 1), tokenizer_2=tokenizer(),
        text_encoder_3=wide, tokenizer_3=tokenizer() if third else None,
    )  # fmt: skip


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_single_layers=1, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), num_layers=1, attention_head_dim=8,
        num_attention_heads=2,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        FLOW(), None, clip(), tokenizer(), t5(), tokenizer(), model
    )  # fmt: skip


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        in_channels=1, out_channels=2, sample_size=8, patch_size=2, cross_attention_dim=8,
        caption_channels=WIDTH, norm_num_groups=4, use_additional_conditions=False, **heads(),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    return diffusers.PixArtAlphaPipeline(tokenizer(), t5(), None, model, scheduler)


def sana():
    model = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH, sample_size=8,
        **heads(),
    )  # fmt: skip
    return diffusers.SanaPipeline(tokenizer(3000), t5(), None, model, FLOW())


def qwen():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4), num_layers=1, attention_head_dim=8, num_attention_heads=2,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(FLOW(), None, t5(), tokenizer(1000), model)


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8,
        ffn_dim=8, num_attention_heads=2, attention_head_dim=8, num_layers=1,
    )  # fmt: skip
    # diffusers 0.35 calls it, installed or not.
    vars(pipeline_wan).setdefault("ftfy", SimpleNamespace(fix_text=str))
    return diffusers.WanPipeline(tokenizer(), t5(), None, FLOW(), model)


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=8, caption_channels=WIDTH,
        **heads(),
    )  # fmt: skip
    return diffusers.LTXPipeline(FLOW(), None, t5(), tokenizer(), model)


PIPELINES = {
    make.__name__: make
    for make in (stable_diffusion, stable_diffusion_3, flux, pixart, sana, qwen, wan, ltx)
}
