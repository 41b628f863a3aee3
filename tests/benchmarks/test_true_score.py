"""Mixtures with the true score: every training-free covariance against Bayes' rule.

The posterior is written here a second time, in float64 and in the information form, and that once
more by a sum over a grid.
"""

import math

import pytest
import scipy.fft
import torch
from gaussian_denoiser import posterior_covariance
from mixtures.mixture import Mixture, correlated_mixture, nine_gaussians
from mixtures.networks import point_denoiser, point_head
from mixtures.true_score import POINTS, mixture_denoiser
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import hessdiag
import ocm
from ocm.covariances.operators import (
    SpectralCovariance,
    channel_blocks,
    cosine_diagonal,
    diagonal,
    full,
)

SCHEDULES = {"linear": ocm.linear(), "cosine": ocm.cosine()}
TYPES = ("epsilon", "sample", "v_prediction")
MIXTURES = {"nine": nine_gaussians(), "correlated": correlated_mixture()}
TIMESTEPS = (1, 30, 200, 500, 800, 1000)


def six_dimensional():
    """Two correlated Gaussians of 6 features, which stand for images (2, 3) or (1, 2, 3)."""
    factor = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(3)).double() / 3
    means = torch.linspace(-0.5, 0.5, 12).double().reshape(2, 6)
    covariances = factor @ factor.mT + 0.05 * torch.eye(6).double()
    return Mixture(means, covariances, torch.tensor([0.3, 0.7]))


def bayes(mixture, schedule, x_t, t):
    """Mean and covariance of x0 given x_t: precisions add, and components weigh by their density.

    Cov_i = (Sigma_i^-1 + SNR I)^-1, mean_i = Cov_i (Sigma_i^-1 mu_i + sqrt(alpha_bar)/beta_bar x_t)
    """
    x = x_t.double().flatten(1)
    alpha_bar, beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
    identity = torch.eye(x.shape[1]).double()
    moments = []
    for mu, Sigma, weight in zip(mixture.means, mixture.covariances, mixture.weights, strict=True):
        precision = torch.linalg.inv(Sigma)
        covariance = torch.linalg.inv(precision + alpha_bar / beta_bar * identity)
        mean = (precision @ mu + alpha_bar.sqrt() / beta_bar * x) @ covariance
        marginal = MultivariateNormal(
            alpha_bar.sqrt() * mu, alpha_bar * Sigma + beta_bar * identity
        )
        moments.append((weight.log() + marginal.log_prob(x), mean, covariance))
    r = torch.stack([log_r for log_r, _, _ in moments]).softmax(dim=0)
    mean = sum(r_i[:, None] * mean_i for r_i, (_, mean_i, _) in zip(r, moments, strict=True))
    second = sum(
        r_i[:, None, None] * (covariance + (m - mean)[:, :, None] * (m - mean)[:, None])
        for r_i, (_, m, covariance) in zip(r, moments, strict=True)
    )
    return mean, second


def noisy_points(mixture, schedule, t, count=64, shape=None):
    """Draws of q(x_t), float64."""
    x0 = mixture.sample(count, seed=t).double()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t)).double()
    x_t = schedule.diffuse(x0, t, noise)
    return x_t if shape is None else x_t.reshape(count, *shape)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# The mixture itself


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("t", [200, 400, 700])
def test_the_posterior_is_that_of_a_sum_over_a_grid(mixture, t):
    """Trapezoids on a smooth density that vanishes at the border are exact to rounding."""
    schedule = ocm.linear()
    x_t = noisy_points(mixture, schedule, t, count=4)
    places = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(places, places)
    log_prior = MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covariances)
    ).log_prob(grid)
    for i, x in enumerate(x_t):
        squares = (x - schedule.alpha_bar[t].sqrt() * grid).square().sum(dim=1)
        weight = (log_prior - squares / (2 * schedule.beta_bar[t])).softmax(dim=0)
        mean = weight @ grid
        covariance = (weight[:, None] * (grid - mean)).T @ (grid - mean)
        expected_mean, expected = bayes(mixture, schedule, x_t[i : i + 1], t)
        torch.testing.assert_close(expected_mean[0], mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(expected[0], covariance, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mixture", [*MIXTURES.values(), six_dimensional()])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("t", TIMESTEPS)
def test_the_closed_form_is_bayes_rule(mixture, schedule, t):
    x_t = noisy_points(mixture, schedule, t)
    mean, covariance = bayes(mixture, schedule, x_t, t)
    tight = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(mixture.posterior_mean(x_t, t, schedule), mean, **tight)
    torch.testing.assert_close(mixture.posterior_covariance(x_t, t, schedule), covariance, **tight)
    # One timestep for each sample says the same.
    several = torch.full((len(x_t),), t)
    torch.testing.assert_close(mixture.posterior_mean(x_t, several, schedule), mean, **tight)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_the_score_is_the_gradient_of_the_density(mixture, t):
    schedule = ocm.linear()
    x_t = noisy_points(mixture, schedule, t).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, t, schedule).sum(), x_t)
    torch.testing.assert_close(mixture.score(x_t, t, schedule), gradient, rtol=1e-9, atol=1e-9)


