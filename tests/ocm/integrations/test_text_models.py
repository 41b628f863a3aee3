"""Text-to-image backbones: as denoisers, attached, and in diffusers' own pipeline."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

import ocm
from ocm.integrations.attached import CovarianceModel

WIDTH = 8


def make_unet():
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )


def make_pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        norm_num_groups=4,
        use_additional_conditions=False,
    )


def random_weights(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def attached(make):
    model = ocm.attach(random_weights(make()))
    random_weights(model.head)
    return model


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [make_unet, make_pixart])
def test_attached_it_states_prediction_and_variance_for_each_text(make, tmp_path):
    model, scheduler = attached(make), DDPMScheduler()
    x, text = random(2, 2, 4, 4), random(2, 3, WIDTH, seed=2)
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    condition = denoiser.condition(tensors={"encoder_hidden_states": text})
    with torch.no_grad():
        output = model(x, 299, encoder_hidden_states=text).sample
        alone = model.backbone(
            x, timestep=torch.tensor([299, 299]), encoder_hidden_states=text
        ).sample
    prediction = denoiser.predict(x, 300, condition=condition)
    torch.testing.assert_close(output[:, :2], alone[:, :2])
    torch.testing.assert_close(output[:, :2], prediction.output)
    unit = model.parameterisation.scale(denoiser.schedule, 300).float()
    torch.testing.assert_close(output[:, 2:] * unit, covariance.at(prediction).diagonal())
    swapped = model(x, 299, encoder_hidden_states=text.flip(0)).sample
    assert not torch.allclose(swapped, output, atol=1e-3)

    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 299, encoder_hidden_states=text).sample, output)


@pytest.mark.parametrize("make", [make_unet, make_pixart])
def test_as_a_denoiser_it_is_guided_and_differentiated(make):
    model, w = attached(make), 3.0
    covariance = model.covariance(DDPMScheduler())
    denoiser = covariance.denoiser
    x, text, nothing = random(2, 2, 4, 4), random(2, 3, WIDTH, seed=2), random(1, 3, WIDTH, seed=3)

    def at(tensors, **options):
        condition = denoiser.condition(tensors={"encoder_hidden_states": tensors}, **options)
        return denoiser.predict(x, 300, condition=condition)

    both = at(text, null_tensors={"encoder_hidden_states": nothing}, guidance_scale=w)
    apart = [(1 - w, at(nothing.expand(2, -1, -1))), (w, at(text))]
    for what in (covariance, ocm.Hutchinson(denoiser, 4), ocm.Exact(denoiser)):
        expected = sum(weight * what.at(one).diagonal() for weight, one in apart)
        torch.testing.assert_close(what.at(both).diagonal(), expected, atol=1e-3, rtol=1e-3)
    images = ocm.sample(denoiser, covariance, x.shape, 3, condition=both.condition, x0_range=None)
    assert images.isfinite().all()
    with pytest.raises(ValueError, match="needs encoder_hidden_states for each sample"):
        denoiser.predict(x, 300).output  # noqa: B018


def test_it_works_in_diffusers_own_pipeline():
    """What the scheduler is handed under guidance is what the denoiser states."""
    model, w = attached(make_unet), 3.0
    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=2, block_out_channels=(4,), norm_num_groups=2, sample_size=4
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=model.scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    handed = []
    step = pipeline.scheduler.step

    def recorded(output, t, sample, **options):
        handed.append((output, t, sample))
        return step(output, t, sample, **options)

    pipeline.scheduler.step = recorded
    text, nothing = random(2, 3, WIDTH, seed=2), random(2, 3, WIDTH, seed=3)
    images = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=nothing,
        guidance_scale=w,
        num_inference_steps=3,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()
    assert len(handed) == 3
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    condition = denoiser.condition(
        tensors={"encoder_hidden_states": text},
        null_tensors={"encoder_hidden_states": nothing},
        guidance_scale=w,
    )
    for output, t, sample in handed:
        prediction = denoiser.predict(sample, int(t) + 1, condition=condition)
        torch.testing.assert_close(output[:, :2], prediction.output, atol=1e-4, rtol=1e-4)
        unit = model.parameterisation.scale(denoiser.schedule, int(t) + 1).float()
        variance = covariance.at(prediction).diagonal()
        torch.testing.assert_close(output[:, 2:] * unit, variance, atol=1e-4, rtol=1e-4)


def test_a_unet_of_inpainting_is_refused():
    unet = UNet2DConditionModel(
        in_channels=5,
        out_channels=2,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="in_channels = 5, out_channels = 2"):
        ocm.attach(unet)
