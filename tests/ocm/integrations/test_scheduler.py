"""OCMScheduler: a battery like diffusers' for its own, its own formulas, and its pipelines."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

import ocm
from hessdiag.kernels import normal
from ocm.integrations.scheduler import OCMScheduler

SHAPE = (4, 3, 8, 8)


def sample_and_output(channels=6):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    return sample, torch.randn(4, channels, 8, 8, generator=generator) * 0.3


def stepped(scheduler, t, seed=3):
    sample, output = sample_and_output()
    return scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(seed))


# --- configuration -----------------------------------------------------------------------------

CONFIGS = [
    {},
    {"num_train_timesteps": 100},
    {"beta_start": 0.001, "beta_end": 0.03},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": np.linspace(0.001, 0.1, 40)},
    {"trained_betas": torch.linspace(0.001, 0.1, 40)},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"clip_sample_range": 0.5},
    {"eta": 0.3, "data_std": 0.5},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "max_last_noise": 0.01},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: " ".join(config) or "defaults")
def test_saved_and_loaded_it_takes_the_same_steps(config, tmp_path):
    scheduler = OCMScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = OCMScheduler.from_pretrained(tmp_path)
    again = OCMScheduler.from_config(loaded.config)
    for other in (loaded, again):
        assert dict(other.config) == dict(loaded.config)
        for one in (scheduler, other):
            one.set_timesteps(7)
        assert torch.equal(other.timesteps, scheduler.timesteps)
        t = scheduler.timesteps[-2]
        assert torch.equal(stepped(other, t).prev_sample, stepped(scheduler, t).prev_sample)


def test_what_each_configuration_means_shows_in_a_step():
    """No entry is read and forgotten."""
    plain = OCMScheduler()
    plain.set_timesteps(7)
    t = plain.timesteps[-2]
    expected = stepped(plain, t).prev_sample
    for config in CONFIGS[2:6] + CONFIGS[8:12] + [{"max_last_noise": 0.0}]:
        other = OCMScheduler(**config)
        other.set_timesteps(7)
        assert not torch.allclose(stepped(other, t).prev_sample, expected), config


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_made_from_the_configuration_of_diffusers_schedulers_and_back(cls, caplog):
    theirs = cls(
        num_train_timesteps=100,
        beta_schedule="scaled_linear",
        beta_start=0.002,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    ours = OCMScheduler.from_config(theirs.config, eta=0.5)
    assert (ours.config.eta, ours.config.prediction_type) == (0.5, "v_prediction")
    assert ours.config.clip_sample is False
    assert not caplog.records  # nothing of theirs is refused
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    torch.testing.assert_close(ours.betas, theirs.betas)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    back = cls.from_config(ours.config)
    kept = set(theirs.config) - {"_use_default_values"}
    assert {name: back.config[name] for name in kept} == {
        name: theirs.config[name] for name in kept
    }
    assert cls in ours.compatibles


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon.*'flow'"),
        ({"timestep_spacing": "uneven"}, "timestep_spacing must be one of even.*'uneven'"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be positive, got 0.0"),
        ({"max_last_noise": -1.0}, "max_last_noise must be at least 0, got -1.0"),
        ({"data_std": 0.0}, "data_std must be positive, got 0.0"),
        ({"thresholding": True}, "thresholding must be False.*clip_sample"),
        ({"beta_schedule": "spline"}, "no betas of a DDPMScheduler"),
        ({"rescale_betas_zero_snr": True}, r"betas must be .* in \(0, 1\)"),
    ],
)
def test_configurations_that_it_cannot_do_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        OCMScheduler(**config)
    theirs = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
    with pytest.raises(ValueError, match=message):
        OCMScheduler.from_config(theirs | config)


# --- timesteps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["even", "linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_timesteps(spacing, steps):
    scheduler = OCMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps, device="cpu")
    timesteps = scheduler.timesteps
    assert timesteps.dtype == torch.int64
    assert len(timesteps) == scheduler.num_inference_steps == steps
    assert bool((timesteps.diff() < 0).all())
    if spacing == "even":
        assert [t + 1 for t in timesteps.tolist()][::-1] == ocm.even_timesteps(ocm.linear(), steps)
    else:
        theirs = DDPMScheduler(timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        assert timesteps.tolist() == theirs.timesteps.tolist()


def test_the_offset_of_leading_timesteps():
    theirs, ours = (
        cls(timestep_spacing="leading", steps_offset=1) for cls in (DDIMScheduler, OCMScheduler)
    )
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    with pytest.raises(ValueError, match=r"timesteps must decrease from at most 999.*1000"):
        ours.set_timesteps(1000)  # whose first would be 1000


def test_before_set_timesteps_every_level_is_visited():
    scheduler = OCMScheduler(num_train_timesteps=10)
    assert scheduler.timesteps.tolist() == list(range(9, -1, -1))
    assert (len(scheduler), scheduler.order, scheduler.init_noise_sigma) == (10, 1, 1.0)


def test_custom_timesteps():
    scheduler = OCMScheduler()
    for timesteps in ([900, 400, 30], torch.tensor([900, 400, 30])):
        scheduler.set_timesteps(timesteps=timesteps)
        assert scheduler.timesteps.tolist() == [900, 400, 30]
        assert scheduler.custom_timesteps
        assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "one of num_inference_steps and timesteps must be given"),
        ({"num_inference_steps": 2, "timesteps": [5, 1]}, ValueError, "one of num_inference_steps"),
        ({"num_inference_steps": 1001}, ValueError, "at most num_train_timesteps = 1000, got 1001"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be"),
        ({"num_inference_steps": 2.0}, TypeError, "num_inference_steps must be"),
        ({"timesteps": [1, 5]}, ValueError, r"timesteps must decrease.*\[1, 5\]"),
        ({"timesteps": [5, 5]}, ValueError, "timesteps must decrease"),
        ({"timesteps": [1000, 5]}, ValueError, "timesteps must decrease from at most 999"),
        ({"timesteps": [5, -1]}, ValueError, "timesteps must decrease"),
        ({"timesteps": []}, ValueError, "timesteps must decrease"),
    ],
)
def test_timesteps_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        OCMScheduler().set_timesteps(**arguments)


# --- steps -------------------------------------------------------------------------------------


def test_shapes_types_and_return_values():
    scheduler = OCMScheduler()
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, o = sample.to(dtype), output.to(dtype)
        generators = [torch.Generator().manual_seed(0) for _ in range(3)]
        result = scheduler.step(o, 749, x, generators[0])
        as_tensor = scheduler.step(o, torch.tensor(749), x, generators[1])
        pair = scheduler.step(o, 749, x, generators[2], return_dict=False)
        assert isinstance(result, DDPMSchedulerOutput)
        for other in (as_tensor.to_tuple(), pair):
            assert torch.equal(other[0], result.prev_sample)
            assert torch.equal(other[1], result.pred_original_sample)
        assert result.prev_sample.shape == result.pred_original_sample.shape == SHAPE
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        assert scheduler.scale_model_input(x, 749) is x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("data_std", [None, 0.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_step_is_the_formula_of_the_paper(eta, data_std, prediction_type):
    """In float64, from the betas, with x_s = mean + sqrt(lambda^2 + b^2 Var) z."""
    scheduler = OCMScheduler(
        num_train_timesteps=50,
        prediction_type=prediction_type,
        clip_sample=False,
        eta=eta,
        data_std=data_std,
    )
    scheduler.set_timesteps(timesteps=[49, 30, 12])
    x_t, stated = (tensor.double() for tensor in sample_and_output())
    output, ratio = stated.chunk(2, dim=1)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    result = scheduler.step(stated, 30, x_t, variance_noise=z)

    alphas = (1 - DDPMScheduler(num_train_timesteps=50).betas.double()).cumprod(0)
    a_t, a_s = alphas[30], alphas[12]
    x0 = {
        "epsilon": (x_t - (1 - a_t).sqrt() * output) / a_t.sqrt(),
        "sample": output,
        "v_prediction": a_t.sqrt() * x_t - (1 - a_t).sqrt() * output,
    }[prediction_type]
    epsilon = (x_t - a_t.sqrt() * x0) / (1 - a_t).sqrt()
    lam2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    unit = (1 - a_t) / (a_t if data_std is None else a_t + (1 - a_t) / data_std**2)
    weight = a_s.sqrt() - ((1 - a_s - lam2) * a_t / (1 - a_t)).sqrt()
    variance = lam2 + weight**2 * (unit * ratio).clamp(min=0)
    expected = a_s.sqrt() * x0 + (1 - a_s - lam2).sqrt() * epsilon + variance.sqrt() * z
    torch.testing.assert_close(result.pred_original_sample, x0)
    torch.testing.assert_close(result.prev_sample, expected)

    last = scheduler.step(stated, 12, x_t, variance_noise=z).prev_sample
    a_t = alphas[12]
    x0 = {
        "epsilon": (x_t - (1 - a_t).sqrt() * output) / a_t.sqrt(),
        "sample": output,
        "v_prediction": a_t.sqrt() * x_t - (1 - a_t).sqrt() * output,
    }[prediction_type]
    torch.testing.assert_close(last, x0)


@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
@pytest.mark.parametrize(
    ("cls", "eta"), [(DDPMScheduler, 1.0), (DDIMScheduler, 1.0), (DDIMScheduler, 0.0)]
)
def test_without_a_variance_the_steps_are_those_of_diffusers(cls, eta):
    """DDPM with its smaller variance, which DDIM with eta = 1 is too."""
    theirs = cls(num_train_timesteps=100, timestep_spacing="leading")
    ours = OCMScheduler.from_config(theirs.config, eta=eta, timestep_spacing="leading")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    sample, output = sample_and_output(channels=3)
    options = {} if cls is DDPMScheduler else {"eta": eta, "use_clipped_model_output": True}
    with pytest.warns(UserWarning, match=r"3 channels.*states no variance.*ocm.attach"):
        ours.step(output, ours.timesteps[0], sample)
    for t in ours.timesteps:
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        result = ours.step(output, t, sample, generators[0])
        expected = theirs.step(output, t, sample, generator=generators[1], **options)
        for name in ("prev_sample", "pred_original_sample"):
            torch.testing.assert_close(result[name], expected[name], atol=2e-5, rtol=1e-4)


def test_a_negative_variance_is_none_and_a_large_one_is_that_of_bounded_data():
    scheduler = OCMScheduler(eta=0.0)
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    z = torch.ones(SHAPE)

    def noise(ratio):
        stated = torch.cat([output[:, :3], torch.full(SHAPE, ratio)], dim=1)
        quiet = torch.cat([output[:, :3], torch.zeros(SHAPE)], dim=1)
        with_noise = scheduler.step(stated, 999, sample, variance_noise=z).prev_sample
        return with_noise - scheduler.step(quiet, 999, sample, variance_noise=z).prev_sample

    assert not noise(-1.0).any()
    b = ocm.ddim(scheduler.schedule, 750, 1000).mean_from_x0
    torch.testing.assert_close(noise(1.0), torch.full(SHAPE, b))  # 2.5e4, were it not for the data


def test_the_last_noise_is_bounded_where_asked():
    scheduler = OCMScheduler(max_last_noise=0.01)
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    zeros, z = torch.zeros(SHAPE), torch.ones(SHAPE)
    for t, is_last in ((749, False), (250, True)):
        noise = (
            scheduler.step(output.abs(), t, sample, variance_noise=z).prev_sample
            - scheduler.step(output.abs(), t, sample, variance_noise=zeros).prev_sample
        )
        assert bool((noise <= 0.01 + 1e-6).all()) == is_last


def test_steps_are_those_of_the_generator_and_of_each_sample():
    scheduler = OCMScheduler()
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    same = [stepped(scheduler, 749, seed=3).prev_sample for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], stepped(scheduler, 749, seed=4).prev_sample)
    torch.manual_seed(3)
    assert torch.equal(scheduler.step(output, 749, sample).prev_sample, same[0])

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(4)]

    together = scheduler.step(output, 749, sample, generators()).prev_sample
    for i, generator in enumerate(generators()):
        alone = scheduler.step(output[i : i + 1], 749, sample[i : i + 1], generator).prev_sample
        assert torch.equal(alone[0], together[i])


def test_guidance_can_differentiate_the_predicted_sample():
    scheduler = OCMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    sample.requires_grad_()
    x0 = scheduler.step(output, 250, sample).pred_original_sample
    (gradient,) = torch.autograd.grad(x0.sum(), sample)
    expected = scheduler.schedule.alpha_bar[251].rsqrt().item()
    torch.testing.assert_close(gradient, torch.full(SHAPE, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": 748}, "timestep must be one of scheduler.timesteps, .*999.*got 748"),
        ({"timestep": 749.5}, "timestep must be one of"),
        ({"timestep": torch.tensor([749, 749])}, r"timestep must be one of .* got \[749, 749\]"),
        ({"model_output": torch.zeros(4, 5, 8, 8)}, r"model_output must have.*\(4, 5, 8, 8\)"),
        ({"model_output": torch.zeros(4, 6, 8, 1)}, r"model_output must have.*\(4, 6, 8, 1\)"),
        ({"variance_noise": torch.zeros(1)}, r"variance_noise must have the shape.*\(1,\)"),
        (
            {"variance_noise": torch.zeros(SHAPE), "generator": torch.Generator()},
            "variance_noise must have .* no generator beside it, got .* and <torch",
        ),
    ],
)
def test_steps_that_make_no_sense_are_refused(change, message):
    scheduler = OCMScheduler()
    scheduler.set_timesteps(5)
    sample, output = sample_and_output()
    arguments = {"model_output": output, "timestep": 749, "sample": sample} | change
    with pytest.raises(ValueError, match=message):
        scheduler.step(**arguments)


def test_add_noise_and_velocity():
    scheduler, theirs = OCMScheduler(), DDPMScheduler()
    x0, noise = sample_and_output()[0], torch.randn(SHAPE)
    for timesteps in (torch.tensor([0, 10, 500, 999]), torch.tensor([7])):
        noisy = scheduler.add_noise(x0, noise, timesteps)
        torch.testing.assert_close(noisy, theirs.add_noise(x0, noise, timesteps))
        velocity = scheduler.get_velocity(x0, noise, timesteps)
        torch.testing.assert_close(velocity, theirs.get_velocity(x0, noise, timesteps))
    t = torch.tensor([999])
    noisy = scheduler.add_noise(x0, noise, t)
    expected = math.sqrt(scheduler.alphas_cumprod[999]) * x0
    expected += math.sqrt(1 - scheduler.alphas_cumprod[999]) * noise
    torch.testing.assert_close(noisy, expected)


# --- the whole loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("positive", [False, True])
def test_the_loop_is_that_of_ocm_sample_on_the_same_noise(unet, eta, positive):
    parameterisation = ocm.Parameterisation(data_std=0.5, positive=positive)
    model = ocm.attach(unet, parameterisation=parameterisation)
    torch.nn.init.normal_(model.head.conv.weight, std=0.3)
    scheduler = model.scheduler(DDPMScheduler(), eta=eta, max_last_noise=0.05)
    covariance = model.covariance(scheduler)
    shape, seed = (2, 2, 8, 8), 11
    expected = ocm.sample(
        covariance.denoiser,
        covariance,
        shape,
        6,
        sampler=functools.partial(ocm.ddim, eta=eta),
        seed=seed,
        max_last_noise=0.05,
    )
    scheduler.set_timesteps(6)
    x = normal(shape, seed)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = normal(shape, seed, step=int(t) + 1)
            x = scheduler.step(model(x, t).sample, t, x, variance_noise=z).prev_sample
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_an_unmodified_ddpm_pipeline_saves_loads_and_samples(unet, tmp_path, caplog):
    model = ocm.attach(unet, parameterisation=ocm.Parameterisation(data_std=0.5))
    torch.nn.init.normal_(model.head.conv.weight, std=0.3)
    pipeline = DDPMPipeline(unet=model, scheduler=model.scheduler(DDPMScheduler(), eta=0.5))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, ocm.CovarianceModel)
    assert isinstance(loaded.scheduler, OCMScheduler)
    assert loaded.scheduler.config.data_std == 0.5

    def images(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(2, generator, num_inference_steps=4, output_type="np").images

    # U-Nets of two channels make no pictures, but arrays.
    assert images(pipeline).shape == (2, 8, 8, 2)
    np.testing.assert_array_equal(images(loaded), images(pipeline))
    # diffusers notes the class, and nothing else.
    assert all("Expected types for unet" in record.message for record in caplog.records)