def test_the_density_of_the_data_is_that_of_torch():
    mixture = correlated_mixture()
    x0 = mixture.sample(100).double()
    expected = MixtureSameFamily(
        Categorical(mixture.weights), MultivariateNormal(mixture.means, mixture.covariances)
    ).log_prob(x0)
    torch.testing.assert_close(mixture.log_density(x0, 0, ocm.linear()), expected)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_samples_have_the_moments_of_the_mixture(mixture):
    count = 40_000
    x0 = mixture.sample(count, seed=5).double()
    C = mixture.covariance
    assert ((x0.mean(dim=0) - mixture.mean).abs() < 5 * (C.diagonal() / count).sqrt()).all()
    # Not Gaussian: the standard error of a second moment by its own draws.
    products = (x0 - mixture.mean)[:, :, None] * (x0 - mixture.mean)[:, None]
    error = products.mean(dim=0) - C
    assert (error.abs() < 5 * products.std(dim=0) / count**0.5).all()
    assert math.isclose(mixture.std, C.diagonal().mean().sqrt().item())
    nearest = torch.cdist(x0, mixture.means).argmin(dim=1).bincount() / count
    if len(mixture.means) == 9:
        assert (nearest - 1 / 9).abs().max() < 5 * (1 / 9 / count) ** 0.5


def test_samples_do_not_depend_on_the_batch():
    mixture = correlated_mixture()
    whole = mixture.sample(10, seed=4)
    assert torch.equal(mixture.sample(3, seed=4, sample_offset=5), whole[5:8])
    assert not torch.equal(mixture.sample(10, seed=3), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.6])}, "weights must be positive with sum 1"),
        ({"weights": torch.ones(3) / 3}, "must have shapes"),
        ({"covariances": torch.zeros(2, 2, 2)}, "symmetric and positive definite"),
        ({"covariances": torch.tensor([[[1.0, 0.5], [0.0, 1.0]]] * 2)}, "symmetric"),
    ],
)
def test_what_is_no_mixture(change, message):
    fields = {
        "means": torch.zeros(2, 2),
        "covariances": torch.eye(2).expand(2, 2, 2),
        "weights": torch.tensor([0.5, 0.5]),
    }
    with pytest.raises(ValueError, match=message):
        Mixture(**(fields | change))


def test_points_of_another_dimension():
    denoiser = mixture_denoiser(nine_gaussians(), ocm.linear())
    with pytest.raises(ValueError, match="x_t must have 2 features a sample"):
        denoiser.output(torch.zeros(4, 3), 10)


