"""Uncertainty maps: closed forms on Gaussian data, linear decoders, brute force on others."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from families import FAMILIES
from family_pipelines import PIPELINES, make_pipeline, scheduler_of
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from small_autoencoders import make_vae, make_wan_vae

import ocm
from hessdiag.kernels import normal
from ocm.covariances.operators import diagonal
from ocm.integrations.latents import decode, encode

LATENT = (2, 5, 5)  # more features than probes
VARIANCES = torch.rand(LATENT, generator=torch.Generator().manual_seed(0)) + 0.1


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def independent_denoiser(variances=VARIANCES, t=300):
    """The mean of x0 ~ N(0, diag(variances)) on a flow, at t alone, and its posterior variances."""
    alpha, sigma = 1 - t / 1000, t / 1000
    total = alpha**2 * variances + sigma**2
    gain = alpha * variances / total
    denoiser = ocm.Denoiser(lambda x, time: gain.to(x) * x, ocm.flow(), "sample")
    return denoiser, variances * sigma**2 / total


class Stated(ocm.Covariance):
    """A covariance of the given variances."""

    def __init__(self, denoiser, variances):
        self.denoiser, self.variances = denoiser, variances

    def at(self, prediction):
        return diagonal(self.variances.expand(prediction.x_t.shape), prediction.x_t.shape)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# Without a decoder


@pytest.mark.parametrize("t", [50, 500, 900])
def test_maps_of_gaussian_data_are_those_of_bayes_rule(t):
    root = seeded(6, 6) * 0.3
    covariance, schedule = root @ root.T + 0.02 * torch.eye(6), ocm.cosine()
    denoiser = gaussian_denoiser(torch.zeros(6), covariance, schedule)
    found = ocm.uncertainty(denoiser, t, x_t=seeded(3, 1, 1, 6).double(), x0_range=None)
    exact = posterior_covariance(covariance, schedule, t).diagonal().sqrt()
    assert relative(found.std, exact.expand(3, 1, 1, 6)) < 1e-5
    assert found.raised == 0.0
    assert found.x0 is None
    assert found.latent is None


def test_the_default_is_exact_for_independent_pixels_and_any_number_of_them():
    denoiser, variances = independent_denoiser()
    found = ocm.uncertainty(denoiser, 300, x_t=seeded(2, *LATENT), x0_range=None)
    assert relative(found.std, variances.sqrt().expand(2, *LATENT)) < 1e-5
    denoiser, variances = independent_denoiser(VARIANCES.flatten())  # no image: no coloring
    found = ocm.uncertainty(denoiser, 300, x_t=seeded(2, 50), x0_range=None)
    assert relative(found.std, variances.sqrt().expand(2, 50)) < 1e-5


def test_a_video_has_a_map_of_its_shape():
    variances = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    denoiser, exact = independent_denoiser(variances)
    found = ocm.uncertainty(denoiser, 300, x_t=seeded(2, 2, 3, 4, 4), x0_range=None)
    assert relative(found.std, exact.sqrt().expand(2, 2, 3, 4, 4)) < 1e-5


def test_clean_images_are_noised_by_the_contract_whatever_the_batch():
    denoiser, _ = independent_denoiser()
    images = seeded(3, *LATENT).clamp(-1, 1)
    found = ocm.uncertainty(denoiser, 300, image=images, seed=5)
    noise = normal(images.shape, 5, step=300)
    torch.testing.assert_close(found.x_t, 0.7 * images + 0.3 * noise)
    assert found.x0 is images
    last = ocm.uncertainty(denoiser, 300, image=images[2:], seed=5, sample_offset=2)
    torch.testing.assert_close(last.std, found.std[2:])
    torch.testing.assert_close(last.x_t, found.x_t[2:])


def test_mean_and_variance_are_bounded_to_the_data():
    denoiser, _ = independent_denoiser()
    stated = Stated(denoiser, torch.full(LATENT, 9.0))
    found = ocm.uncertainty(stated, 300, x_t=10 * seeded(1, *LATENT))
    assert found.std.max() == 1.0
    assert found.mean.abs().max() == 1.0


def test_negative_variances_never_read_as_certain():
    denoiser, _ = independent_denoiser(torch.ones(4))
    stated = Stated(denoiser, torch.tensor([-3.0, -1.0, 1.0, 6.0]))
    found = ocm.uncertainty(denoiser, 300, x_t=seeded(1, 4), covariance=stated, x0_range=None)
    # The mean of 3 and 1, by which those two err at least.
    torch.testing.assert_close(found.std.square(), torch.tensor([[2.0, 2.0, 2.0, 6.0]]))
    assert found.raised == 0.5


def test_a_full_covariance_has_a_map():
    root = seeded(6, 6) * 0.3
    covariance, schedule = root @ root.T + 0.02 * torch.eye(6), ocm.cosine()
    full = ocm.Full(gaussian_denoiser(torch.zeros(6), covariance, schedule))
    found = ocm.uncertainty(full, 500, x_t=seeded(2, 1, 1, 6).double(), x0_range=None)
    exact = posterior_covariance(covariance, schedule, 500).diagonal().sqrt()
    assert relative(found.std, exact.expand(2, 1, 1, 6)) < 1e-5


def test_a_calibrated_covariance_knows_its_denoiser():
    denoiser, variances = independent_denoiser()
    calibrated = ocm.calibrate(denoiser, ocm.Exact(denoiser), 0.1 * seeded(8, *LATENT), [300])
    found = ocm.uncertainty(calibrated, 300, x_t=seeded(1, *LATENT))
    scale, shift = calibrated.weights.at(None, 300).tolist()
    torch.testing.assert_close(found.std[0].square(), scale * variances + shift)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, r"image .* or x_t .* must be given, got neither"),
        ({"image": 0, "x_t": 0}, ValueError, "must be given, got both"),
        ({"image": torch.full((1, *LATENT), torch.nan)}, ValueError, "image must be finite"),
        ({"x_t": torch.ones(1, *LATENT, dtype=torch.long)}, TypeError, "x_t must be a real float"),
        ({"x_t": seeded(1, *LATENT), "way": "jacobian"}, ValueError, "way must be one of draws"),
        ({"x_t": seeded(1, *LATENT), "num_draws": 1}, ValueError, "at least 2 num_draws"),
        ({"x_t": seeded(1, *LATENT), "model": torch.nn.Identity()}, TypeError, "got Identity"),
    ],
)
def test_errors_name_the_argument(options, error, match):
    with pytest.raises(error, match=match):
        ocm.uncertainty(options.pop("model", independent_denoiser()[0]), 300, **options)


def test_two_covariances_are_one_too_many():
    denoiser, _ = independent_denoiser()
    exact = ocm.Exact(denoiser)
    with pytest.raises(ValueError, match="model must be a denoiser beside a covariance"):
        ocm.uncertainty(exact, 300, x_t=seeded(1, *LATENT), covariance=exact)


# Pipelines


def make_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()


def test_a_pipeline_says_what_its_denoiser_says():
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(prediction_type="v_prediction"))
    images = seeded(2, 3, 8, 8).clamp(-1, 1)
    found = ocm.uncertainty(pipeline, 400, image=images)
    denoiser = ocm.Denoiser(pipeline.unet, ocm.linear(), "v_prediction")
    expected = ocm.uncertainty(denoiser, 400, image=images)
    torch.testing.assert_close(found.std, expected.std, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-3, atol=1e-5)


def test_the_head_of_an_attached_model_states_the_map():
    model = ocm.attach(make_unet())
    torch.nn.init.normal_(model.head.head.conv.weight, std=0.3)
    scheduler = DDPMScheduler()
    pipeline = DDPMPipeline(model, model.scheduler(scheduler))
    x_t = seeded(2, 3, 8, 8)
    found = ocm.uncertainty(pipeline, 400, x_t=x_t)
    covariance = model.covariance(scheduler)
    with torch.no_grad():
        variance = covariance.at(covariance.denoiser.predict(x_t, 400)).diagonal()
    torch.testing.assert_close(found.std, variance.clamp(max=1.0).sqrt(), rtol=1e-3, atol=1e-5)
    by_products = ocm.uncertainty(pipeline, 400, x_t=x_t, covariance=ocm.Exact(covariance.denoiser))
    assert relative(by_products.std, found.std) > 0.1


def test_a_pipeline_of_two_transformers_is_refused():
    pipeline = SimpleNamespace(
        transformer=lambda x, t: x, transformer_2=lambda x, t: x, scheduler=DDPMScheduler()
    )
    with pytest.raises(TypeError, match="one unet or transformer"):
        ocm.uncertainty(pipeline, 10, x_t=seeded(1, 3, 8, 8))


# Decoders


def linear_vae(features=50, pixels=(3, 6, 6), scaling=0.5):
    """A decoder z -> W z / scaling, W of a few entries a row and so of correlated pixels."""
    W = seeded(3 * 36, features) * (seeded(3 * 36, features).roll(1, 0) > 0.5)

    def sample(z):
        return SimpleNamespace(sample=(z.flatten(1) @ W.to(z).T).reshape(-1, *pixels))

    vae = SimpleNamespace(
        config={"scaling_factor": scaling}, device="cpu", dtype=torch.float32, decode=sample
    )
    return vae, W / scaling


def latent_pipeline(vae, t=300):
    """A flow of latents (4, ...), whose velocity is that of x0 ~ N(0, I / 2)."""
    sigma = t / 1000
    gain = 0.5 * (1 - sigma) / (0.5 * (1 - sigma) ** 2 + sigma**2)
    return SimpleNamespace(
        transformer=lambda x, time: (1 - gain) / sigma * x,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
    )


@pytest.mark.parametrize("way", ["draws", "products"])
def test_a_linear_decoder_gives_the_diagonal_in_closed_form(way):
    vae, J = linear_vae()
    M = 300
    found = ocm.uncertainty(latent_pipeline(vae), 300, x_t=seeded(2, *LATENT), way=way, num_draws=M)
    variance = 0.5 * 0.09 / (0.5 * 0.49 + 0.09)  # of x0 ~ N(0, I / 2) given x_t
    exact = (J.square().sum(dim=1) * variance).sqrt().reshape(3, 6, 6).expand(2, 3, 6, 6)
    # The relative standard error of each is sqrt(1 / (2 M)).
    standardised = (found.std / exact - 1) * (2 * M) ** 0.5
    assert standardised.abs().max() < 5.0
    assert 0.6 < standardised.square().mean() < 1.6
    torch.testing.assert_close(found.mean, decode(vae, found.latent.mean))
    assert (found.latent.std - variance**0.5).abs().max() < 1e-4
    assert found.latent.mean.abs().max() > 1.5  # latents have no bounds


def test_the_draws_of_one_image_do_not_depend_on_the_batch():
    vae, images = make_vae(), seeded(3, 3, 8, 8).clamp(-1, 1)
    pipeline = latent_pipeline(vae)
    together = ocm.uncertainty(pipeline, 300, image=images, num_draws=4)
    alone = ocm.uncertainty(pipeline, 300, image=images[2:], num_draws=4, sample_offset=2)
    torch.testing.assert_close(alone.std, together.std[2:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together.x0, decode(vae, encode(vae, images, mean=True)))
    assert together.x_t.shape == together.std.shape == images.shape


def test_sums_over_draws_keep_their_digits_in_half_precision():
    images = seeded(1, 3, 8, 8).clamp(-1, 1)
    full, half = (
        ocm.uncertainty(latent_pipeline(make_vae().to(dtype)), 300, image=images, num_draws=16)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.std.dtype == half.mean.dtype == torch.float32
    assert relative(half.std, full.std) < 0.05


def test_the_latents_of_a_video_are_decoded():
    vae = make_wan_vae()
    videos = seeded(1, 3, 5, 16, 16).clamp(-1, 1)  # two frames of 2x2 latents
    found = ocm.uncertainty(latent_pipeline(vae), 300, image=videos, num_draws=3)
    assert found.latent.std.shape == (1, 4, 2, 2, 2)
    assert found.mean.shape == found.std.shape == found.x0.shape == videos.shape
    assert found.std.min() > 0


def test_decoded_maps_follow_the_decoder_of_an_autoencoder():
    """Products: J by brute force in float64. Draws: torch's own normal numbers, many more."""
    vae = make_vae().double().requires_grad_(False)
    M, std = 64, (0.5 * 0.49 / (0.5 * 0.09 + 0.49)) ** 0.5  # at t = 700
    found = {
        way: ocm.uncertainty(
            latent_pipeline(vae, 700), 700, x_t=seeded(1, 4, 2, 2).double(), way=way, num_draws=M
        )
        for way in ("draws", "products")
    }
    z = found["draws"].latent.mean
    J = torch.autograd.functional.jacobian(lambda z: vae.decode(z / 0.4).sample, z)
    tangent = (J.reshape(-1, 16).square().sum(dim=1)).sqrt() * std
    draws = z + std * torch.randn(
        2000, 4, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    spread = decode(vae, draws, batch_size=500).std(0).flatten()
    error = (1 / (2 * M)) ** 0.5  # 0.09
    assert relative(found["products"].std.flatten(), tangent) < 2 * error
    assert relative(found["draws"].std.flatten(), spread) < 2 * error
    # The two differ by more: this decoder bends over the width of the posterior.
    assert relative(tangent, spread) > 4 * error


def test_latents_in_another_scale_are_refused():
    """Euler's are x0 + sigma n; of clean images x_t is made on the right path."""
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler())
    pipeline.scheduler = EulerDiscreteScheduler()
    x = seeded(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"latents of EulerDiscreteScheduler are x0 \+ sigma n"):
        ocm.uncertainty(pipeline, 400, x_t=x)
    assert ocm.uncertainty(pipeline, 400, image=x.tanh()).std.isfinite().all()


