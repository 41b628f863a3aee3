"""OCMScheduler and OCMDDIMScheduler: their parents' steps, their own formulas, and pipelines."""

import functools
import itertools
import logging
import math
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

import ocm
from hessdiag.kernels import normal
from ocm.integrations.gaussian_steps import OCMSchedulerOutput
from ocm.integrations.scheduler import OCMDDIMScheduler, OCMScheduler

SHAPE = (4, 3, 8, 8)
OURS = {DDPMScheduler: OCMScheduler, DDIMScheduler: OCMDDIMScheduler}
CLASSES = list(OURS.values())


def sample_and_output(channels=6):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(SHAPE, generator=generator)
    return sample, torch.randn(4, channels, 8, 8, generator=generator) * 0.3


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def ready(cls, steps=5, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    return scheduler


# --- configuration -----------------------------------------------------------------------------

CONFIGS = [
    {},
    {"num_train_timesteps": 100},
    {"beta_start": 0.001, "beta_end": 0.03},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.1, 40), "num_train_timesteps": 40},
    {"prediction_type": "v_prediction", "clip_sample": False, "data_std": 0.5},
    {"thresholding": True, "sample_max_value": 2.0},
    {"rescale_betas_zero_snr": True, "prediction_type": "sample", "data_std": 1.0},
    {"timestep_spacing": "trailing", "max_last_noise": 0.01},
    {"timestep_spacing": "leading", "steps_offset": 1},
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: " ".join(config) or "defaults")
def test_saved_and_loaded_it_takes_the_same_steps(cls, config, tmp_path):
    scheduler = ready(cls, 7, **config)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    sample, output = sample_and_output()
    t = scheduler.timesteps[1]
    expected = scheduler.step(output, t, sample, generator=seeded()).prev_sample
    for other in (loaded, cls.from_config(loaded.config), cls.from_config(scheduler)):
        other.set_timesteps(7)
        assert torch.equal(other.timesteps, scheduler.timesteps)
        again = other.step(output, t, sample, generator=seeded()).prev_sample
        assert torch.equal(again, expected)


@pytest.mark.parametrize("theirs", OURS)
def test_it_takes_every_argument_of_its_parent(theirs):
    """In whatever version of diffusers, by position too."""
    parents = theirs().config.keys() - {"_use_default_values"}
    ours = OURS[theirs](50, 0.001, data_std=0.7)
    assert parents <= ours.config.keys()
    assert (ours.config.num_train_timesteps, ours.config.beta_start) == (50, 0.001)
    assert isinstance(ours, theirs)
    with pytest.raises(TypeError, match="beta_begin"):
        OURS[theirs](beta_begin=0.1)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon.*'flow'"),
        ({"max_last_noise": -1.0}, "max_last_noise must be at least 0, got -1.0"),
        ({"data_std": 0.0}, "data_std must be positive, got 0.0"),
    ],
)
def test_configurations_that_it_cannot_do_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


def test_eta_lies_between_ddim_and_ddpm():
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        OCMDDIMScheduler(eta=1.5)
    sample, output = sample_and_output()
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got -0.1"):
        ready(OCMDDIMScheduler).step(output, 200, sample, eta=-0.1)


# --- timesteps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", OURS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_timesteps_are_those_of_diffusers(theirs, spacing, steps):
    ours, parents = (ready(cls, steps, timestep_spacing=spacing) for cls in (OURS[theirs], theirs))
    assert ours.timesteps.tolist() == parents.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 55, 1000])
def test_even_timesteps_are_those_of_ocm_sample(steps):
    scheduler = ready(OCMScheduler, steps, timestep_spacing="even")
    assert [t + 1 for t in scheduler.timesteps.tolist()][::-1] == ocm.even_timesteps(
        ocm.linear(), steps
    )
    assert scheduler.num_inference_steps == steps
    with pytest.raises(ValueError, match="even is not supported"):
        ready(OCMDDIMScheduler, steps, timestep_spacing="even")


