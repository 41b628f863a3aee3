"""Mean and covariance for other samplers, and what follows for linear inverse problems."""

import itertools
import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser

import ocm
from ocm.covariances.operators import diagonal, full
from ocm.sampling.any_sigma import sigmas, timestep_at

D = 4
SCHEDULE = ocm.linear()


def gaussian(seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    mean = torch.randn(D, generator=generator, dtype=torch.float64)
    return mean, root @ root.T / D + 0.1 * torch.eye(D).double()


def points(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, 1, D, generator=generator, dtype=torch.float64)


def on_the_grid(t):
    """Sigma of timestep t, in float64."""
    return sigmas(SCHEDULE)[t - 1].item()


# --- sigmas ------------------------------------------------------------------------------------


def test_sigmas_and_timesteps_are_those_of_the_variance_exploding_process():
    alpha_bar = SCHEDULE.alpha_bar[1:]
    torch.testing.assert_close(sigmas(SCHEDULE), ((1 - alpha_bar) / alpha_bar).sqrt())
    every = torch.arange(1, 1001)
    assert torch.equal(timestep_at(SCHEDULE, sigmas(SCHEDULE)), every)
    between = (sigmas(SCHEDULE)[:-1].log() * 0.6 + sigmas(SCHEDULE)[1:].log() * 0.4).exp()
    assert torch.equal(timestep_at(SCHEDULE, between), every[:-1])
    assert timestep_at(SCHEDULE, torch.tensor([1e-6, 200.0])).tolist() == [1, 1000]


@pytest.mark.parametrize("sigma", [0.0, -1.0, 400.0, math.nan, math.inf])
def test_sigmas_that_the_schedule_does_not_know_are_refused(sigma):
    denoiser = gaussian_denoiser(*gaussian(), SCHEDULE)
    with pytest.raises(ValueError, match=r"sigma must lie in \(0, 31\d"):
        ocm.x0_given(denoiser, ocm.Full(denoiser), points(), sigma)
    with pytest.raises(ValueError, match="sigma must be one number, or one for each of 3"):
        ocm.x0_given(denoiser, ocm.Full(denoiser), points(), torch.ones(2))


# --- mean and covariance -----------------------------------------------------------------------


@pytest.mark.parametrize("t", [10, 400, 900])
def test_the_posterior_of_a_gaussian_is_that_of_bayes(t):
    mean, covariance = gaussian()
    denoiser, x, sigma = gaussian_denoiser(mean, covariance, SCHEDULE), points(), on_the_grid(t)
    posterior = ocm.x0_given(denoiser, ocm.Full(denoiser), x, sigma, x0_range=None)

    precision = torch.linalg.inv(covariance) + torch.eye(D).double() / sigma**2
    expected = torch.linalg.inv(precision)
    right = torch.linalg.solve(covariance, mean) + x.flatten(1) / sigma**2
    torch.testing.assert_close(posterior.mean.flatten(1), right @ expected, rtol=1e-6, atol=1e-6)
    v = points(seed=5)
    products = posterior.covariance.multiply(v).flatten(1)
    torch.testing.assert_close(products, v.flatten(1) @ expected, rtol=1e-5, atol=1e-6)


def test_between_levels_the_mean_is_that_of_sigma_itself():
    """For a denoiser whose error in the level is nothing: x0_hat = x - sigma epsilon."""
    mean, covariance = gaussian()
    denoiser, x = gaussian_denoiser(mean, covariance, SCHEDULE), points()
    sigma = math.sqrt(on_the_grid(500) * on_the_grid(501))
    model = ocm.KDiffusionDenoiser(denoiser)
    t = int(timestep_at(SCHEDULE, torch.tensor(sigma)))
    epsilon = denoiser.output(x / math.sqrt(1 + sigma**2), t)
    torch.testing.assert_close(model(x, sigma), x - sigma * epsilon)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_and_a_sigma_for_each_sample(unet, prediction_type):
    denoiser = ocm.Denoiser(unet, SCHEDULE, prediction_type).freeze()
    head = ocm.make_head(denoiser)
    torch.nn.init.normal_(head.head.conv.weight, std=0.2)
    covariance = ocm.OptimalCovarianceMatching(denoiser, head, ocm.Parameterisation(0.5))
    levels = [700, 20]
    sigma = torch.tensor([on_the_grid(t) for t in levels], dtype=torch.float64)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    together = ocm.x0_given(denoiser, covariance, x, sigma)
    for i, t in enumerate(levels):
        alpha_bar = SCHEDULE.alpha_bar[t]
        prediction = denoiser.predict((alpha_bar.sqrt() * x[i : i + 1]).float(), t)
        expected = covariance.at(prediction).bounded((-1.0, 1.0)).diagonal()
        mean = together.mean[i : i + 1]
        torch.testing.assert_close(mean, prediction.x0_hat.clamp(-1, 1), rtol=1e-3, atol=1e-4)
        variance = together.covariance.diagonal()[i : i + 1]
        torch.testing.assert_close(variance, expected, rtol=1e-3, atol=1e-4)


def test_guidance_combines_both_branches():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=5,
    )
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.2)
    plain = ocm.Denoiser(dit, SCHEDULE).freeze()
    labels, null, x, w = torch.tensor([1, 3]), torch.tensor([5, 5]), torch.randn(2, 2, 4, 4), 3.0
    model = ocm.KDiffusionDenoiser(plain)
    both = [model(x, 2.0, condition=plain.condition(c)) for c in (null, labels)]
    guided = model(x, 2.0, condition=plain.condition(labels, w))
    torch.testing.assert_close(guided, (1 - w) * both[0] + w * both[1], rtol=1e-4, atol=1e-4)


