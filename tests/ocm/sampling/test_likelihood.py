"""The bound against torch.distributions, and against the exact answer for Gaussian data."""

import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser
from torch.distributions import Normal, kl_divergence

import ocm
from hessdiag.kernels import normal
from ocm.diffusion.divergences import discretised_gaussian_log_prob, gaussian_step_kl
from ocm.diffusion.tables import Table
from ocm.sampling.samplers import ddpm


@pytest.mark.parametrize("schedule", [ocm.linear(), ocm.cosine()])
@pytest.mark.parametrize(("s", "t"), [(1, 2), (40, 300), (900, 1000)])
def test_the_step_is_the_kl_of_its_two_gaussians(schedule, s, t):
    x0, x0_hat, x_t = torch.rand(3, 50, dtype=torch.float64) * 2 - 1
    variance = torch.rand(50, dtype=torch.float64)
    step = ddpm(schedule, s, t)
    posterior = Normal(
        step.mean_from_x_t * x_t + step.mean_from_x0 * x0, math.sqrt(step.noise_variance)
    )
    model = Normal(
        step.mean_from_x_t * x_t + step.mean_from_x0 * x0_hat,
        (step.noise_variance + step.mean_from_x0**2 * variance).sqrt(),
    )
    snr = schedule.alpha_bar / schedule.beta_bar
    kl = gaussian_step_kl((x0 - x0_hat) ** 2, variance, (snr[s] - snr[t]).item())
    torch.testing.assert_close(kl, kl_divergence(posterior, model), rtol=1e-7, atol=1e-10)


def test_bins_sum_to_one():
    for levels in (2, 17, 256):
        grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
        for mean in (-1.0, -0.2, 0.9, 1.0):
            log_prob = discretised_gaussian_log_prob(
                grid, torch.full_like(grid, mean), 0.05, levels
            )
            assert log_prob.exp().sum().item() == pytest.approx(1.0, rel=1e-12)


def test_bins_against_the_normal_distribution():
    grid = torch.linspace(-1, 1, 17, dtype=torch.float64)
    mean = torch.full_like(grid, 0.13)
    log_prob = discretised_gaussian_log_prob(grid, mean, 0.3, 17)
    normal = Normal(mean, 0.3)
    upper = torch.where(grid > 0.99, torch.inf, grid + 1 / 16)
    lower = torch.where(grid < -0.99, -torch.inf, grid - 1 / 16)
    torch.testing.assert_close(log_prob.exp(), normal.cdf(upper) - normal.cdf(lower))


