"""OCMDiTPipeline and latents: tiny models with random weights, through the real way to disk."""

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from small_autoencoders import make_vae

import ocm
from hessdiag.kernels import normal
from ocm.diffusion.conditions import guided
from ocm.integrations.latents import decode, encode, load_autoencoder
from ocm.integrations.pipelines import OCMDiTPipeline

CLASSES = 5


def make_dit(learned_sigma=False):
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8 if learned_sigma else 4,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=CLASSES,
    )
    with torch.no_grad():  # some layers start at zero
        for parameter in dit.parameters():
            parameter.normal_(std=0.2)
    return dit.eval()


def make_pipeline(learned_sigma=False, vae=None, **options):
    model = ocm.attach(
        make_dit(learned_sigma), parameterisation=ocm.Parameterisation(1.2, positive=True)
    )
    torch.nn.init.normal_(model.head.out.weight, std=0.3)
    theirs = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear")
    pipeline = OCMDiTPipeline(model, vae or make_vae(), model.scheduler(theirs, **options))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("learned_sigma", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("eta", [None, 0.3])
def test_its_latents_are_those_of_ocm_sample(monkeypatch, learned_sigma, guidance_scale, eta):
    """On the same noise, guided by a condition; DDPM, or DDIM whose eta the configuration has."""
    pipeline = make_pipeline(learned_sigma)
    sampler, config = ocm.ddpm, pipeline.scheduler.config
    pipeline.scheduler = ocm.OCMScheduler.from_config(config, timestep_spacing="trailing")
    if eta is not None:
        sampler = functools.partial(ocm.ddim, eta=eta)
        pipeline.scheduler = ocm.OCMDDIMScheduler.from_config(pipeline.scheduler, eta=eta)
    labels, steps, seed = [3, 0], [250, 500, 750, 1000], 7
    covariance = pipeline.transformer.covariance(pipeline.scheduler)
    denoiser = covariance.denoiser
    condition = denoiser.condition(torch.tensor(labels), guidance_scale)
    expected = ocm.sample(
        denoiser,
        covariance,
        (2, 4, 4, 4),
        steps,
        sampler=sampler,
        condition=condition,
        seed=seed,
        x0_range=None,
    )
    draws = iter([0, *steps[:0:-1]])

    def contract(shape, **options):
        step = next(draws, None)  # ocm.sample adds no noise in its last step
        return torch.zeros(shape) if step is None else normal(shape, seed, step=step)

    monkeypatch.setattr("ocm.integrations.pipelines.randn_tensor", contract)
    monkeypatch.setattr("ocm.integrations.gaussian_steps.randn_tensor", contract)
    passes = []
    pipeline.transformer.backbone.register_forward_hook(lambda *_: passes.append(1))
    latents = pipeline(labels, guidance_scale, num_inference_steps=4, output_type="latent").images
    assert len(passes) == 4
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance_of_gaussians_is_exact(w):
    """q(x_t)^(1-w) q(x_t | c)^w of Gaussians: its score and Hessian, by differentiating its log."""
    schedule, t = ocm.linear(), 600
    alpha_bar, beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
    unit = ocm.PAPER.scale(schedule, t)
    x_t = torch.tensor([0.3, -1.1, 0.7], dtype=torch.float64)
    moments = [
        (0.2, torch.tensor([2.0, 1.0, 0.5]).double()),
        (-0.4, torch.tensor([0.3, 0.8, 0.4]).double()),
    ]

    def log_density(x):
        logs = [
            -((x - alpha_bar.sqrt() * mean) ** 2 / (alpha_bar * variance + beta_bar)).sum() / 2
            for mean, variance in moments
        ]
        return (1 - w) * logs[0] + w * logs[1]

    stated = []
    for mean, variance in moments:
        marginal = alpha_bar * variance + beta_bar
        epsilon = beta_bar.sqrt() * (x_t - alpha_bar.sqrt() * mean) / marginal
        posterior = 1 / (1 / variance.double() + alpha_bar / beta_bar)  # Bayes' rule
        stated.append(torch.cat([epsilon, posterior / unit]))
    epsilon, ratio = guided(torch.cat(stated), w).chunk(2)

    score = torch.autograd.functional.jacobian(log_density, x_t)
    hessian = torch.autograd.functional.hessian(log_density, x_t).diagonal()
    torch.testing.assert_close(epsilon, -beta_bar.sqrt() * score)
    expected = beta_bar / alpha_bar * (1 + beta_bar * hessian)  # Tweedie's formula, twice
    torch.testing.assert_close(unit * ratio, expected)


def test_saved_and_loaded_it_draws_the_same_images(tmp_path, caplog):
    pipeline = make_pipeline(learned_sigma=True)
    pipeline.save_pretrained(tmp_path)
    loaded = OCMDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer, ocm.CovarianceModel)
    assert isinstance(loaded.scheduler, ocm.OCMDDIMScheduler)
    options = {"num_inference_steps": 3, "output_type": "np"}
    images = [one([1, 2], generator=generators(2), **options).images for one in (pipeline, loaded)]
    assert images[0].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(*images)
    assert not caplog.records


