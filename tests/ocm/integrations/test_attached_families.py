"""ocm.attach on every family, called as its pipeline calls it, and the way to disk and back."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from families import FAMILIES
from family_pipelines import make_vae

import ocm
from ocm.integrations.attached import CovarianceModel


def attached(name):
    model = ocm.attach(FAMILIES[name].make(), parameterisation=ocm.Parameterisation(0.7, True))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
    return model


def half_of(model, number):
    """One half of what the model puts out, as a model that a pipeline's way of calling can take."""

    class Half(SimpleNamespace):
        def __call__(self, *args, **kwargs):
            output = model(*args, **kwargs)[0]
            x_t = kwargs.get("hidden_states", args[0] if args else None)
            assert output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
            return (output.chunk(2, dim=1)[number],)

    return Half(config=model.config)


def given_to(name):
    family = FAMILIES[name]
    labels = {} if family.classes is None else {"class_labels": family.labels()}
    return {**family.tensors(), **labels}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_states_prediction_and_variance_and_is_saved(name, tmp_path):
    family, model, x = FAMILIES[name], attached(name), FAMILIES[name].x_t()
    t = 500  # sigma = 0.5, of which bfloat16 loses nothing
    is_flow = family.prediction_type == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if is_flow else DDPMScheduler()
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    assert denoiser.prediction_type == family.prediction_type
    prediction = denoiser.predict(x, t, condition=family.condition(denoiser))
    time = torch.tensor(float(t)) if is_flow else torch.tensor(t - 1)
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        stated = [family.native(half_of(model, i), x, time, **given_to(name)) for i in range(2)]
    assert len(passes) == 2
    torch.testing.assert_close(stated[0], prediction.output, atol=1e-5, rtol=1e-5)
    unit = model.parameterisation.scale(denoiser.schedule, t).float()
    variance = covariance.at(prediction).diagonal()
    assert variance.std() > 0.01 * variance.mean()
    torch.testing.assert_close(stated[1] * unit, variance, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert type(loaded) is CovarianceModel
    with torch.no_grad():
        for i in range(2):
            again = family.native(half_of(loaded, i), x, time, **given_to(name))
            torch.testing.assert_close(again, stated[i], atol=1e-5, rtol=1e-5)
    half = CovarianceModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    kept = type(model.backbone)._keep_in_fp32_modules or []
    for key, parameter in half.named_parameters():
        stays = key.startswith("head.") or any(part in kept for part in key.split("."))
        assert parameter.dtype == (torch.float32 if stays else torch.bfloat16), key
    lower = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given_to(name).items()}
    with torch.no_grad():
        for i in range(2):
            again = family.native(half_of(half, i), x.bfloat16(), time, **lower)
            assert again.dtype == torch.bfloat16
            torch.testing.assert_close(again.float(), stated[i], atol=0.1, rtol=0.1)


def test_what_is_missing_from_a_call_is_named():
    model = attached("SD3Transformer2DModel")
    with pytest.raises(ValueError, match=r"sample \(or hidden_states\) and timestep must be given"):
        model(torch.zeros(1, 2, 2, 6))


def test_a_timestep_for_each_token_reaches_the_backbone():
    """Wan's and LTX-Video's pipelines that start from an image tell some tokens another time."""
    family, model = FAMILIES["WanTransformer3DModel"], attached("WanTransformer3DModel")
    x, times = family.x_t(), torch.tensor([[0.0, 500.0, 500.0, 0.0]]).expand(2, 4)
    output = model(hidden_states=x, timestep=times, **family.tensors()).sample
    alone = model.backbone(x, timestep=times, **family.tensors()).sample
    assert torch.equal(output[:, :2], alone)


def test_a_timestep_for_each_packed_token_is_refused():
    """LTX-Video's pipelines that start from an image take the output apart by its grid."""
    family, model = FAMILIES["LTXVideoTransformer3DModel"], attached("LTXVideoTransformer3DModel")
    times = torch.full((2, 6), 500.0)
    with pytest.raises(ValueError, match="one for each sample, got one for each token"):
        model(hidden_states=torch.zeros(2, 6, 4), timestep=times, **family.tensors())


def test_by_place_it_takes_what_its_backbone_takes_third():
    model, x = attached("UNet2DConditionModel"), FAMILIES["UNet2DConditionModel"].x_t()
    text = FAMILIES["UNet2DConditionModel"].tensors()["encoder_hidden_states"]
    by_name = model(x, 500, encoder_hidden_states=text).sample
    assert torch.equal(model(x, 500, text).sample, by_name)


def test_pipelines_find_what_they_look_for_in_the_backbone():
    model = attached("UNet2DConditionModel")
    assert model.attn_processors.keys() == model.backbone.attn_processors.keys()
    assert not hasattr(model, "_hf_hook")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        model.nothing_of_the_kind  # noqa: B018


def test_saved_in_two_variants_it_is_loaded_as_either(tmp_path):
    """Pipelines look for the options among the arguments of save_pretrained."""
    unet = FAMILIES["UNet2DModel"]
    model = ocm.attach(unet.make())
    pipeline = DDPMPipeline(model, model.scheduler(DDPMScheduler()))
    pipeline.save_pretrained(tmp_path)
    pipeline.save_pretrained(tmp_path, variant="other", max_shard_size="20KB")
    files = sorted(file.name for file in (tmp_path / "unet").glob("*.safetensors"))
    assert files[0] == "diffusion_pytorch_model.other-00001-of-00003.safetensors"
    assert files[-1] == "diffusion_pytorch_model.safetensors"
    x = unet.x_t()
    for options in ({}, {"variant": "other"}):
        loaded = CovarianceModel.from_pretrained(tmp_path, subfolder="unet", **options)
        torch.testing.assert_close(loaded(x, 9).sample, model(x, 9).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positive", [True, False])
def test_in_a_pipeline_of_sdxl(positive):
    """It asks the U-Net for its embedding of sizes. Without a variance it draws what it did."""
    torch.manual_seed(0)
    family = FAMILIES["UNet2DConditionModel"]
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    config = {**family.config, **sizes, "projection_class_embeddings_input_dim": 6 * 4 + 6}
    unet = type(family)(**{**vars(family), "config": config}).make()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    model = ocm.attach(unet, parameterisation=ocm.Parameterisation(1.0, positive))
    if not positive:
        torch.nn.init.constant_(model.head.head.conv.bias, -1.0)
    texts = {
        f"{which}{kind}_embeds": torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for seed, which in enumerate(("", "negative_"))
        for kind, shape in (("prompt", (2, 5, 12)), ("pooled_prompt", (2, 6)))
    }
    drawn = []
    for backbone, steps in ((unet, scheduler), (model, model.scheduler(scheduler))):
        vae = make_vae(2, scaling_factor=0.4)
        parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None}
        pipeline = StableDiffusionXLPipeline(
            vae, **parts, tokenizer_2=None, unet=backbone, scheduler=steps, add_watermarker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            **texts,
            guidance_scale=3.0,
            num_inference_steps=3,
            height=8,
            width=24,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        drawn.append(images)
    assert drawn[0].isfinite().all()
    assert torch.allclose(*drawn, atol=1e-3) is not positive