@pytest.mark.parametrize("spacing", ["even", "leading"])
def test_custom_timesteps(spacing):
    scheduler = OCMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(timesteps=[900, 400, 30])
    assert scheduler.timesteps.tolist() == [900, 400, 30]
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [400, 30, -1]
    with pytest.raises(ValueError, match=r"timestep must be one of .*900.*got 401"):
        scheduler.previous_timestep(401)


# --- steps of diffusers ------------------------------------------------------------------------

CLIPPING = [
    {},
    {"clip_sample": False},
    {"thresholding": True, "sample_max_value": 2.0},
    {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "data_std": 1.0},
]
STEPS = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 1.0}),
    (DDIMScheduler, {"eta": 0.5, "use_clipped_model_output": True}),
]


def along_a_path(ours, theirs, steps, variance, **options):
    """Pairs of outputs on the same noise, for the variance that ``variance(t)`` returns."""
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    x = sample_and_output()[0]
    for t in theirs.timesteps:
        output = torch.randn(SHAPE, generator=seeded(int(t))) * 0.7 + 0.3 * x
        alpha_bar = theirs.alphas_cumprod[t].double()
        ratio = 0.0
        if variance is not None:  # in the papers' unit
            ratio = (variance(t) * alpha_bar / (1 - alpha_bar)).item()
        stated = torch.cat([output, torch.full_like(output, ratio)], dim=1)
        expected = theirs.step(output, t, x, generator=seeded(), **options)
        yield ours.step(stated, t, x, generator=seeded(), **options), expected
        x = expected.prev_sample / expected.prev_sample.std()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("config", CLIPPING, ids=lambda config: " ".join(config) or "clipped")