# Covariances that need no training


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_exact_full_and_lanczos_are_the_posterior_covariance(mixture, schedule, prediction_type):
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    for t in TIMESTEPS:
        x_t = noisy_points(mixture, schedule, t)
        prediction = denoiser.predict(x_t, t)
        mean, C = bayes(mixture, schedule, x_t, t)
        assert relative(prediction.x0_hat, mean) < 1e-6
        variance = C.diagonal(dim1=1, dim2=2)
        assert relative(ocm.Exact(denoiser).at(prediction).diagonal(), variance) < 1e-6
        v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)).double()
        root = torch.linalg.cholesky(C)
        for covariance, accuracy in ((ocm.Full(denoiser), 1e-6), (ocm.Lanczos(denoiser, 2), 1e-6)):
            stated = covariance.at(prediction)
            assert relative(stated.diagonal(), variance) < accuracy
            assert relative(stated.multiply(v), (C @ v[..., None])[..., 0]) < accuracy
            solved = torch.cholesky_solve(v[..., None], root)[..., 0]
            assert relative(stated.solve(v), solved) < 10 * accuracy
            torch.testing.assert_close(
                stated.log_determinant(), C.logdet(), rtol=1e-5, atol=10 * accuracy
            )
            # C^(1/2) C^(1/2) v = C v
            twice = stated.noise(stated.noise(v))
            assert relative(twice, (C @ v[..., None])[..., 0]) < 10 * accuracy


def test_the_draws_of_lanczos_have_the_posterior_covariance():
    mixture, schedule, t = correlated_mixture(), ocm.linear(), 300
    count = 20_000
    x_t = noisy_points(mixture, schedule, t, count=1).expand(count, -1)
    denoiser = mixture_denoiser(mixture, schedule)
    (C,) = bayes(mixture, schedule, x_t[:1], t)[1]
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(1)).double()
    draws = ocm.Lanczos(denoiser, 2).at(denoiser.predict(x_t, t)).noise(z)
    tolerance = 5 * ((C.diagonal()[:, None] * C.diagonal() + C.square()) / count).sqrt()
    assert ((draws.T.cov() - C).abs() < tolerance).all()
    assert C[0, 1].abs() > 5 * tolerance[0, 1]


@pytest.mark.parametrize(
    ("num_probes", "probes"),
    [(1, hessdiag.Rademacher()), (10, hessdiag.Rademacher()), (3, hessdiag.Normal())],
)
@pytest.mark.parametrize("t", [30, 200, 500, 900])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_hutchinson_is_unbiased(num_probes, probes, t, prediction_type):
    """At one point, with the standard error of its own draws and the known variance of the design.

    With Rademacher probes Var = (1/M) sum over j != i of C_ij^2.
    """
    mixture, schedule, count = correlated_mixture(), ocm.linear(), 4000
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    x_t = noisy_points(mixture, schedule, t, count=1).expand(count, -1)
    covariance = ocm.Hutchinson(denoiser, num_probes, probes=probes, floor=None)
    estimates = covariance.at(denoiser.predict(x_t, t)).diagonal()
    (C,) = bayes(mixture, schedule, x_t[:1], t)[1]
    standard_error = estimates.std(dim=0) / count**0.5
    assert ((estimates.mean(dim=0) - C.diagonal()).abs() < 5 * standard_error).all()
    if isinstance(probes, hessdiag.Rademacher):
        expected = C[0, 1].square() / num_probes
        assert ((estimates.var(dim=0) / expected - 1).abs() < 0.15).all()


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t", TIMESTEPS)
def test_hutchinson_is_exact_with_one_probe_on_a_product_density(t, prediction_type):
    mixture, schedule = nine_gaussians(), ocm.linear()
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    x_t = noisy_points(mixture, schedule, t)
    stated = ocm.Hutchinson(denoiser, 1).at(denoiser.predict(x_t, t)).diagonal()
    expected = bayes(mixture, schedule, x_t, t)[1].diagonal(dim1=1, dim2=2)
    assert relative(stated, expected) < 1e-6


