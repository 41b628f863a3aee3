"""Reverse steps against the formulas in float64, and whole trajectories on Gaussian data."""

import math
from functools import partial

import numpy_contract
import pytest
import torch
from gaussian_denoiser import gaussian_denoiser
from one_device import one_device
from small_backbone import CHANNELS, WIDTH, small_denoiser

import hessdiag
import ocm
from hessdiag.kernels import StepCoefficients, gaussian_step
from ocm.covariances.names import LEARNED
from ocm.diffusion.tables import Table
from ocm.sampling.samplers import ddim, ddpm, last_step_noise

SCHEDULES = {"linear": ocm.linear(), "cosine": ocm.cosine()}


def random_steps(count=20):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        s, t = sorted((torch.randperm(1000, generator=generator)[:2] + 1).tolist())
        yield s, t


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [None, 0.0, 0.4, 1.0])
def test_steps_against_the_formulas_in_float64(name, eta):
    """DDPM (eta None) and DDIM, written a second time from their papers."""
    schedule = SCHEDULES[name]
    betas = [1 - (schedule.alpha_bar[t] / schedule.alpha_bar[t - 1]).item() for t in range(1, 1001)]
    alpha_bar = [1.0]
    for beta in betas:
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    generator = torch.Generator().manual_seed(1)
    for s, t in random_steps():
        x_t, epsilon = (torch.randn(2, 1, 3, 3, generator=generator) for _ in range(2))
        variance = torch.rand(2, 1, 3, 3, generator=generator)
        a_s, a_t = alpha_bar[s], alpha_bar[t]
        beta = 1 - a_t / a_s
        beta_tilde = (1 - a_s) / (1 - a_t) * beta
        x0 = (x_t.double() - math.sqrt(1 - a_t) * epsilon.double()) / math.sqrt(a_t)
        x0 = x0.clamp(-1, 1)
        if eta is None:
            mean = math.sqrt(a_s) * beta / (1 - a_t) * x0
            mean = mean + math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t) * x_t.double()
            noise_variance = beta_tilde + a_s * beta**2 / (1 - a_t) ** 2 * variance.double()
        else:
            lambda_squared = eta**2 * beta_tilde
            direction = (x_t.double() - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
            mean = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - lambda_squared) * direction
            weight = math.sqrt(a_s) - math.sqrt((1 - a_s - lambda_squared) * a_t / (1 - a_t))
            noise_variance = lambda_squared + weight**2 * variance.double()
        z = torch.from_numpy(numpy_contract.normal(2, 9, 7, 2, t)).reshape(2, 1, 3, 3)
        expected = mean + noise_variance.sqrt() * z

        sampler = ddpm if eta is None else partial(ddim, eta=eta)
        a, b, lambda_squared = sampler(schedule, s, t)
        p, q = 1 / math.sqrt(a_t), -math.sqrt(1 - a_t) / math.sqrt(a_t)
        coefficients = StepCoefficients(p, q, a, b, lambda_squared, b**2)
        result = gaussian_step(
            x_t, epsilon, variance, coefficients, seed=7, step=t, x0_range=(-1.0, 1.0)
        )
        assert (result - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("s", "t"), [(0, 1), (0, 600), (5, 6), (100, 900)])
