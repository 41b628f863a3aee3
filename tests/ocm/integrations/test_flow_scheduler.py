"""Euler's flow-matching scheduler with a covariance: diffusers' steps, exact moments, densities."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

import ocm
from ocm import OCMFlowScheduler

SHAPE = (2, 3, 4, 4)
GRIDS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "terminal": {"shift_terminal": 0.1},
    "dynamic": {"use_dynamic_shifting": True},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def velocity_of(x, time):
    """Any smooth function will do."""
    return torch.tanh(x) - 0.3 * x * float(time) / 1000


def run(scheduler, steps, channels, mu=None, **options):
    """Samples by a model that states a variance of zero, or none for ``channels`` = 1."""
    scheduler.set_timesteps(steps, mu=mu)
    x, generator = torch.randn(SHAPE, generator=seeded()), seeded(1)
    for t in scheduler.timesteps:
        v = velocity_of(x, t)
        output = torch.cat([v, torch.zeros_like(v)], dim=1) if channels == 2 else v
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_a_variance_of_zero_is_diffusers_own(name, stochastic):
    config = GRIDS[name] | {"stochastic_sampling": stochastic}
    mu = 0.8 if name == "dynamic" else None
    for steps in (2, 4, 20):  # of a single step, shift_terminal makes nan
        theirs = run(FlowMatchEulerDiscreteScheduler(**config), steps, 1, mu)
        ours = run(OCMFlowScheduler(data_std=0.5, **config), steps, 2, mu)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
def test_without_a_variance_the_steps_are_diffusers_own():
    for stochastic in (False, True):
        config = {"shift": 2.0, "stochastic_sampling": stochastic}
        theirs = run(FlowMatchEulerDiscreteScheduler(**config), 5, 1)
        assert torch.equal(run(OCMFlowScheduler(**config), 5, 1), theirs)


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0, None])
@pytest.mark.parametrize("steps", [2, 5])
def test_gaussian_data_keep_their_standard_deviation(noise, steps):
    """The exact velocity and variance of data of standard deviation 0.5; 0.9 with wrong tables."""
    std = 0.5
    scheduler = OCMFlowScheduler(noise=noise, data_std=std, noise_at_end=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x, generator = torch.randn(200_000, 1, generator=seeded()), seeded(1)
    for k, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k].item()
        x0_hat = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2) * x
        stated = torch.cat([(x - x0_hat) / sigma, torch.ones_like(x)], dim=1)
        x = scheduler.step(stated, t, x, generator=generator).prev_sample
    assert abs(x.std().item() - std) < 5 * std / math.sqrt(2 * len(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 0.5, None])
def test_log_prob_is_that_of_a_normal(noise, dtype):
    scheduler = OCMFlowScheduler(noise=noise, data_std=0.5)
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE, generator=seeded()).to(dtype)
    stated = torch.rand(2, 6, 4, 4, generator=seeded(1)).to(dtype).requires_grad_(True)
    t = scheduler.timesteps[1]
    scheduler.set_begin_index(1)
    output = scheduler.step(stated, t, x, generator=seeded(2), return_log_prob=True)
    assert output.log_prob.shape == (2,)
    assert output.log_prob.dtype == torch.float32
    assert output.prev_sample.dtype == dtype

    sigma_t, sigma_s = scheduler.sigmas[1:3].double().tolist()
    v, ratio = stated.detach().double().chunk(2, dim=1)
    x0 = x.double() - sigma_t * v
    kept = (sigma_s / sigma_t) ** 2 * ((1 - sigma_t) / (1 - sigma_s)) ** 2
    lam = sigma_s * (math.sqrt(1 - kept) if noise is None else noise)
    a = math.sqrt(sigma_s**2 - lam**2) / sigma_t
    b = (1 - sigma_s) - a * (1 - sigma_t)
    unit = sigma_t**2 / ((1 - sigma_t) ** 2 + (sigma_t / 0.5) ** 2)
    law = torch.distributions.Normal(a * x.double() + b * x0, (lam**2 + b**2 * unit * ratio).sqrt())
    expected = law.log_prob(output.prev_sample.double()).flatten(1).sum(1)
    torch.testing.assert_close(output.log_prob.double(), expected, rtol=1e-5, atol=1e-4)

    again = scheduler.step(stated, t, x, prev_sample=output.prev_sample.detach())
    torch.testing.assert_close(again.log_prob, output.log_prob)
    assert scheduler.step_index == 2  # it stayed where it was
    again.log_prob.sum().backward()
    assert stated.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
def test_steps_with_noise_have_a_density_without_a_variance_too():
    scheduler = OCMFlowScheduler(noise=0.7)
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE, generator=seeded())
    output = scheduler.step(
        velocity_of(x, 1000), scheduler.timesteps[0], x, generator=seeded(), return_log_prob=True
    )
    assert torch.isfinite(output.log_prob).all()
    ode = OCMFlowScheduler()
    ode.set_timesteps(4)
    with pytest.raises(ValueError, match="log_prob must be that of a step with noise"):
        ode.step(velocity_of(x, 1000), ode.timesteps[0], x, return_log_prob=True)


def small_flow():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return ocm.attach(unet, parameterisation=ocm.Parameterisation(0.5, positive=True))


def test_a_pipeline_of_diffusers_samples_saves_and_loads(tmp_path):
    model = small_flow()
    scheduler = model.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), noise=None)
    assert isinstance(scheduler, OCMFlowScheduler)
    assert (scheduler.config.shift, scheduler.config.data_std) == (3.0, 0.5)
    pipeline = DDPMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    images = pipeline(generator=seeded(), **arguments).images
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, OCMFlowScheduler)
    assert loaded.scheduler.config.noise is None
    np.testing.assert_allclose(loaded(generator=seeded(), **arguments).images, images, atol=1e-5)


def test_the_covariance_switched_off_gives_the_images_of_diffusers():
    model = small_flow()
    torch.nn.init.constant_(model.head.head.conv.bias, -60.0)  # softplus of it is 0
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    images = []
    for unet, used in ((model, model.scheduler(scheduler)), (model.backbone, scheduler)):
        pipeline = DDPMPipeline(unet, used)
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(2, seeded(), num_inference_steps=6, output_type="np").images)
    np.testing.assert_allclose(*images, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise": 1.5}, r"noise must lie in \[0, 1\] or be None, got 1.5"),
        ({"data_std": 0.0}, "data_std must be positive, got 0.0"),
        ({"invert_sigmas": True}, "invert_sigmas must be False"),
    ],
)
def test_configurations_that_it_cannot_do(config, message):
    with pytest.raises(ValueError, match=message):
        OCMFlowScheduler(**config)


def test_arguments_that_it_cannot_do():
    scheduler = OCMFlowScheduler()
    scheduler.set_timesteps(3)
    x, stated = torch.zeros(SHAPE), torch.zeros(2, 6, 4, 4)
    t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="data_std must be a number where no signal is left"):
        scheduler.step(stated, t, x)
    with pytest.raises(ValueError, match="per_token_timesteps must be None"):
        scheduler.step(stated, t, x, per_token_timesteps=torch.ones(2, 1))
    with pytest.raises(ValueError, match="must have the shape of sample, or be twice as long"):
        scheduler.step(torch.zeros(2, 5, 4, 4), t, x)
    from diffusers import DDPMScheduler

    with pytest.raises(ValueError, match="must have the path 'flow' of OCMFlowScheduler"):
        OCMFlowScheduler.from_config(DDPMScheduler())


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_the_shift_of_solvers_of_several_paths_is_kept(kind):
    """They call it flow_shift: Wan's pipelines come with such a one."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = ocm.OCMFlowScheduler.from_config(kind(**options))
    like = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert scheduler.config.shift == 3.0
    scheduler.set_timesteps(5)
    like.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, like.sigmas)