def test_hutchinson_with_all_unit_vectors_is_exact():
    mixture, schedule, t = correlated_mixture(), ocm.linear(), 300
    denoiser = mixture_denoiser(mixture, schedule)
    x_t = noisy_points(mixture, schedule, t)
    covariance = ocm.Hutchinson(denoiser, 2, probes=hessdiag.BalancedColoring(2))
    stated = covariance.at(denoiser.predict(x_t, t)).diagonal()
    expected = bayes(mixture, schedule, x_t, t)[1].diagonal(dim1=1, dim2=2)
    assert relative(stated, expected) < 1e-6


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t", [1, 200, 900])
def test_channel_blocks_are_those_of_the_posterior_covariance(t, prediction_type):
    mixture, schedule, shape = six_dimensional(), ocm.linear(), (2, 3)
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    x_t = noisy_points(mixture, schedule, t, count=5, shape=shape)
    C = bayes(mixture, schedule, x_t, t)[1].reshape(5, *shape, *shape)
    v = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.einsum("bcldl,bdl->bcl", C, v)
    stated = ocm.ChannelBlocks(denoiser).at(denoiser.predict(x_t, t))
    assert relative(stated.multiply(v), expected) < 1e-5
    variance = torch.einsum("bclcl->bcl", C)
    assert relative(stated.diagonal(), variance) < 1e-5


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t", [1, 200, 900])
def test_the_cosine_diagonal_is_that_of_the_posterior_covariance(t, prediction_type):
    """diag(F C F^T) with SciPy's transform."""
    mixture, schedule, shape = six_dimensional(), ocm.linear(), (1, 2, 3)
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    x_t = noisy_points(mixture, schedule, t, count=5, shape=shape)
    C = bayes(mixture, schedule, x_t, t)[1]
    units = torch.eye(6).reshape(6, 2, 3).double().numpy()
    F = torch.from_numpy(scipy.fft.dctn(units, axes=(1, 2), norm="ortho")).reshape(6, 6).T
    spectrum = (F @ C @ F.T).diagonal(dim1=1, dim2=2)
    stated = ocm.CosineDiagonal(denoiser, probes=hessdiag.UnitVectors()).at(
        denoiser.predict(x_t, t)
    )
    assert relative(stated.eigenvalues.flatten(1), spectrum) < 1e-5
    variance = (F.T.square() @ spectrum[..., None])[..., 0]
    assert relative(stated.diagonal().flatten(1), variance) < 1e-5


def test_the_cosine_diagonal_from_probes_is_unbiased():
    mixture, schedule, t, count = six_dimensional(), ocm.linear(), 300, 3000
    denoiser = mixture_denoiser(mixture, schedule)
    x_t = noisy_points(mixture, schedule, t, 1, (1, 2, 3)).expand(count, -1, -1, -1)
    prediction = denoiser.predict(x_t, t)
    estimates = ocm.CosineDiagonal(denoiser, 1).at(prediction).eigenvalues.flatten(1)
    exact = (
        ocm.CosineDiagonal(denoiser, probes=hessdiag.UnitVectors())
        .at(denoiser.predict(x_t[:1], t))
        .eigenvalues.flatten()
    )
    standard_error = estimates.std(dim=0) / count**0.5
    assert ((estimates.mean(dim=0) - exact).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_analytic_is_the_mean_of_the_posterior_variance(mixture, prediction_type):
    """Both estimates, over the same points as the mean; they differ from it by chance alone.

    From the score a point's estimate is (z^2 - epsilon^2) / SNR, with z the noise that was drawn.
    """
    schedule, count, timesteps = ocm.linear(), 6000, [30, 200, 500, 1000]
    denoiser = mixture_denoiser(mixture, schedule, prediction_type)
    x0 = mixture.sample(count, seed=2).double()
    from_score = ocm.fit_analytic(denoiser, x0, timesteps, seed=9)
    from_data = ocm.fit_analytic_from_data(denoiser, x0, timesteps, x0_range=None, seed=9)
    for t in timesteps:
        z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t)).double()
        x_t = schedule.diffuse(x0, t, z)
        mean, C = bayes(mixture, schedule, x_t, t)
        expected = C.diagonal(dim1=1, dim2=2).mean(dim=1)
        prediction = denoiser.predict(x_t[:1], t)
        residual = (
            z.square()
            - (x_t - schedule.alpha_bar[t].sqrt() * mean).square() / (schedule.beta_bar[t])
        )
        single = residual.mean(dim=1) / schedule.snr[t]
        check_mean(from_score.at(prediction).diagonal().item(), expected, [single])
        apart = (x0 - mixture.mean).square().mean(dim=1)
        explained = (mean - mixture.mean).square().mean(dim=1)
        check_mean(from_data.at(prediction).diagonal().item(), expected, [apart, explained])


