"""The head in cosines of colours: closed forms of Gaussian data that are diagonal there."""

import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import ocm
from ocm.covariances.learned.frequencies import _basis
from ocm.diffusion.noise import noisy

# A rotation; its squares, which weight variances, are not symmetric.
COLOURS = torch.linalg.qr(
    torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 1.0]]).double()
)[0]
VARIANCES = torch.linspace(0.02, 0.4, 48).double().reshape(3, 4, 4)
D = 48


def shape(fold):
    return (3 * fold**2, 4 // fold, 4 // fold)


def matrix(fold):
    """F, rows are the coefficients."""
    basis = _basis(COLOURS, fold)
    return basis.analyse(torch.eye(D).double().reshape(D, *shape(fold))).reshape(D, D).T


def covariance_of_data(fold):
    return matrix(fold).T @ VARIANCES.flatten().diag() @ matrix(fold)


def on_gaussian_data(fold, variances=VARIANCES, levels=None, **options):
    """The head of a denoiser whose features are x_t, in double precision."""
    denoiser = gaussian_denoiser(torch.zeros(D), covariance_of_data(fold), ocm.cosine())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ocm.FrequencyHead(shape(fold)[0], (3, 4, 4), hidden=8).double()
    return ocm.FrequencyLikelihood(
        denoiser,
        head,
        levels=levels,
        x0_range=None,
        variances=variances,
        colours=COLOURS,
        fold=fold,
        **options,
    )


def images(fold, count=64, seed=0):
    z = torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double()
    return (z * VARIANCES.flatten().sqrt() @ matrix(fold)).reshape(count, *shape(fold))


@pytest.mark.parametrize("fold", [1, 2])
def test_the_basis_is_one(fold):
    basis, F = _basis(COLOURS, fold), matrix(fold)
    torch.testing.assert_close(F @ F.T, torch.eye(D).double())
    x = images(fold)
    torch.testing.assert_close(basis.synthesise(basis.analyse(x)), x)
    torch.testing.assert_close(
        basis.diagonal(VARIANCES[None]).flatten(), covariance_of_data(fold).diag()
    )
    # An even grey image is a coefficient of each colour, wherever its pixels are kept.
    even = torch.ones(1, *shape(fold)).double()
    assert int((basis.analyse(even).abs() > 1e-9).sum()) == 3


@pytest.mark.parametrize("fold", [1, 2])
def test_an_untrained_head_states_the_covariance_of_gaussian_data(fold):
    covariance = on_gaussian_data(fold)
    for t in (1, 300, 1000):
        x_t = images(fold, D)
        found = covariance.at(covariance.denoiser.predict(x_t, t))
        product = found.multiply(torch.eye(D).double().reshape(x_t.shape)).reshape(D, D)
        wanted = posterior_covariance(covariance_of_data(fold), ocm.cosine(), t)
        torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-9)


def test_its_bound_is_the_likelihood_of_gaussian_data():
    covariance, x0 = on_gaussian_data(2), images(2)
    bound = ocm.bits_per_dim(covariance.denoiser, covariance, x0, 3, levels=None, x0_range=None)
    normal = MultivariateNormal(torch.zeros(D).double(), covariance_of_data(2))
    wanted = -normal.log_prob(x0.flatten(1)) / (D * math.log(2))
    assert bound.total.mean().item() == pytest.approx(wanted.mean().item(), abs=0.05)