def test_ddim_with_eta_one_is_ddpm(s, t):
    for schedule in SCHEDULES.values():
        assert ddim(schedule, s, t, eta=1.0) == pytest.approx(
            ddpm(schedule, s, t), rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize("step", [ddpm, ddim])
@pytest.mark.parametrize(("s", "t"), [(3, 3), (4, 3), (0, 1001)])
def test_s_must_be_below_t(step, s, t):
    with pytest.raises(ValueError, match=f"0 <= s < t <= 1000, got s = {s}, t = {t}"):
        step(ocm.linear(), s, t)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_out_of_range(eta):
    with pytest.raises(ValueError, match=f"eta must lie in .* got {eta}"):
        ddim(ocm.linear(), 1, 2, eta=eta)


@pytest.mark.parametrize("sampler", [ddpm, ddim, partial(ddim, eta=0.5)])
@pytest.mark.parametrize("K", [3, 5, 20])
def test_exact_variance_reproduces_independent_gaussians_in_few_steps(sampler, K):
    """With the true mean and variance of x0, any number of steps gives the data's moments.

    (In two steps the one variance is taken at t = N, where float32 has no digits left of it.)
    """
    mean = torch.tensor([0.2, -0.3, 0.0, 0.1])
    std = torch.tensor([0.05, 0.1, 0.15, 0.2])
    denoiser = gaussian_denoiser(mean, torch.diag(std**2), ocm.cosine())
    count = 4000
    samples = ocm.sample(
        denoiser,
        ocm.Exact(denoiser),
        (count, 1, 1, 4),
        K,
        sampler=sampler,
    ).reshape(count, 4)
    assert ((samples.mean(dim=0) - mean).abs() < 5 * std / count**0.5).all()
    assert (samples.std(dim=0) / std - 1).abs().max() < 5 / (2 * count) ** 0.5
    without = ocm.sample(
        denoiser, ocm.BetaTilde(denoiser), (count, 1, 1, 4), K, sampler=ddpm
    ).reshape(count, 4)
    if K < 20:
        assert (without.std(dim=0) < 0.9 * std).all()


def test_sample_i_is_the_same_in_any_batch():
    denoiser = gaussian_denoiser(torch.zeros(4), 0.04 * torch.eye(4), ocm.linear())
    timesteps = ocm.even_timesteps(ocm.linear(), 5)
    covariance = ocm.Hutchinson(denoiser, num_probes=2)
    whole = ocm.sample(denoiser, covariance, (6, 1, 1, 4), timesteps, seed=3)
    part = ocm.sample(denoiser, covariance, (2, 1, 1, 4), timesteps, seed=3, sample_offset=4)
    torch.testing.assert_close(whole[4:], part)
    assert not torch.allclose(whole[:2], part)


def test_the_last_noise_can_be_bounded():
    denoiser = gaussian_denoiser(torch.zeros(4), 1e-4 * torch.eye(4), ocm.linear())
    # One noisy step, of variance beta at t = 1000, then x0_hat at t = 300.
    arguments = (denoiser, ocm.Beta(denoiser), (500, 1, 1, 4), [300, 1000])
    free = ocm.sample(*arguments)
    bounded = ocm.sample(*arguments, max_last_noise=last_step_noise(1))
    assert bounded.std() < 0.1 * free.std()


@pytest.mark.parametrize("timesteps", [[0, 500], [5, 3, 1000], [1, 1001], []])
def test_timesteps_must_increase_to_the_noise(timesteps):
    denoiser = gaussian_denoiser(torch.zeros(4), torch.eye(4), ocm.linear())
    with pytest.raises(ValueError, match=r"(timesteps|t) must"):
        ocm.sample(denoiser, ocm.BetaTilde(denoiser), (2, 1, 1, 4), timesteps)


BY_PRODUCTS = {
    "hutchinson": lambda denoiser: ocm.Hutchinson(denoiser, 4),
    "coloring": lambda denoiser: ocm.Hutchinson(denoiser, 4, probes=hessdiag.Coloring(4)),
    "exact": ocm.Exact,
    "full": ocm.Full,
    "blocks": ocm.ChannelBlocks,
    "cosine": lambda denoiser: ocm.CosineDiagonal(denoiser, 3),
    "lanczos": lambda denoiser: ocm.Lanczos(denoiser, 3),
    "calibrated": lambda denoiser: ocm.Calibrated(
        (ocm.Hutchinson(denoiser, 4),), Table({1: [1.0, 0.1], 1000: [0.9, 0.0]})
    ),
}


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_products_go_back_through_the_evaluation_of_the_prediction(unet, name):
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    covariance, steps, evaluations = BY_PRODUCTS[name](denoiser), 3, []
    shape = (2, 2, 8, 8)
    ocm.sample(denoiser, covariance, shape, 2)  # finds out what vmap cannot do
    hook = unet.register_forward_pre_hook(lambda module, inputs: evaluations.append(inputs[0]))
    ocm.sample(denoiser, covariance, shape, steps)
    assert [len(x_t) for x_t in evaluations] == [2] * steps
    evaluations.clear()
    x0 = torch.zeros(shape)
    if name != "lanczos":
        ocm.bits_per_dim(denoiser, covariance, ocm.quantise(x0), steps)
        assert len(evaluations) == steps
    hook.remove()


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_guidance_is_one_evaluation_of_both_branches(w):
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        num_class_embeds=4,
    )  # fmt: skip
    denoiser, sizes = ocm.Denoiser(unet, ocm.cosine()).freeze(), []
    condition = denoiser.condition(torch.tensor([0, 2]), w, null_label=3)
    unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    arguments = denoiser, ocm.Hutchinson(denoiser, 2), (2, 1, 8, 8), 3
    ocm.sample(*arguments, condition=condition)  # finds out what vmap cannot do
    sizes.clear()
    ocm.sample(*arguments, condition=condition)
    assert sizes == [2 if w == 1.0 else 4] * 3


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("kind", ["simple", "residual"])
def test_a_head_costs_no_further_pass_through_the_backbone(unet, method, kind):
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    covariance = LEARNED[method](denoiser, ocm.make_head(denoiser, kind).requires_grad_(False))
    passes = []
    unet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    ocm.sample(denoiser, covariance, (3, 2, 8, 8), 4)
    assert passes == [3] * 4