def check_mean(stated, expected, terms):
    """Check an estimate against the mean of ``expected``, to 5 standard errors of what it sums."""
    variance = sum(term.var() for term in [expected, *terms])
    assert abs(stated - expected.mean()) < 5 * (variance / len(expected)).sqrt()


# Guidance


class GuidedGaussians(nn.Module):
    """The noise of N(mean_y, C_y) for labels y, through the interface of points."""

    def __init__(self, mixtures, schedule):
        super().__init__()
        self.backbones = nn.ModuleList(
            mixture_denoiser(mixture, schedule).backbone for mixture in mixtures
        )
        self.features = nn.Identity()

    def forward(self, x, level, labels):
        outputs = torch.stack([backbone(x, level) for backbone in self.backbones])
        self.features(x)
        return outputs[labels, torch.arange(len(x))]


@pytest.mark.parametrize("w", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("t", [100, 600])
def test_guidance_has_the_covariance_of_the_guided_density(t, w):
    """q_u^(1-w) q_c^w is a Gaussian of precision P = (1-w) M_u^-1 + w M_c^-1; by Tweedie's formula

    Cov = (beta_bar / alpha_bar)(I - beta_bar P), which is (1-w) Cov_u + w Cov_c.
    """
    schedule = ocm.linear()
    covariances = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.3, -0.1], [-0.1, 0.2]]]).double()
    mixtures = [Mixture(torch.full((1, 2), i), C[None], [1.0]) for i, C in enumerate(covariances)]
    backbone = GuidedGaussians(mixtures, schedule)
    architecture = ocm.Architecture("GuidedGaussians", "features", backbone_call)
    denoiser = ocm.Denoiser(backbone, schedule, architecture=architecture).freeze()
    x_t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.ones(6, dtype=torch.int64)
    condition = denoiser.condition(labels, guidance_scale=w, null_label=0)
    alpha_bar, beta_bar = schedule.alpha_bar[t], schedule.beta_bar[t]
    identity = torch.eye(2).double()
    P_u, P_c = (torch.linalg.inv(alpha_bar * C + beta_bar * identity) for C in covariances)
    expected = beta_bar / alpha_bar * (identity - beta_bar * ((1 - w) * P_u + w * P_c))
    Cov_u, Cov_c = (posterior_covariance(C, schedule, t) for C in covariances)
    torch.testing.assert_close(expected, (1 - w) * Cov_u + w * Cov_c)

    prediction = denoiser.predict(x_t, t, condition=condition)
    variance = expected.diagonal().expand(6, 2)
    torch.testing.assert_close(ocm.Exact(denoiser).at(prediction).diagonal(), variance)
    stated = ocm.Full(denoiser).at(prediction)
    v = x_t.flip(0)
    torch.testing.assert_close(stated.multiply(v), v @ expected)
    # The mean is that of the guided score too.
    score = -(1 - w) * x_t @ P_u - w * (x_t - alpha_bar.sqrt()) @ P_c
    torch.testing.assert_close(prediction.x0_hat, (x_t + beta_bar * score) / alpha_bar.sqrt())


def backbone_call(backbone, x_t, level, labels):
    return backbone(x_t, level, labels)


# Operators


def operators():
    """Five families of B = 3 covariances (2, 2, 2), and the dense matrices that they stand for."""
    generator = torch.Generator().manual_seed(7)
    shape, D = torch.Size([3, 2, 2, 2]), 8

    def positive(*sizes):
        factor = torch.randn(*sizes, sizes[-1], generator=generator, dtype=torch.float64)
        return factor @ factor.mT + 0.1 * torch.eye(sizes[-1]).double()

    variances = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 + 0.1
    yield "diagonal", diagonal(variances, shape), torch.diag_embed(variances.flatten(1))
    whole = positive(3, D)
    yield "full", full(whole, shape), whole
    blocks = positive(3, 4, 2)  # (B, positions, C, C)
    dense = torch.zeros(3, 2, 4, 2, 4).double()
    for position in range(4):
        dense[:, :, position, :, position] = blocks[:, position]
    yield "channel_blocks", channel_blocks(blocks, shape), dense.reshape(3, D, D)
    units = torch.eye(D).double().reshape(D, 2, 2, 2).numpy()
    F = torch.from_numpy(scipy.fft.dctn(units, axes=(2, 3), norm="ortho")).reshape(D, D).T
    yield (
        "cosine_diagonal",
        cosine_diagonal(variances, shape),
        F.T @ torch.diag_embed(variances.flatten(1)) @ F,
    )
    other = positive(3, D)
    yield (
        "lanczos",
        ocm.covariances.LanczosCovariance(
            lambda v: (other @ v.flatten(2)[..., None]).reshape(v.shape),
            torch.zeros(shape).double(),
            D,
        ),
        other,
    )