def test_images_are_decoded_latents_in_every_output_type():
    pipeline = make_pipeline()
    options = {"class_labels": torch.tensor([1, 4]), "num_inference_steps": 3}

    def images(output_type):
        return pipeline(generator=generators(2), output_type=output_type, **options).images

    latents = images("latent")
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents / 0.4).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images("pt"), expected)
    np.testing.assert_allclose(images("np"), expected.permute(0, 2, 3, 1), atol=1e-6)
    pictures = images("pil")
    assert [picture.size for picture in pictures] == [(8, 8), (8, 8)]
    as_tuple = pipeline(generator=generators(2), output_type="pt", return_dict=False, **options)
    torch.testing.assert_close(as_tuple[0], expected)


def test_a_generator_for_each_image_makes_it_independent_of_the_batch():
    pipeline = make_pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent"}
    together = pipeline([1, 4], generator=generators(2), **options).images
    alone = pipeline([4], generator=generators(2)[1:], **options).images
    # Products of matrices may round differently in another batch, and the first step, from almost
    # pure noise, multiplies that by hundreds; other noise would be a difference of order 1.
    assert (together[1:] - alone).norm() < 1e-3 * alone.norm()


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_diffusers_own_dit_pipeline_hands_the_variance_on(learned_sigma):
    """It guides the prediction alone, and its scheduler gets no generator."""
    ours = make_pipeline(learned_sigma=learned_sigma)
    theirs = DiTPipeline(ours.transformer, ours.vae, ours.scheduler)
    images = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        options = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 1.0}
        images.append(pipeline([1], **options).images)
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)


def test_arguments_that_make_no_sense_are_refused():
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=r"output_type must be one of pil.*'jpg'"):
        pipeline([1], output_type="jpg")
    for labels in ([5], [-1], []):
        with pytest.raises(ValueError, match=r"class_labels must be classes in 0 .. 4, got"):
            pipeline(labels)
    with pytest.raises(TypeError, match=r"transformer must be ocm.attach\(transformer\)"):
        OCMDiTPipeline(pipeline.transformer.backbone, pipeline.vae, pipeline.scheduler)
    with pytest.raises(TypeError, match=r"scheduler its .* got CovarianceModel and DDPM"):
        OCMDiTPipeline(pipeline.transformer, pipeline.vae, DDPMScheduler())
    config = pipeline.scheduler.config
    pipeline.scheduler = ocm.OCMScheduler.from_config(config, data_std=None)
    with pytest.raises(ValueError, match=r"data_std = 1.2, got .* data_std = None"):
        pipeline([1])
    pipeline.scheduler = ocm.OCMScheduler.from_config(config, clip_sample=True)
    with pytest.raises(ValueError, match=r"scheduler must not clip latents"):
        pipeline([1])


# --- latents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_those_of_the_autoencoder(tmp_path, shift):
    make_vae(shift_factor=shift).save_pretrained(tmp_path)
    vae = load_autoencoder(tmp_path)
    assert not vae.training
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        means = encode(vae, images, mean=True, batch_size=2)
        torch.testing.assert_close(means, (posterior.mean - (shift or 0.0)) * 0.4)
        draws = encode(vae, images, seed=3, sample_offset=2)
        z = normal(draws.shape, 3, step=2**32 - 3, sample_offset=2)
        expected = (posterior.mean + posterior.std * z - (shift or 0.0)) * 0.4
        torch.testing.assert_close(draws, expected)
        torch.testing.assert_close(
            torch.cat(
                [encode(vae, images[:3], seed=3), encode(vae, images[3:], seed=3, sample_offset=3)]
            ),
            encode(vae, images, seed=3, batch_size=2),
        )
        pixels = vae.decode(posterior.mean).sample
        torch.testing.assert_close(decode(vae, means, batch_size=2), pixels)


def test_autoencoders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="path must be the folder of AutoencoderKL"):
        load_autoencoder(tmp_path / "nowhere")
    make_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("post_quant_conv.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"(?s)holds no AutoencoderKL that fits: .*post_quant_conv"
    ):
        load_autoencoder(tmp_path)
    vae = make_vae()
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="holds no AutoencoderKL that fits"):
        load_autoencoder(tmp_path)
    for tables in (
        {"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 4},
        {"latents_std": (1.0,) * 4},
    ):
        with pytest.raises(ValueError, match=r"a number for each of 4 channels"):
            decode(make_vae(**tables), torch.zeros(1, 4, 4, 4))
    vae.register_to_config(scaling_factor=None)
    with pytest.raises(ValueError, match=r"vae must have a scaling_factor .* got None"):
        decode(vae, torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="batch_size must be"):
        encode(make_vae(), torch.zeros(1, 3, 8, 8), batch_size=0)


def test_an_unconditional_model_of_latents_is_trained_sampled_and_decoded():
    vae = make_vae()
    latents = encode(vae, torch.rand(8, 3, 8, 8) * 2 - 1)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    covariance = ocm.attach(unet).covariance(DDPMScheduler())
    settings = ocm.TrainingSettings(num_steps=2, batch_size=4)
    ocm.train_head(covariance, latents, settings, progress=False)
    drawn = ocm.sample(covariance.denoiser, covariance, (2, 4, 4, 4), [1, 500, 1000], x0_range=None)
    images = decode(vae, drawn)
    assert images.shape == (2, 3, 8, 8)
    assert bool(torch.isfinite(images).all())