def test_its_loss_is_the_divergence_of_the_step():
    """Of full Gaussians from torch.distributions, whose covariances are not diagonal."""
    schedule, K, (s, t) = ocm.cosine(), 3, (500, 1000)
    covariance = on_gaussian_data(2, 2 * VARIANCES, step_counts=(K,), spacings=("even",))
    with torch.no_grad():
        covariance.head.out.bias += 0.3
    x0 = images(2, 1)
    found = covariance.loss(x0, torch.tensor([900]), seed=3, sample_offset=7)
    x_t, _ = noisy(schedule, x0, torch.tensor([t]), 3, 7)
    prediction = covariance.denoiser.predict(x_t, t)
    unit = 1 / (1 / (2 * VARIANCES.flatten()) + schedule.snr[t])
    eigenvalues = unit * math.log1p(math.exp(0.3 + math.log(math.e - 1)))
    C = matrix(2).T @ eigenvalues.diag() @ matrix(2)
    step = ocm.ddpm(schedule, s, t)
    true, own = (step.mean_from_x0 * x.flatten() for x in (x0, prediction.x0_hat))
    noise = step.noise_variance * torch.eye(D).double()
    wanted = kl_divergence(
        MultivariateNormal(true, noise),
        MultivariateNormal(own, noise + step.mean_from_x0**2 * C),
    )
    torch.testing.assert_close(found, K * wanted / D, rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", [None, 16])
def test_its_decoder(levels):
    """A density of all pixels at once, or the mass of each on the bin of its grey level."""
    covariance = on_gaussian_data(2, levels=levels, step_counts=(1,), spacings=("even",))
    x0 = ocm.quantise(images(2, 1).clamp(-0.9, 0.9), 16)
    found = covariance.loss(x0, torch.tensor([500]), seed=3, sample_offset=7)
    x_t, _ = noisy(ocm.cosine(), x0, torch.tensor([1000]), 3, 7)
    mean = covariance.denoiser.predict(x_t, 1000).x0_hat.flatten()
    C = posterior_covariance(covariance_of_data(2), ocm.cosine(), 1000)
    if levels is None:
        wanted = -MultivariateNormal(mean, C).log_prob(x0.flatten()) / D
    else:
        normal = Normal(mean, C.diag().sqrt())
        below, above = (normal.cdf(x0.flatten() + side / 15) for side in (-1, 1))
        wanted = -(above - below).log().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_training_finds_the_variances_it_was_not_told():
    covariance = on_gaussian_data(1, 4 * VARIANCES)
    x0 = images(1, 512, seed=1)
    scored = [images(1), 5]
    before, best = (
        ocm.bits_per_dim(c.denoiser, c, *scored, levels=None, x0_range=None).total.mean().item()
        for c in (covariance, on_gaussian_data(1))
    )
    ocm.train_head(
        covariance, x0, ocm.TrainingSettings(100, 16, learning_rate=5e-3), progress=False
    )
    bits = ocm.bits_per_dim(covariance.denoiser, covariance, *scored, levels=None, x0_range=None)
    assert before - best > 0.1
    assert bits.total.mean().item() - best < 0.3 * (before - best)


def test_for_images_finds_colours_and_variances():
    x0 = images(2, 20_000)
    covariance = ocm.FrequencyLikelihood.for_images(on_gaussian_data(2).denoiser, x0, 8, fold=2)
    torch.testing.assert_close(covariance.colours.abs(), COLOURS.flip(0).abs(), rtol=0, atol=0.02)
    torch.testing.assert_close(covariance.variances, VARIANCES.flip(0), rtol=0.06, atol=0)


def test_the_head_is_told_the_energies_of_the_mean_in_units_of_the_data():
    covariance, told = on_gaussian_data(1), []

    def head(features, log_energies, log_snr):
        told.append((log_energies, log_snr))
        return torch.zeros_like(log_energies)

    x_t = images(1, count=3)
    prediction = covariance.denoiser.predict(x_t, 300)
    (_, branch), = prediction.branches  # fmt: skip
    covariance._output(branch, head)
    coefficients = prediction.x0_hat.flatten(1) @ matrix(1).T
    expected = (coefficients.square() / VARIANCES.flatten() + 1e-3).log().reshape(3, 3, 4, 4)
    torch.testing.assert_close(told[0][0], expected)
    log_snr = covariance.denoiser.schedule.log_snr(300).expand(3)
    torch.testing.assert_close(told[0][1].double(), log_snr)