@pytest.mark.parametrize(("cls", "options"), STEPS)
def test_a_variance_of_zero_is_diffusers_fixed_small(cls, options, config, spacing):
    theirs = cls(timestep_spacing=spacing, **{k: v for k, v in config.items() if k != "data_std"})
    if "rescale_betas_zero_snr" in config and "eta" in options:
        options = options | {"eta": 0.5}  # where diffusers' own rounds to nan for 1
    for steps in (7, 50):  # 7: DDIM's t - N // K leaves the grid
        ours = OURS[cls](timestep_spacing=spacing, **config)
        for stated, expected in along_a_path(ours, theirs, steps, None, **options):
            for name in ("prev_sample", "pred_original_sample"):
                torch.testing.assert_close(stated[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_the_variance_of_pure_noise_is_diffusers_fixed_large(spacing, clip_sample):
    """Var[x0 | x_t] = beta_bar_t gives beta(s, t): with trailing in the last step too."""
    config = {"timestep_spacing": spacing, "clip_sample": clip_sample}
    theirs = DDPMScheduler(variance_type="fixed_large", **config)

    def variance(t):
        return 1 - theirs.alphas_cumprod[t].double()

    for steps in (7, 50):
        ours = OCMScheduler(**config)
        for stated, expected in along_a_path(ours, theirs, steps, variance):
            torch.testing.assert_close(
                stated.prev_sample, expected.prev_sample, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(("cls", "options"), STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_variance_the_steps_are_diffusers_own(cls, options, dtype):
    theirs, ours = ready(cls), ready(OURS[cls])
    sample, output = (tensor.to(dtype) for tensor in sample_and_output(channels=3))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for t in theirs.timesteps:
            results = [
                one.step(output, t, sample, generator=seeded(), **options) for one in (ours, theirs)
            ]
            assert type(results[0]) is type(results[1])
            assert torch.equal(results[0].prev_sample, results[1].prev_sample)
            pair = ours.step(output, t, sample, generator=seeded(), return_dict=False, **options)
            assert torch.equal(pair[0], results[1].prev_sample)
    assert [warning.filename for warning in record] == [__file__]
    assert re.search("3 channels.*states no variance.*ocm.attach", str(record[0].message))
    ours.set_timesteps(5)
    with pytest.warns(UserWarning, match="states no variance"):
        ours.step(output, t, sample)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_means_what_it_means_to_diffusers(variance_type):
    theirs, ours = (
        ready(cls, variance_type=variance_type) for cls in (DDPMScheduler, OCMScheduler)
    )
    sample, output = sample_and_output()
    output = output.abs()
    expected = theirs.step(output, 400, sample, generator=seeded())
    result = ours.step(output, 400, sample, generator=seeded())
    assert torch.equal(result.prev_sample, expected.prev_sample)


def test_ddim_with_eta_1_is_ddpm_with_the_covariance_too():
    sample, output = sample_and_output()
    config = {"timestep_spacing": "trailing", "data_std": 0.5}
    for t in (999, 799, 199):
        results = [
            ready(OCMScheduler, **config).step(output, t, sample, seeded()),
            ready(OCMDDIMScheduler, noise_at_end=True, **config).step(
                output, t, sample, 1.0, True, seeded()
            ),
        ]
        torch.testing.assert_close(*(r.prev_sample for r in results), atol=1e-5, rtol=1e-5)


# --- steps with a variance ---------------------------------------------------------------------


def x0_from(prediction_type, x_t, output, alpha_bar):
    return {
        "epsilon": (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(),
        "sample": output,
        "v_prediction": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output,
    }[prediction_type]


@pytest.mark.parametrize(
    ("eta", "set_alpha_to_one"),
    [(None, True), *itertools.product([0.0, 0.4, 1.0], [False, True])],
)
@pytest.mark.parametrize("data_std", [None, 0.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_a_step_is_the_formula_of_the_paper(
    eta, data_std, prediction_type, clip_sample, set_alpha_to_one
):
    """In float64, from the moments of q(x_s | x_t, x0), for DDPM (eta None) and DDIM."""
    config = {"num_train_timesteps": 60, "prediction_type": prediction_type, "data_std": data_std}
    config |= {"clip_sample": clip_sample, "timestep_spacing": "trailing"}
    if eta is None:
        scheduler, options = OCMScheduler(**config), {}
    else:
        config |= {"set_alpha_to_one": set_alpha_to_one, "noise_at_end": True}
        scheduler, options = OCMDDIMScheduler(**config), {"eta": eta}
    scheduler.set_timesteps(5)
    x_t, stated = (tensor.double() for tensor in sample_and_output())
    output, ratio = stated.chunk(2, dim=1)
    z = torch.randn(SHAPE, generator=seeded(5), dtype=torch.float64)
    alphas = DDPMScheduler(num_train_timesteps=60).alphas_cumprod.double()
    one = alphas.new_ones(())
    for t, s in ((47, 35), (11, -1)):
        result = scheduler.step(stated, t, x_t, variance_noise=z, **options)
        a_t = alphas[t]
        a_s = alphas[s] if s >= 0 else one if set_alpha_to_one else alphas[0]
        x0 = x0_from(prediction_type, x_t, output, a_t)
        epsilon = (x_t - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        unit = (1 - a_t) / (a_t if data_std is None else a_t + (1 - a_t) / data_std**2)
        variance = (unit * ratio).clamp(min=0)
        if clip_sample:
            x0, variance = x0.clamp(-1, 1), variance.clamp(max=1)
        posterior = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        if eta is None:
            lam2, weight = posterior, a_s.sqrt() * (1 - a_t / a_s) / (1 - a_t)
            mean = weight * x0 + (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t) * x_t
        else:
            lam2 = eta**2 * posterior
            mean = a_s.sqrt() * x0 + (1 - a_s - lam2).sqrt() * epsilon
            # dx_s / dx0 at a given x_t, of which epsilon is a function
            weight = a_s.sqrt() - (1 - a_s - lam2).sqrt() * (a_t / (1 - a_t)).sqrt()
        expected = mean + (lam2 + weight**2 * variance).sqrt() * z
        # The parents' tables are float32.
        torch.testing.assert_close(result.pred_original_sample, x0, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.prev_sample, expected, atol=1e-5, rtol=1e-5)


# Not DDIM with linspace: diffusers takes t - N // K, which is not the next of these timesteps.
@pytest.mark.parametrize(
    ("cls", "spacing"),
    [*itertools.product(CLASSES, ["leading", "trailing"]), (OCMScheduler, "linspace")],
)
@pytest.mark.parametrize("steps", [3, 10])
def test_gaussian_data_keep_their_variance(cls, spacing, steps):
    """With the exact mean and covariance the second moment of the samples is that of the data."""
    std = 0.5
    config = {"prediction_type": "sample", "clip_sample": False, "data_std": std}
    if cls is OCMDDIMScheduler:
        config["noise_at_end"] = True
    scheduler = ready(cls, steps, timestep_spacing=spacing, **config)
    x = torch.randn(200_000, 1, generator=seeded(0))
    first = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    x = x * (first * std**2 + 1 - first).sqrt()
    generator = seeded(1)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t]
        mean = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar) * x
        x = scheduler.step(
            torch.cat([mean, torch.ones_like(mean)], dim=1), t, x, generator=generator
        ).prev_sample
    # 5 standard errors of 200,000 draws; the step from t = 0 returns a mean, 4e-4 too narrow.
    assert abs(x.std().item() - std) < 5 * std / math.sqrt(2 * len(x)) + 2e-4


@pytest.mark.parametrize("cls", CLASSES)
def test_a_negative_variance_is_none_and_a_large_one_is_that_of_bounded_data(cls):
    sample, output = sample_and_output()

    def spread(ratio, **config):
        scheduler = ready(cls, **config)
        stated = torch.cat([output[:, :3], torch.full(SHAPE, ratio)], dim=1)
        quiet = torch.cat([output[:, :3], torch.zeros(SHAPE)], dim=1)
        results = [
            scheduler.step(s, 800, sample, variance_noise=torch.ones(SHAPE)).prev_sample
            - scheduler.step(s, 800, sample, variance_noise=torch.zeros(SHAPE)).prev_sample
            for s in (stated, quiet)
        ]
        return (results[0] ** 2 - results[1] ** 2).clamp(min=0).sqrt()

    assert not spread(-1.0).any()
    sampler = ocm.ddpm if cls is OCMScheduler else ocm.ddim
    b = sampler(ocm.linear(), 601, 801).mean_from_x0
    for limit, config in (
        (1.0, {}),
        (0.5, {"clip_sample_range": 0.5}),
        (1.0, {"thresholding": True, "clip_sample": False}),
    ):  # 600, were it not for the data
        torch.testing.assert_close(
            spread(1.0, **config), torch.full(SHAPE, b * limit), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("config", "last", "before"),
    [
        ({"timestep_spacing": "leading"}, 200, 400),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 201, 401),
        ({"timestep_spacing": "trailing"}, 199, 399),
    ],
)
def test_the_last_noise_is_bounded_where_asked(cls, config, last, before):
    scheduler = ready(cls, max_last_noise=0.01, **config)
    sample, output = sample_and_output()
    zeros, z = torch.zeros(SHAPE), torch.ones(SHAPE)
    for t, is_last in ((before, False), (last, True)):
        noise = (
            scheduler.step(output.abs(), t, sample, variance_noise=z).prev_sample
            - scheduler.step(output.abs(), t, sample, variance_noise=zeros).prev_sample
        )
        assert bool((noise <= 0.01 + 1e-6).all()) == is_last


@pytest.mark.parametrize("cls", CLASSES)
def test_shapes_types_and_return_values(cls):
    scheduler = ready(cls)
    sample, output = sample_and_output()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, o = sample.to(dtype), output.to(dtype)
        result = scheduler.step(o, 400, x, generator=seeded())
        as_tensor = scheduler.step(o, torch.tensor(400), x, generator=seeded())
        pair = scheduler.step(o, 400, x, generator=seeded(), return_dict=False)
        assert isinstance(result, OCMSchedulerOutput)
        for other in (as_tensor.to_tuple(), pair):
            assert len(other) == 2
            assert torch.equal(other[0], result.prev_sample)
            assert torch.equal(other[1], result.pred_original_sample)
        assert result.prev_sample.shape == result.pred_original_sample.shape == SHAPE
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        z = torch.randn(SHAPE, generator=seeded(), dtype=dtype)
        full = [tensor.float() if dtype.itemsize == 2 else tensor for tensor in (o, x, z)]
        expected = scheduler.step(full[0], 400, full[1], variance_noise=full[2]).prev_sample
        assert torch.equal(result.prev_sample, expected.to(dtype))


@pytest.mark.parametrize("cls", CLASSES)
def test_steps_are_those_of_the_generator_and_of_each_sample(cls):
    scheduler = ready(cls)
    sample, output = sample_and_output()

    def stepped(generator, rows=slice(None)):
        return scheduler.step(output[rows], 400, sample[rows], generator=generator).prev_sample

    assert torch.equal(stepped(seeded(3)), stepped(seeded(3)))
    assert not torch.equal(stepped(seeded(3)), stepped(seeded(4)))
    torch.manual_seed(3)
    assert torch.equal(stepped(None), stepped(seeded(3)))
    together = stepped([seeded(i) for i in range(4)])
    for i in range(4):
        assert torch.equal(stepped([seeded(i)], slice(i, i + 1))[0], together[i])


def test_guidance_can_differentiate_the_predicted_sample():
    for cls in CLASSES:
        scheduler = ready(cls, clip_sample=False)
        sample, output = sample_and_output()
        sample.requires_grad_()
        x0 = scheduler.step(output, 200, sample).pred_original_sample
        (gradient,) = torch.autograd.grad(x0.sum(), sample)
        expected = scheduler.alphas_cumprod[200].rsqrt().item()
        torch.testing.assert_close(gradient, torch.full(SHAPE, expected))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_output": torch.zeros(4, 5, 8, 8)}, r"model_output must have.*\(4, 5, 8, 8\)"),
        ({"model_output": torch.zeros(4, 6, 8, 1)}, r"model_output must have.*\(4, 6, 8, 1\)"),
        ({"variance_noise": torch.zeros(1)}, r"variance_noise must have the shape.*\(1,\)"),
        ({"prev_sample": torch.zeros(1)}, r"prev_sample must have the shape.*\(1,\)"),
        (
            {"variance_noise": torch.zeros(SHAPE), "generator": torch.Generator()},
            "variance_noise must have .* no generator beside it, got .* and <torch",
        ),
    ],
)
def test_steps_that_make_no_sense_are_refused(cls, change, message):
    sample, output = sample_and_output()
    arguments = {"model_output": output, "timestep": 400, "sample": sample} | change
    with pytest.raises(ValueError, match=message):
        ready(cls).step(**arguments)


@pytest.mark.parametrize("channels", [3, 6])
def test_a_ddpm_step_from_elsewhere_is_refused(channels):
    sample, output = sample_and_output()
    scheduler = ready(OCMScheduler, variance_type="learned_range")
    with pytest.raises(ValueError, match=r"timestep must be one of .*800.*got 401"):
        scheduler.step(output[:, :channels], 401, sample)


def test_ddim_with_eta_1_starts_from_pure_noise():
    """Without signal x_t says nothing: the mean is that of x0; diffusers rounds to nan."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "sample", "data_std": 1.0}
    sample, output = sample_and_output()
    for steps in (7, 10, 200):
        scheduler = ready(OCMDDIMScheduler, steps, timestep_spacing="trailing", **config)
        stated = torch.cat([output[:, :3], torch.zeros(SHAPE)], dim=1)
        noise = torch.zeros(SHAPE)
        result = scheduler.step(stated, 999, sample, eta=1.0, variance_noise=noise)
        alpha_bar = scheduler.alphas_cumprod[999 - 1000 // steps]
        expected = alpha_bar.sqrt() * output[:, :3].clamp(-1, 1)
        torch.testing.assert_close(result.prev_sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
def test_without_signal_nothing_follows_from_epsilon(cls):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    sample, output = sample_and_output()
    for channels in (3, 6):
        scheduler = ready(cls, **config)
        with pytest.raises(ValueError, match=r"prediction_type.*999.*rescale_betas_zero_snr"):
            scheduler.step(output[:, :channels], 999, sample)
        result = scheduler.step(output[:, :channels], 799, sample)
        assert bool(torch.isfinite(result.prev_sample).all())
    with pytest.raises(ValueError, match=r"data_std must be a number .* rescale_betas_zero_snr"):
        ready(cls, prediction_type="sample", **config).step(output, 999, sample)


# --- log-density -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("t", [800, 200])
def test_log_prob_is_that_of_a_normal_distribution(cls, t):
    scheduler = ready(cls, data_std=0.5)
    sample, output = (tensor.double() for tensor in sample_and_output())
    output = output.abs() + 0.1

    def at(value):
        noise = torch.full(SHAPE, value, dtype=torch.float64)
        return scheduler.step(output, t, sample, variance_noise=noise).prev_sample

    normal_distribution = torch.distributions.Normal(at(0.0), at(1.0) - at(0.0))
    result = scheduler.step(output, t, sample, generator=seeded(), return_log_prob=True)
    expected = normal_distribution.log_prob(result.prev_sample).flatten(1).sum(1)
    assert result.log_prob.shape == (4,)
    torch.testing.assert_close(result.log_prob, expected, atol=1e-5, rtol=1e-5)
    plain = scheduler.step(output, t, sample, generator=seeded())
    assert torch.equal(plain.prev_sample, result.prev_sample)
    assert plain.log_prob is None


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
def test_log_prob_of_the_sample_that_was_returned(cls, channels, dtype):
    """The same number later, at what was rounded to half precision, and the same gradient."""
    scheduler, options = ready(cls, data_std=0.5), {}
    if cls is OCMDDIMScheduler:
        options["eta"] = 0.8
    sample, output = sample_and_output()
    sample, output = sample.to(dtype), (output.abs() + 0.1)[:, :channels].to(dtype)
    output.requires_grad_()
    drawn = scheduler.step(output, 400, sample, generator=seeded(), return_log_prob=True, **options)
    given = drawn.prev_sample.detach()
    again = scheduler.step(output, 400, sample, prev_sample=given, **options)
    assert drawn.prev_sample.dtype == dtype
    assert drawn.log_prob.dtype == again.log_prob.dtype == torch.float32
    assert torch.equal(again.prev_sample, given)
    assert torch.equal(again.log_prob, drawn.log_prob)
    gradients = [torch.autograd.grad(one.log_prob.sum(), output)[0] for one in (drawn, again)]
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())
    three = scheduler.step(
        output, 400, sample, generator=seeded(), return_log_prob=True, return_dict=False, **options
    )
    assert len(three) == 3
    assert torch.equal(three[2], drawn.log_prob)


VARIANCES = ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.filterwarnings("ignore:model_output has the 3 channels")
def test_log_prob_of_every_variance_of_diffusers(variance_type):
    """Mean and standard deviation from two draws of diffusers' own, on known noise."""
    theirs = ready(DDPMScheduler, variance_type=variance_type)
    ours = ready(OCMScheduler, variance_type=variance_type)
    sample, output = (tensor.double() for tensor in sample_and_output())
    output = output.abs() + 0.1 if "learned" in variance_type else output[:, :3]
    draws, noise = [], []
    for seed in (0, 1):
        draws.append(theirs.step(output, 400, sample, generator=seeded(seed)).prev_sample)
        shape = SHAPE if "learned" in variance_type else output.shape
        noise.append(torch.randn(shape, generator=seeded(seed), dtype=torch.float64))
    std = (draws[0] - draws[1]) / (noise[0] - noise[1])
    expected = torch.distributions.Normal(draws[0] - std * noise[0], std)
    result = ours.step(output, 400, sample, generator=seeded(0), return_log_prob=True)
    torch.testing.assert_close(
        result.log_prob,
        expected.log_prob(result.prev_sample).flatten(1).sum(1),
        atol=1e-5,
        rtol=1e-5,
    )
    given = ours.step(output, 400, sample, variance_noise=noise[0])
    torch.testing.assert_close(given.prev_sample, draws[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_without_noise_has_no_density(cls):
    scheduler = ready(cls)
    sample, output = sample_and_output()
    for t, stated in ((0, output), (400, output.clamp(max=0.0))):
        if t == 400 and cls is OCMScheduler:
            continue
        with pytest.raises(ValueError, match="log_prob must be that of a step with noise"):
            scheduler.step(stated, t, sample, return_log_prob=True)
        with pytest.raises(ValueError, match="log_prob must be that of a step with noise"):
            scheduler.step(stated, t, sample, prev_sample=sample)


# --- the whole loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("positive", [False, True])
def test_the_loop_is_that_of_ocm_sample_on_the_same_noise(unet, eta, positive):
    parameterisation = ocm.Parameterisation(data_std=0.5, positive=positive)
    model = ocm.attach(unet, parameterisation=parameterisation)
    torch.nn.init.normal_(model.head.head.conv.weight, std=0.3)
    covariance = model.covariance(DDPMScheduler())
    shape, seed, levels = (2, 2, 8, 8), 11, [1, 201, 401, 601, 801, 1000]
    if eta is None:
        scheduler = model.scheduler(DDPMScheduler(), max_last_noise=0.05)
        scheduler.set_timesteps(timesteps=[t - 1 for t in reversed(levels)])
        sampler = ocm.ddpm
    else:
        # diffusers clips x0_hat and not epsilon; ocm.sample adds no noise in its last step.
        config = {"clip_sample": False, "timestep_spacing": "trailing"}
        scheduler = model.scheduler(DDIMScheduler(**config), eta=eta)
        scheduler.set_timesteps(5)
        levels, sampler = [200, 400, 600, 800, 1000], functools.partial(ocm.ddim, eta=eta)
    expected = ocm.sample(
        covariance.denoiser,
        covariance,
        shape,
        levels,
        sampler=sampler,
        seed=seed,
        max_last_noise=0.05 if eta is None else None,
        x0_range=(-1.0, 1.0) if eta is None else None,
    )
    x = normal(shape, seed)
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = normal(shape, seed, step=int(t) + 1) * (t != 199)
            x = scheduler.step(model(x, t).sample, t, x, variance_noise=z).prev_sample
    # Their tables are float64, and those of diffusers float32.
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("theirs", OURS)
def test_an_unmodified_ddpm_pipeline_saves_loads_and_samples(unet, theirs, tmp_path, caplog):
    """With DDIM steps too, whose eta the configuration holds."""
    model = ocm.attach(unet, parameterisation=ocm.Parameterisation(data_std=0.5))
    torch.nn.init.normal_(model.head.head.conv.weight, std=0.3)
    options = {"eta": 0.5} if theirs is DDIMScheduler else {}
    pipeline = DDPMPipeline(unet=model, scheduler=model.scheduler(theirs(), **options))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, ocm.CovarianceModel)
    assert isinstance(loaded.scheduler, OURS[theirs])
    assert loaded.scheduler.config.data_std == 0.5

    def images(pipeline):
        return pipeline(2, seeded(0), num_inference_steps=4, output_type="np").images

    # U-Nets of two channels make no pictures, but arrays.
    assert images(pipeline).shape == (2, 8, 8, 2)
    np.testing.assert_array_equal(images(loaded), images(pipeline))
    # diffusers notes the class, and nothing else.
    assert all("Expected types for unet" in record.message for record in caplog.records)
    if options:
        loaded.scheduler.register_to_config(eta=0.0)
        assert not np.array_equal(images(loaded), images(pipeline))


def test_a_ddim_pipeline_whose_scheduler_is_set_afterwards(unet, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    model = ocm.attach(unet, parameterisation=ocm.Parameterisation(data_std=0.5))
    ours = model.scheduler(DDIMScheduler())
    pipeline = DDIMPipeline(model, ours)
    assert type(pipeline.scheduler) is DDIMScheduler  # which the constructor made of it
    assert "data_std" in caplog.text  # not without a word
    pipeline.scheduler = ours
    pipeline.set_progress_bar_config(disable=True)

    def images(**options):
        generators = [seeded(i) for i in range(2)]
        options |= {"num_inference_steps": 4, "output_type": "np"}
        return pipeline(2, generator=generators, **options).images

    plain = images()
    np.testing.assert_array_equal(plain, images())
    for options in ({"eta": 1.0}, {"use_clipped_model_output": True}):
        assert not np.array_equal(plain, images(**options))