# Those that read no value back to the host: the only ones that a CUDA graph can hold.
CAPTURED = {
    "beta": lambda denoiser, head: ocm.Beta(denoiser),
    "beta_tilde": lambda denoiser, head: ocm.BetaTilde(denoiser),
    **LEARNED,
    "iddpm in other units": lambda denoiser, head: ocm.ImprovedDDPM(
        denoiser, head, ocm.Parameterisation(0.5)
    ),
    "calibrated": lambda denoiser, head: ocm.Calibrated(
        (ocm.OptimalCovarianceMatching(denoiser, head),),
        Table({1: [0.5, 0.1], 1000: [1.0, 0.2]}),
    ),
}


@pytest.mark.parametrize("max_last_noise", [None, 0.1])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_copies_nothing_from_the_host(name, max_last_noise):
    """What a CUDA graph could not hold, with the device "meta" for the GPU."""
    denoiser = small_denoiser("meta")
    # The project's own heads leave autocast, which knows no "meta".
    head = torch.nn.Conv2d(WIDTH, CHANNELS, 3, padding=1, device="meta")
    covariance = CAPTURED[name](denoiser, head)
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    arguments = denoiser, covariance, (3, 2, 8, 8), [1, 400, 1000]
    with one_device() as operators:
        images = ocm.sample(*arguments, seed=seed, max_last_noise=max_last_noise)
    assert images.shape == (3, 2, 8, 8)
    assert images.is_meta
    assert operators.count("hessdiag::gaussian_step") == 3


def seen_while_sampling(schedule, steps, variance=0.5, **options):
    """The states of a run of a network that says 0, of this variance at every step, and its end."""
    seen = []

    def network(x, time):
        seen.append(x.clone())
        return torch.zeros_like(x)

    denoiser = ocm.Denoiser(network, schedule, "sample")
    at = {t: [variance / schedule.level(t).beta_bar] for t in steps}
    covariance = ocm.Analytic(denoiser, Table(at))
    end = ocm.sample(denoiser, covariance, (3, 1, 2, 2), steps, seed=4, **options)
    return [*seen, end]


def test_only_the_last_noisy_step_is_bounded():
    steps = [100, 500, 1000]
    free = seen_while_sampling(ocm.linear(), steps)
    bounded = seen_while_sampling(ocm.linear(), steps, max_last_noise=1e-3)
    assert len(free) == 4
    for one, other in zip(free[:2], bounded[:2], strict=True):  # at 1000 and 500
        torch.testing.assert_close(one, other)
    assert (free[2] - bounded[2]).abs().max() > 0.1  # at 100
    # A step from 500 that takes all of its mean from x_t, but for that noise.
    a = ocm.ddpm(ocm.linear(), 100, 500).mean_from_x_t
    assert (bounded[2] - a * bounded[1]).abs().max() < 5e-3


def test_a_variance_that_data_do_not_allow_counts_as_the_largest_that_they_do():
    steps = [100, 500, 1000]
    runs = [seen_while_sampling(ocm.linear(), steps, variance) for variance in (1.0, 9.0)]
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)
    wide = seen_while_sampling(ocm.linear(), steps, 9.0, x0_range=None)
    assert (wide[1] - runs[0][1]).abs().max() > 0.1


def test_sampling_starts_at_the_scale_of_its_first_timestep():
    """Of data of variance 1 and the noise there, wherever that is."""
    schedule = ocm.edm()
    starts = {t: seen_while_sampling(schedule, [100, t])[0] for t in (500, 1000)}
    for t, start in starts.items():
        z = start / (1 + schedule.sigma(t).item() ** 2) ** 0.5
        torch.testing.assert_close(z, starts[1000] / (1 + 80.0**2) ** 0.5)


def test_a_share_of_noise_is_one_of_its_standard_deviation():
    step = ocm.renoised(ocm.flow(), 400, 800, noise=0.5)
    assert step.noise_variance == pytest.approx((0.5 * 0.4) ** 2)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_last_noise_moves_pixels_by_grey_levels_on_average(levels):
    mean_size = last_step_noise(levels) * (2 / math.pi) ** 0.5
    assert mean_size == pytest.approx(levels * 2 / 255)