def test_far_bins_do_not_underflow():
    log_prob = discretised_gaussian_log_prob(
        torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, -1.0]).double(), 0.005, 256
    )
    # The nearer edge carries the mass: (distance / std)^2 / 2 nats, up to a logarithm.
    edge = (torch.tensor([1.0, 2.0]).double() - 1 / 255) / 0.005
    torch.testing.assert_close(log_prob, -(edge**2) / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("K", [3, 10])
def test_gaussian_data_with_the_exact_variance_has_no_gap(K):
    """With an exact reverse process, prior + steps is KL(q(x_1 | x0) || p(x_1)) on average."""
    schedule = ocm.linear()
    std = torch.tensor([0.05, 0.1, 0.3, 0.2])
    denoiser = gaussian_denoiser(torch.zeros(4), torch.diag(std**2), schedule)
    x0 = ocm.quantise(torch.tensor([0.04, -0.15, 0.2, 0.1])).expand(20000, 1, 1, 4)
    bound = ocm.bits_per_dim(denoiser, ocm.Exact(denoiser), x0, K)
    values = bound.prior + bound.steps.sum(dim=1)
    alpha_bar, beta_bar = schedule.alpha_bar[1], schedule.beta_bar[1]
    expected = kl_divergence(
        Normal(alpha_bar.sqrt() * x0[0].double(), beta_bar.sqrt()),
        Normal(torch.zeros(4).double(), (alpha_bar * std**2 + beta_bar).sqrt()),
    ).mean() / math.log(2)
    # The forward process at N is not quite N(0, I), from which the bound starts: 5e-5 bits.
    standard_error = values.std() / len(values) ** 0.5
    assert (values.mean() - expected).abs() < 4 * standard_error + 1e-4
    for worse in (ocm.Beta(denoiser), ocm.BetaTilde(denoiser)):
        other = ocm.bits_per_dim(denoiser, worse, x0[:2000], K)
        assert other.total.mean() > bound.total.mean()


def test_prior_and_decoder_against_torch_distributions():
    schedule = ocm.linear()
    denoiser = gaussian_denoiser(torch.zeros(4), 0.04 * torch.eye(4), schedule)
    x0 = ocm.quantise(torch.tensor([-1.0, -0.5, 0.25, 1.0])).reshape(1, 1, 1, 4)
    beta_tilde, exact = ocm.BetaTilde(denoiser), ocm.Exact(denoiser)
    bound = ocm.bits_per_dim(denoiser, beta_tilde, x0, [1, 1000], decoder="beta_tilde", seed=6)

    alpha_bar, beta_bar = schedule.alpha_bar[-1], schedule.beta_bar[-1]
    prior = kl_divergence(Normal(alpha_bar.sqrt() * x0.double(), beta_bar.sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(bound.prior[0], prior.mean() / math.log(2))

    alpha_bar, beta_bar = schedule.alpha_bar[1], schedule.beta_bar[1]
    x_1 = alpha_bar.sqrt() * x0 + beta_bar.sqrt() * normal((1, 1, 1, 4), 6, step=1)
    x0_hat = alpha_bar.sqrt() * 0.04 / (alpha_bar * 0.04 + beta_bar) * x_1
    std = math.sqrt(1e-4 * schedule.beta(1, 2) / beta_bar_of(2))
    decoder = discretised_gaussian_log_prob(x0.double(), x0_hat.clamp(-1, 1), std, 256)
    torch.testing.assert_close(bound.decoder[0], -decoder.mean() / math.log(2), rtol=1e-3, atol=0)
    assert bound.decoder[0] > 0.01

    # By the covariance itself: the posterior's variance, and of none at all a tenth of a bin.
    posterior = 1 / (1 / 0.04 + alpha_bar / beta_bar)
    for covariance, std in ((exact, posterior.sqrt()), (beta_tilde, 0.1 * 2 / 255)):
        bound = ocm.bits_per_dim(denoiser, covariance, x0, [1, 1000], seed=6)
        decoder = discretised_gaussian_log_prob(x0.double(), x0_hat.clamp(-1, 1), std, 256)
        torch.testing.assert_close(
            bound.decoder[0], -decoder.mean() / math.log(2), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("K", [2, 5, 10, 50])
@pytest.mark.parametrize("schedule", [ocm.linear(), ocm.cosine()])
def test_the_bound_of_gaussian_images_is_their_likelihood(schedule, K):
    """With the full covariance, to 0.005 bits/dim: the papers' decoder alone costs 0.1."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator).double()
    covariance = 0.04 * (A @ A.T / 6 + 0.1 * torch.eye(6).double())
    denoiser = gaussian_denoiser(torch.zeros(6), covariance, schedule)
    data = torch.distributions.MultivariateNormal(torch.zeros(6).double(), covariance)
    x0 = torch.randn(800, 6, generator=generator).double() @ torch.linalg.cholesky(covariance).T
    x0 = ocm.quantise(x0[(x0.abs() < 1).all(1)])
    # The density changes little within a bin: its mass is the density times the bin.
    exact = (-data.log_prob(x0) - 6 * math.log(2 / 255)) / (6 * math.log(2))
    # In float64: near t = N of the cosine schedule the covariance is a difference of large numbers.
    images = x0.reshape(-1, 1, 1, 6)
    bits = {
        decoder: ocm.bits_per_dim(denoiser, ocm.Full(denoiser), images, K, decoder=decoder).total
        for decoder in ("stated", "beta_tilde")
    }
    gap = bits["stated"] - exact
    error = gap.std() / len(images) ** 0.5
    assert gap.mean().abs() < 4 * error + 1e-3
    # With the density, whose bound is the likelihood, on the same noise: what the bins change.
    density = ocm.bits_per_dim(
        denoiser, ocm.Full(denoiser), images, K, levels=None, x0_range=None
    ).total - math.log2(2 / 255)
    paired = bits["stated"] - density
    assert paired.mean().abs() < 0.005 + 2 * paired.std() / len(images) ** 0.5
    assert (bits["beta_tilde"] - density).mean() > 0.05


def test_a_decoder_of_no_such_name():
    denoiser = gaussian_denoiser(torch.zeros(4), 0.04 * torch.eye(4), ocm.linear())
    x0 = torch.full((1, 1, 1, 4), -1.0)
    with pytest.raises(ValueError, match="decoder must be 'stated' or 'beta_tilde', got 'exact'"):
        ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, 2, decoder="exact")
    with pytest.raises(ValueError, match="decoder must be 'stated' for continuous data"):
        ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, 2, levels=None, decoder="beta_tilde")


def beta_bar_of(t):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return 1.0 - torch.prod(1.0 - betas[:t]).item()


def test_parts_of_a_batch_and_of_the_sum():
    denoiser = gaussian_denoiser(torch.zeros(4), 0.04 * torch.eye(4), ocm.linear())
    x0 = ocm.quantise(torch.rand(6, 1, 1, 4) * 2 - 1)
    timesteps = ocm.even_timesteps(ocm.linear(), 4)
    whole = ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, timesteps)
    part = ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0[4:], timesteps, sample_offset=4)
    torch.testing.assert_close(whole.total[4:], part.total)
    assert whole.steps.shape == (6, 3)
    torch.testing.assert_close(whole.total, whole.prior + whole.steps.sum(dim=1) + whole.decoder)


def test_one_step_has_a_prior_and_a_decoder():
    denoiser = gaussian_denoiser(torch.zeros(4), 0.04 * torch.eye(4), ocm.linear())
    x0 = torch.ones(2, 1, 1, 4)
    bound = ocm.bits_per_dim(denoiser, ocm.BetaTilde(denoiser), x0, [1000])
    assert bound.steps.shape == (2, 0)
    assert torch.isfinite(bound.total).all()


@pytest.mark.parametrize(
    ("x0", "arguments", "message"),
    [
        (torch.full((1, 1, 1, 4), 1.5), {}, r"x0 must lie in \[-1, 1\], got values up to 1.5"),
        (torch.zeros(1, 1, 1, 4), {}, "x0 must lie on the grid of levels = 256"),
        (torch.full((1, 1, 1, 4), math.nan), {}, "x0 must be finite, got 4 NaN"),
        (torch.ones(1, 1, 1, 4), {"levels": 1}, "levels must be at least 2, got 1"),
        (
            torch.ones(1, 1, 1, 4),
            {"steps": [1, 10]},
            "steps must end at N = 1000, where .* got 10",
        ),
    ],
)
def test_errors(x0, arguments, message):
    denoiser = gaussian_denoiser(torch.zeros(4), torch.eye(4), ocm.linear())
    arguments = {"steps": [1, 1000], **arguments}
    with pytest.raises(ValueError, match=message):
        ocm.bits_per_dim(denoiser, ocm.BetaTilde(denoiser), x0, **arguments)


def test_the_mean_is_clipped_in_every_term():
    """A network that says 1.5 of images that are 1 is as good as one that says 1."""
    x0 = torch.ones(2, 1, 2, 2)

    def bound(said, **options):
        denoiser = ocm.Denoiser(lambda x, time: torch.full_like(x, said), ocm.linear(), "sample")
        return ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, 4, **options)

    for levels in (256, None):
        right, beyond = bound(1.0, levels=levels), bound(1.5, levels=levels)
        torch.testing.assert_close(beyond.steps, right.steps)
        torch.testing.assert_close(beyond.decoder, right.decoder)
    free = bound(1.5, levels=None, x0_range=None)
    assert (free.steps.sum(1) > right.steps.sum(1) + 0.1).all()
    assert (free.decoder > right.decoder + 0.1).all()


def test_a_variance_that_images_do_not_allow_counts_as_the_largest_that_they_do():
    denoiser = ocm.Denoiser(lambda x, time: 0.5 * torch.ones_like(x), ocm.linear(), "sample")
    x0, steps = ocm.quantise(torch.full((2, 1, 2, 2), -0.3)), [1, 500, 1000]

    def bound(variance):
        table = Table({t: [variance / denoiser.schedule.level(t).beta_bar] for t in steps})
        return ocm.bits_per_dim(denoiser, ocm.Analytic(denoiser, table), x0, steps)

    wide, allowed = bound(9.0), bound(1.0)
    torch.testing.assert_close(wide.steps, allowed.steps)
    torch.testing.assert_close(wide.decoder, allowed.decoder)


@pytest.mark.parametrize("off", [0.02, 0.4])
def test_images_a_part_of_a_level_off_the_grid_are_refused(off):
    denoiser = ocm.Denoiser(lambda x, time: x, ocm.linear(), "sample")
    x0 = ocm.quantise(torch.zeros(1, 1, 2, 2)) + off * 2 / 255
    with pytest.raises(ValueError, match="x0 must lie on the grid of levels = 256 grey levels"):
        ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), x0, 3)