OPERATORS = {name: (operator, dense) for name, operator, dense in operators()}


def as_matrices(function):
    """The matrices of a linear map on (3, 2, 2, 2), shape (3, 8, 8)."""
    columns = [function(unit.reshape(1, 2, 2, 2).expand(3, -1, -1, -1)) for unit in torch.eye(8)]
    return torch.stack([column.reshape(3, 8) for column in columns], dim=2)


@pytest.fixture(params=OPERATORS)
def operator_and_matrix(request):
    return OPERATORS[request.param]


def check_operator(operator, C):
    """Compare everything an operator does with dense linear algebra."""
    close = {"rtol": 1e-7, "atol": 1e-9}

    def double(function):
        return as_matrices(lambda v: function(v.double()))

    torch.testing.assert_close(double(operator.multiply), C, **close)
    torch.testing.assert_close(double(operator.solve), torch.linalg.inv(C), **close)
    root = double(operator.noise)
    torch.testing.assert_close(root @ root.mT, C, **close)
    variance = operator.diagonal().expand(3, 2, 2, 2).reshape(3, 8)
    torch.testing.assert_close(variance, C.diagonal(dim1=1, dim2=2), **close)
    torch.testing.assert_close(operator.log_determinant(), C.logdet(), **close)


def test_an_operator_is_its_matrix(operator_and_matrix):
    check_operator(*operator_and_matrix)


def test_an_affine_operator_is_that_of_its_matrix(operator_and_matrix):
    operator, C = operator_and_matrix
    identity = torch.eye(8).double()
    check_operator(operator.affine(0.7, 0.2), 0.7 * C + 0.2 * identity)
    twice = operator.affine(2.0, 0.3).affine(0.5, 0.1)
    check_operator(twice, C + (0.5 * 0.3 + 0.1) * identity)


def test_a_clamped_operator_has_clamped_eigenvalues(operator_and_matrix):
    operator, C = operator_and_matrix
    values, vectors = torch.linalg.eigh(C)
    high = values.median().item()
    clamped = vectors @ torch.diag_embed(values.clamp(max=high)) @ vectors.mT
    check_operator(operator.clamped(0.0, high), clamped)


def test_a_bounded_operator_keeps_what_the_data_allow(operator_and_matrix):
    """Data in [-1, 1] have variances of at most 1; negative eigenvalues become 0."""
    operator, C = operator_and_matrix
    shift = -2.0 * torch.linalg.eigvalsh(C).median().item()  # makes half of them negative
    indefinite = operator.affine(2.0, shift)
    bounded = indefinite.bounded((-1.0, 1.0))
    variance = bounded.diagonal()
    assert variance.max() <= 1.0 + 1e-9
    assert variance.min() >= -1e-12
    if isinstance(bounded, SpectralCovariance):
        matrix = as_matrices(lambda v: bounded.multiply(v.double()))
        torch.testing.assert_close(matrix, matrix.mT)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-9
    # Without bounds only the negative eigenvalues go.
    values, vectors = torch.linalg.eigh(2.0 * C + shift * torch.eye(8).double())
    positive = vectors @ torch.diag_embed(values.clamp(min=0.0)) @ vectors.mT
    free = as_matrices(lambda v: indefinite.bounded(None).multiply(v.double()))
    torch.testing.assert_close(free, positive, rtol=1e-7, atol=1e-8)
    # What is within the bounds stays as it is.
    small = operator.affine(0.01, 0.0)
    kept = as_matrices(lambda v: small.bounded((-1.0, 1.0)).multiply(v.double()))
    torch.testing.assert_close(kept, 0.01 * C, rtol=1e-7, atol=1e-9)