def test_a_decoder_by_another_name_is_not_passed_over():
    pipeline = SimpleNamespace(unet=make_unet(), scheduler=DDPMScheduler(), vqvae=make_vae())
    with pytest.raises(TypeError, match="must decode by a vae, and SimpleNamespace has a vqvae"):
        ocm.uncertainty(pipeline, 400, image=seeded(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["QwenImagePipeline", "SanaPipeline"])
def test_autoencoders_with_frames_and_without_a_distribution(name):
    """Qwen-Image's takes images for videos; Sana's encodes to a point."""
    kind = PIPELINES[name][0]
    pipeline = make_pipeline(name, FAMILIES[kind].make(), scheduler_of(name))
    size = 32 if name == "QwenImagePipeline" else 16
    image = seeded(1, 3, size, size).tanh()
    latents = encode(pipeline.vae, image)
    assert latents.dim() == 4
    z = image[:, :, None] if name == "QwenImagePipeline" else image
    with torch.no_grad():
        encoded = pipeline.vae.encode(z)
    if name == "SanaPipeline":
        torch.testing.assert_close(latents, 0.4 * encoded.latent)
    else:
        mean = encoded.latent_dist.mean[:, :, 0] - torch.tensor([0.2, -0.1]).reshape(2, 1, 1)
        mean = mean / torch.tensor([1.5, 0.8]).reshape(2, 1, 1)
        torch.testing.assert_close(encode(pipeline.vae, image, mean=True), mean)
    denoiser = FAMILIES[kind].denoiser(pipeline.transformer)
    condition = FAMILIES[kind].condition(denoiser, batch=1)
    for way in ("draws", "products"):
        found = ocm.uncertainty(
            pipeline, 500, image=image, condition=condition, way=way, num_draws=2
        )
        assert found.std.shape == found.mean.shape == image.shape
        assert found.std.isfinite().all()