# --- k-diffusion -------------------------------------------------------------------------------


def test_an_euler_sampler_of_k_diffusion_reaches_the_data():
    """dx/dsigma = (x - x0_hat) / sigma, from sigma_max n, against the map of the exact flow."""
    mean, covariance = gaussian()
    model = ocm.KDiffusionDenoiser(gaussian_denoiser(mean, covariance, SCHEDULE))
    levels = model.get_sigmas(300).double()
    assert levels[-1] == 0
    assert bool((levels.diff() < 0).all())
    assert levels[0].item() == pytest.approx(model.sigma_max)
    assert levels[-2].item() == pytest.approx(model.sigma_min)
    start = x = points() * model.sigma_max
    for sigma, smaller in itertools.pairwise(levels):
        x0_hat = model(x, sigma * torch.ones(len(x)))
        x = x + (x - x0_hat) / sigma * (smaller - sigma)
    values, vectors = torch.linalg.eigh(covariance)
    shrink = (values / (values + model.sigma_max**2)).sqrt()
    expected = (start.flatten(1) - mean) @ vectors * shrink @ vectors.T + mean
    assert (x.flatten(1) - expected).abs().max() < 0.03 * expected.abs().max()


def test_it_is_differentiable_clips_where_asked_and_refuses_what_it_would_ignore():
    mean, covariance = gaussian()
    denoiser = gaussian_denoiser(mean, covariance, SCHEDULE)
    model, x, sigma = ocm.KDiffusionDenoiser(denoiser), points(), on_the_grid(600)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, sigma)[0], x)
    jacobian = jacobian.reshape(D, 3, D)[:, 0]
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(D).double())
    torch.testing.assert_close(jacobian, gain, rtol=1e-6, atol=1e-8)
    clipped = ocm.KDiffusionDenoiser(denoiser, x0_range=(-0.1, 0.1))(x, sigma)
    torch.testing.assert_close(clipped, model(x, sigma).clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match="n must be"):
        model.get_sigmas(0)


# --- inverse problems --------------------------------------------------------------------------