def test_bounding_keeps_correlations():
    """S C S with diagonal S: a full covariance loses variance and no correlation."""
    operator, C = OPERATORS["full"]
    bounded = as_matrices(lambda v: operator.bounded((-1.0, 1.0)).multiply(v.double()))

    def correlations(matrix):
        std = matrix.diagonal(dim1=1, dim2=2).sqrt()
        return matrix / (std[:, :, None] * std[:, None])

    torch.testing.assert_close(correlations(bounded), correlations(C), rtol=1e-6, atol=1e-8)
    within = C.diagonal(dim1=1, dim2=2).clamp(max=1.0)
    torch.testing.assert_close(bounded.diagonal(dim1=1, dim2=2), within)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("s", "t"), [(1, 2), (5, 40), (100, 600), (400, 1000)])
def test_the_reverse_variance_is_that_of_conditioning(schedule, s, t):
    """For x0 ~ N(0, v), Var[x_s | x_t] by conditioning the joint Gaussian of x_s and x_t."""
    v = torch.tensor([0.01, 0.5, 3.0]).double()
    V_s, V_t = (schedule.alpha_bar[i] * v + schedule.beta_bar[i] for i in (s, t))
    conditional = V_s - schedule.alpha_bar[t] / schedule.alpha_bar[s] * V_s**2 / V_t
    variance = 1.0 / (1.0 / v + schedule.alpha_bar[t] / schedule.beta_bar[t])
    step = ocm.ddpm(schedule, s, t)
    reverse = step.noise_variance + step.mean_from_x0**2 * variance
    torch.testing.assert_close(reverse, conditional, rtol=1e-8, atol=0.0)


# Networks of the same interface


def test_a_head_on_the_true_score_trains():
    mixture, schedule = correlated_mixture(), ocm.linear()
    denoiser = mixture_denoiser(mixture, schedule)
    head = point_head(denoiser)
    covariance = ocm.OptimalCovarianceMatching(
        denoiser, head, ocm.Parameterisation(mixture.std), network_error=0.0
    )
    x_t = noisy_points(mixture, schedule, 400, count=500).float()
    expected = bayes(mixture, schedule, x_t, 400)[1].diagonal(dim1=1, dim2=2)
    before = relative(covariance.at(denoiser.predict(x_t, 400)).diagonal(), expected)
    settings = ocm.TrainingSettings(100, 256, 5e-3, ema_decay=0.9)
    ocm.train_head(covariance, mixture.sample(5000), settings, progress=False)
    after = relative(covariance.at(denoiser.predict(x_t, 400)).diagonal(), expected)
    assert after < 0.25 < 0.4 < before


def test_a_network_of_points_trains():
    mixture, schedule = nine_gaussians(), ocm.linear()
    denoiser = point_denoiser(2, schedule, mixture.std)
    x0 = mixture.sample(5000)
    settings = ocm.TrainingSettings(150, 256, 5e-3, ema_decay=0.9)
    losses = ocm.train_denoiser(denoiser, x0, settings, progress=False)
    x_t = noisy_points(mixture, schedule, 500, count=500).float()
    true = mixture_denoiser(mixture, schedule).predict(x_t, 500)
    learned = denoiser.predict(x_t, 500)
    assert losses[-1] < 0.6 * losses[0]
    assert relative(learned.output, true.output) < 0.2
    assert point_head(denoiser)(learned.features).shape == (500, 2)


def test_the_features_determine_the_prediction():
    mixture, schedule = nine_gaussians(), ocm.linear()
    for prediction_type in TYPES:
        denoiser = mixture_denoiser(mixture, schedule, prediction_type)
        prediction = denoiser.predict(noisy_points(mixture, schedule, 300), 300)
        mean = prediction.features[:, 2:4] * mixture.std
        torch.testing.assert_close(mean, prediction.x0_hat, rtol=1e-9, atol=1e-9)
        assert denoiser.architecture is POINTS


def test_points_take_no_labels():
    denoiser = mixture_denoiser(nine_gaussians(), ocm.linear())
    condition = denoiser.condition(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must be None"):
        denoiser.output(torch.zeros(2, 2), 5, condition=condition)