def measured(rows=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    y = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    return A, y


@pytest.mark.parametrize("with_adjoint", [False, True])
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_the_mean_given_a_measurement_is_that_of_a_gaussian(with_adjoint, noise_std):
    """Of x0 given x and y, by one Gaussian joint of all three in float64."""
    mean, covariance = gaussian()
    A, y = measured()
    denoiser, x, sigma = gaussian_denoiser(mean, covariance, SCHEDULE), points(), on_the_grid(500)
    posterior = ocm.x0_given(denoiser, ocm.Full(denoiser), x, sigma, x0_range=None)
    adjoint = (lambda u: (u @ A).reshape(-1, 1, 1, D)) if with_adjoint else None
    result = ocm.posterior_mean_given_measurement(
        posterior.mean,
        posterior.covariance,
        y,
        lambda x0: x0.flatten(1) @ A.T,
        adjoint,
        noise_std=noise_std,
        tolerance=1e-10,
    )

    seen = torch.cat([torch.eye(D).double(), A])  # x and y as seen = B x0 + noise
    noise = torch.diag(torch.tensor([sigma**2] * D + [noise_std**2] * 2, dtype=torch.float64))
    values = torch.cat([x.flatten(1), y], dim=1)
    gain = covariance @ seen.T @ torch.linalg.inv(seen @ covariance @ seen.T + noise)
    expected = mean + (values - mean @ seen.T) @ gain.T
    torch.testing.assert_close(result.flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_any_covariance_will_do_and_samples_do_not_mix():
    """Cosines, and the draws of Lanczos; one sample alone and beside one that is done at once."""
    mean, covariance = gaussian()
    A, y = measured()
    denoiser, x, sigma = gaussian_denoiser(mean, covariance, SCHEDULE), points(), on_the_grid(500)

    def solve(stated, chosen):
        posterior = ocm.x0_given(denoiser, stated, x[chosen], sigma, x0_range=None)
        operator = lambda x0: x0.flatten(1) @ A.T  # noqa: E731
        target = torch.where(
            torch.tensor([[True], [False], [False]])[chosen], operator(posterior.mean), y[chosen]
        )
        return posterior, ocm.posterior_mean_given_measurement(
            posterior.mean, posterior.covariance, target, operator, noise_std=0.1, tolerance=1e-9
        )

    full_result = solve(ocm.Full(denoiser), slice(None))[1]
    assert torch.equal(full_result[:1], solve(ocm.Full(denoiser), slice(None))[0].mean[:1])
    torch.testing.assert_close(
        full_result, solve(ocm.Lanczos(denoiser, D), slice(None))[1], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(full_result[2:], solve(ocm.Full(denoiser), slice(2, 3))[1])
    assert not torch.allclose(full_result, solve(ocm.Exact(denoiser), slice(None))[1], atol=1e-3)


def test_inpainting_fills_in_what_is_correlated():
    covariance = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
    C = full(covariance, torch.Size([1, 2]))
    result = ocm.posterior_mean_given_measurement(
        torch.zeros(1, 2), C, torch.tensor([[1.0]]), lambda x: x[:, :1], noise_std=0.0
    )
    torch.testing.assert_close(result, torch.tensor([[1.0, 0.9]]))


def test_problems_that_make_no_sense_are_refused():
    C = diagonal(torch.ones(1, 2), torch.Size([1, 2]))
    mean, y = torch.zeros(1, 2), torch.ones(1, 2)

    def solve(covariance=C, measurement=y, operator=lambda x: x, **options):
        options = {"noise_std": 0.1} | options
        return ocm.posterior_mean_given_measurement(
            mean, covariance, measurement, operator, **options
        )

    with pytest.raises(ValueError, match=r"noise_std must be at least 0, got -1.0"):
        solve(noise_std=-1.0)
    with pytest.raises(ValueError, match=r"measurement must have the shape.*got \(1, 1\)"):
        solve(measurement=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"operator must be linear.*up to 2"):
        solve(operator=lambda x: x + 2.0)
    with pytest.raises(ValueError, match="max_iterations must be"):
        solve(max_iterations=0)
    negative = diagonal(torch.tensor([[-1.0, 1.0]]), torch.Size([1, 2]))
    with pytest.raises(ValueError, match="covariance must be positive semi-definite"):
        solve(covariance=negative, measurement=torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="a noise_std above 0 where measurements repeat"):
        solve(operator=lambda x: 0.0 * x, noise_std=0.0)
    uneven = diagonal(torch.tensor([[1.0, 50.0]]), torch.Size([1, 2]))
    with pytest.warns(UserWarning, match=r"reached a relative residual of .* in 1 iterations"):
        solve(covariance=uneven, max_iterations=1)


@pytest.mark.parametrize("path", ["linear", "zero_snr", "vp", "flow", "edm", "trigflow"])
def test_x0_given_x_on_every_path(path):
    """Against Bayes' rule for x = x0 + sigma n, which knows no path."""
    from path_denoiser import DATA_STD, SHAPE, gaussian, path_denoiser

    data = gaussian()
    kind = {"edm": "edm", "trigflow": "trigflow", "linear": "epsilon"}.get(path, "sample")
    denoiser = path_denoiser(data, path, kind)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    # At sigmas that a discrete schedule has, where it would be nearest only.
    levels = sigmas(denoiser.schedule)
    for sigma in (levels[4].item(), levels[500].item(), levels[997].item()):
        if denoiser.schedule.is_continuous:
            sigma *= 1.01
        ones = torch.ones(3, dtype=torch.float64)
        mean, covariance = data.posterior(x.flatten(1), ones, sigma * ones)
        posterior = ocm.x0_given(denoiser, ocm.Full(denoiser), x, sigma, x0_range=None)
        torch.testing.assert_close(posterior.mean.flatten(1), mean, rtol=1e-5, atol=1e-7)
        product = torch.einsum("bij,bj->bi", covariance, x.flatten(1))
        torch.testing.assert_close(
            posterior.covariance.multiply(x).flatten(1), product, rtol=1e-4, atol=1e-7
        )
        several = torch.full((3,), sigma, dtype=torch.float64)
        torch.testing.assert_close(
            ocm.KDiffusionDenoiser(denoiser)(x, several).flatten(1), mean, rtol=1e-5, atol=1e-7
        )
    adapter = ocm.KDiffusionDenoiser(denoiser)
    assert math.isfinite(adapter.sigma_max)
    found = adapter.get_sigmas(5)
    assert bool(torch.isfinite(found).all())
    assert bool((found.diff() < 0).all())
    assert DATA_STD > 0


def test_between_two_levels_the_nearer_one_in_the_logarithm_is_taken():
    """Just beyond their geometric mean it is the upper one, and before it the lower."""
    schedule = ocm.linear()
    levels = sigmas(schedule)
    lower, upper = levels[:-1], levels[1:]
    middle = (lower * upper).sqrt()
    beyond = (middle + (lower + upper) / 2) / 2  # which in sigma itself is nearer to the lower
    t = torch.arange(1, 1000)
    far = (upper / lower > 1.002) & (t > 5)
    assert far.sum() > 500
    assert torch.equal(timestep_at(schedule, beyond)[far], (t + 1)[far])
    assert torch.equal(timestep_at(schedule, middle * 0.9999)[far], t[far])


def test_a_part_of_a_batch_has_the_probes_of_its_own_samples():
    A = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    denoiser = ocm.Denoiser(lambda x, time: x @ A.T, ocm.linear(), "sample")
    covariance = ocm.Hutchinson(denoiser, 2, floor=None)
    x = torch.zeros(3, 8).double()
    whole = ocm.x0_given(denoiser, covariance, x, 0.5, x0_range=None).covariance.diagonal()
    rest = ocm.x0_given(denoiser, covariance, x[1:], 0.5, x0_range=None, sample_offset=1)
    torch.testing.assert_close(rest.covariance.diagonal(), whole[1:])
    assert (whole[0] - whole[1]).abs().max() > 1e-3
