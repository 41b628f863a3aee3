"""The losses and the variances of learned covariances against their papers' formulas, in float64.

Nothing here calls the package for a formula: betas are accumulated again, and a head is a plain
convolution whose output is set by hand.
"""

import dataclasses
import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser
from plain_heads import Affine, Constant
from torch.distributions import Normal, kl_divergence

import hessdiag
import ocm
from hessdiag.kernels import rademacher
from ocm.covariances import NPR, SN, ImprovedDDPM, OptimalCovarianceMatching
from ocm.covariances.learned.base import loss_weight
from ocm.covariances.names import LEARNED
from ocm.diffusion.noise import noisy

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
COVARIANCE = torch.tensor([[0.2, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.1]]).double()
T = torch.tensor([3, 200, 700, 950])
PRECONDITIONED = ocm.Parameterisation(data_std=0.6)
POSITIVE = ocm.Parameterisation(data_std=0.6, positive=True)


@pytest.fixture
def denoiser():
    return gaussian_denoiser(torch.tensor([0.1, -0.2, 0.0]), COVARIANCE, ocm.linear())


@pytest.fixture
def batch(denoiser):
    """x0, x_t, noise, the network's noise, its mean of x0 and o: float64, (4, 1, 1, 3)."""
    x0 = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(0)).double() / 2
    x_t, noise = noisy(denoiser.schedule, x0, T, seed=5, sample_offset=2)
    alpha_bar = ALPHA_BAR[T - 1].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise)
    epsilon = denoiser.backbone(x_t, T - 1).sample
    mean = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return x0, x_t, noise, epsilon, mean, 0.3 * x_t - 0.2


def scales(units, alpha_bar):
    """beta_bar / alpha_bar, or the posterior variance of N(0, std^2) given x_t."""
    if math.isinf(units.data_std):
        return (1 - alpha_bar) / alpha_bar
    return 1.0 / (1.0 / units.data_std**2 + alpha_bar / (1 - alpha_bar))


def ratios(units, o):
    return torch.log1p(torch.exp(o + math.log(math.e - 1))) if units.positive else 1 + o


def loss_of(covariance, x0):
    return covariance.loss(x0, T, seed=5, sample_offset=2)


@pytest.mark.parametrize("units", [ocm.PAPER, PRECONDITIONED, POSITIVE])
def test_npr(denoiser, batch, units):
    x0, x_t, noise, epsilon, _, o = batch
    alpha_bar = ALPHA_BAR[T - 1].reshape(-1, 1, 1, 1)
    covariance = NPR(denoiser, Affine(), units, network_error=0.0)
    residual = (noise - epsilon).square() * ((1 - alpha_bar) / alpha_bar) / scales(units, alpha_bar)
    expected = (ratios(units, o) - residual).square().mean()
    torch.testing.assert_close(loss_of(covariance, x0), expected, rtol=1e-5, atol=1e-8)
    variance = covariance.at(denoiser.predict(x_t, T)).diagonal()
    expected = scales(units, alpha_bar) * ratios(units, o)
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=0)


def test_sn_in_the_units_of_the_paper(denoiser, batch):
    x0, x_t, noise, epsilon, _, o = batch
    alpha_bar = ALPHA_BAR[T - 1].reshape(-1, 1, 1, 1)
    covariance = SN(denoiser, Affine(), ocm.PAPER)
    expected = (1 + o - noise.square()).square().mean()
    torch.testing.assert_close(loss_of(covariance, x0), expected, rtol=1e-5, atol=0)
    variance = covariance.at(denoiser.predict(x_t, T)).diagonal()
    expected = (1 - alpha_bar) / alpha_bar * (1 + o - epsilon.square())
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=1e-8)


def test_sn_preconditioned_is_a_second_moment_around_a_gaussian_mean(denoiser, batch):
    x0, x_t, _, _, mean, o = batch
    alpha_bar = ALPHA_BAR[T - 1].reshape(-1, 1, 1, 1)
    covariance = SN(denoiser, Affine(), PRECONDITIONED)
    std = PRECONDITIONED.data_std
    guess = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar) * x_t
    unit = scales(PRECONDITIONED, alpha_bar)
    expected = (1 + o - (x0 - guess).square() / unit).square().mean()
    torch.testing.assert_close(loss_of(covariance, x0), expected, rtol=1e-5, atol=0)
    variance = covariance.at(denoiser.predict(x_t, T)).diagonal()
    expected = unit * (1 + o) - (mean - guess).square()
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("units", [ocm.PAPER, PRECONDITIONED, POSITIVE])
@pytest.mark.parametrize("network_error", [0.0, 0.05])
def test_ocm(denoiser, batch, units, network_error):
    """h - v (beta_bar H v) with H = -(alpha_bar C + beta_bar I)^-1, two probes."""
    x0, x_t, _, _, _, o = batch
    covariance = OptimalCovarianceMatching(
        denoiser, Affine(), units, num_probes=2, network_error=network_error
    )
    v = rademacher((2, 4, 3), 5, sample_offset=2).double()
    target, weight = torch.empty(4, 3).double(), torch.empty(4, 1).double()
    for i, t in enumerate(T.tolist()):
        alpha_bar = ALPHA_BAR[t - 1]
        H = -torch.linalg.inv(alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(3).double())
        h = (v[:, i] * (v[:, i] @ ((1 - alpha_bar) * H))).mean(dim=0)
        unit = scales(units, alpha_bar)
        amplification = (1 - alpha_bar) / alpha_bar / unit
        target[i] = amplification * (1 + h)
        weight[i] = 1 / (1 + (network_error * (amplification - 1)) ** 2)
    expected = (weight * (ratios(units, o).reshape(4, 3) - target).square()).mean()
    torch.testing.assert_close(loss_of(covariance, x0), expected, rtol=1e-4, atol=0)
    if units is ocm.PAPER:
        alpha_bar = ALPHA_BAR[T - 1].reshape(-1, 1, 1, 1)
        variance = covariance.at(denoiser.predict(x_t, T)).diagonal()
        torch.testing.assert_close(variance, (1 - alpha_bar) / alpha_bar * (1 + o))


@pytest.mark.parametrize(
    ("design", "num_probes"),
    [(hessdiag.UnitVectors(), 3), (hessdiag.Normal(), 4), (hessdiag.BalancedColoring(3), 6)],
)
def test_ocm_takes_any_design_of_probes(denoiser, batch, design, num_probes):
    """The target is hessdiag.estimate's with the same design, seed and sample numbers."""
    x0, x_t, _, _, _, o = batch
    covariance = OptimalCovarianceMatching(
        denoiser, Affine(), ocm.PAPER, num_probes=num_probes, probes=design
    )
    h = torch.empty_like(x_t)
    for i, t in enumerate(T.tolist()):
        beta_bar = 1 - ALPHA_BAR[t - 1]
        h[i] = hessdiag.estimate(
            lambda x, t=t, b=beta_bar: -b.sqrt() * denoiser.backbone(x, torch.tensor(t - 1)).sample,
            x_t[i : i + 1],
            max_probes=num_probes,
            probes=design,
            seed=5,
            sample_offset=2 + i,
        ).diagonal[0]
    expected = (o - h).square().mean()
    torch.testing.assert_close(loss_of(covariance, x0), expected, rtol=1e-5, atol=0)


def test_ocm_refuses_part_of_a_block(denoiser, batch):
    covariance = OptimalCovarianceMatching(denoiser, Affine(), probes=hessdiag.UnitVectors())
    with pytest.raises(ValueError, match="num_probes must be a multiple of 3, a block of Unit"):
        loss_of(covariance, batch[0])


def test_forward_mode_gives_the_same_targets(unet):
    denoiser = ocm.Denoiser(unet.double(), ocm.linear()).freeze()
    x0 = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    v = rademacher((1, 2, 2, 8, 8), 1).double()
    t = torch.tensor([100, 600])
    losses = {}
    for mode in ("vjp", "jvp"):
        head = ocm.make_head(denoiser).double()
        covariance = OptimalCovarianceMatching(denoiser, head, ocm.PAPER, mode=mode)
        losses[mode] = covariance.loss(x0, t, seed=1, sample_offset=0).item()
    x_t, _ = noisy(denoiser.schedule, x0, t, seed=1, sample_offset=0)
    J = hessdiag.jacobian(lambda x: denoiser.output(x, t), x_t)
    beta_bar = (1 - ALPHA_BAR[t - 1]).reshape(2, 1, 1, 1)
    for mode, matrix in (("vjp", J.mT), ("jvp", J)):
        product = (matrix @ v[0].reshape(2, -1, 1)).reshape(v[0].shape)
        expected = (beta_bar.sqrt() * v[0] * product).square().mean().item()
        assert losses[mode] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("s", "t"), [(1, 2), (39, 40), (200, 700), (500, 1000)])
def test_iddpm_interpolates_the_logarithm_of_the_reverse_variance(denoiser, s, t):
    x_t = torch.randn(5, 1, 1, 3).double()
    covariance = ImprovedDDPM(denoiser, Affine())
    variance = covariance.at(denoiser.predict(x_t, t, s=s)).diagonal()
    fraction = (1 + 0.3 * x_t - 0.2) / 2
    beta = 1 - ALPHA_BAR[t - 1] / ALPHA_BAR[s - 1]
    beta_tilde = (1 - ALPHA_BAR[s - 1]) / (1 - ALPHA_BAR[t - 1]) * beta
    expected = torch.exp(fraction * beta.log() + (1 - fraction) * beta_tilde.log())
    step = ocm.ddpm(denoiser.schedule, s, t)
    found = step.noise_variance + step.mean_from_x0**2 * variance
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if s == t - 1:
        torch.testing.assert_close(covariance.at(denoiser.predict(x_t, t)).diagonal(), variance)


@pytest.mark.parametrize(
    ("units", "head"),
    [
        (ocm.PAPER, Affine()),
        (PRECONDITIONED, Affine()),
        # v = -1/4: less than beta_tilde, of a variance of x0 below zero, has a divergence still.
        (ocm.PAPER, Constant(-1.5)),
    ],
)
def test_iddpm_is_trained_on_the_kl_of_its_steps(denoiser, batch, units, head):
    x0, x_t, _, _, mean, _ = batch
    o, total = head(x_t), 0.0
    for i, t in enumerate(T.tolist()):
        a_s, a_t = ALPHA_BAR[t - 2], ALPHA_BAR[t - 1]
        beta = 1 - a_t / a_s
        beta_tilde = (1 - a_s) / (1 - a_t) * beta
        to_x0 = a_s.sqrt() * beta / (1 - a_t)
        to_x_t = (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)
        if units is ocm.PAPER:
            v = (1 + o[i]) / 2
            variance = torch.exp(v * beta.log() + (1 - v) * beta_tilde.log())
        else:
            variance = beta_tilde + to_x0**2 * scales(units, a_t) * (1 + o[i])
        posterior = Normal(to_x0 * x0[i] + to_x_t * x_t[i], beta_tilde.sqrt())
        model = Normal(to_x0 * mean[i] + to_x_t * x_t[i], variance.sqrt())
        total = total + kl_divergence(posterior, model).mean()
    expected = 1000 * total / len(T)
    found = loss_of(ImprovedDDPM(denoiser, head, units), x0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_ratio_of_one_is_the_start_of_every_parameterisation(denoiser):
    head, x_t = Constant(0.0), torch.randn(2, 1, 1, 3).double()
    for units in (ocm.PAPER, PRECONDITIONED, POSITIVE):
        for method in (NPR, OptimalCovarianceMatching):
            variance = method(denoiser, head, units).at(denoiser.predict(x_t, 300)).diagonal()
            expected = scales(units, ALPHA_BAR[299]).expand_as(x_t)
            torch.testing.assert_close(variance, expected)


def test_an_impossible_unit():
    with pytest.raises(ValueError, match=r"data_std must be positive, got 0\.0"):
        ocm.Parameterisation(data_std=0.0)


def test_iddpm_at_the_lowest_timestep_of_a_batch(denoiser):
    x_t = torch.randn(2, 1, 1, 3).double()
    covariance = ImprovedDDPM(denoiser, Affine())
    both = covariance.at(denoiser.predict(x_t, torch.tensor([1, 40]))).diagonal()
    for i, t in enumerate((1, 40)):
        alone = covariance.at(denoiser.predict(x_t[i : i + 1], t)).diagonal()
        torch.testing.assert_close(both[i : i + 1], alone)
    assert torch.isfinite(both).all()


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("ocm", {"epsilon": 1e-3, "sample": 0.2, "v_prediction": 0.2}),
        ("npr", {"epsilon": 1e-3, "sample": 1.0, "v_prediction": 1.0}),
        ("sn", {"epsilon": 1.0, "sample": 1.0, "v_prediction": 1.0}),
    ],
)
def test_a_target_counts_less_where_it_amplifies_the_networks_error(unet, name, weighted):
    """p + q J enters OCM's target times sigma^2 / alpha, x0_hat NPR's squared, and SN's not at all.

    Of the loss at t = N the most is left that is named here; at t = 10 and in the papers' units,
    for a network that predicts the noise, all of it.
    """
    x0 = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def part(prediction_type, t, units):
        losses = []
        denoiser = ocm.Denoiser(unet, ocm.linear(), prediction_type)
        for error in (0.02, 0.0):
            covariance = LEARNED[name](denoiser, ocm.make_head(denoiser), units)
            if name != "sn":
                covariance = dataclasses.replace(covariance, network_error=error)
            times = torch.full((8,), t)
            losses.append(covariance.loss(x0, times, seed=0, sample_offset=0).item())
        return losses[0] / losses[1]

    for prediction_type, most in weighted.items():
        found = part(prediction_type, 1000, PRECONDITIONED)
        assert found == pytest.approx(1.0, abs=0.02) if most == 1.0 else found <= most
        assert part(prediction_type, 10, PRECONDITIONED) == pytest.approx(1.0, abs=0.02)
    assert part("epsilon", 1000, ocm.PAPER) == pytest.approx(1.0, abs=1e-6)


def test_nothing_counts_less_where_no_error_is_amplified():
    amplification = torch.tensor([0.0, 0.5, 1.0, 3.0, 51.0])
    # 1 / (1 + (error (A - 1))^2) above 1.
    weight = loss_weight(amplification, 0.5)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, 1.0, 0.5, 1 / 626]))
    assert (loss_weight(amplification, 0.0) == 1).all()


@pytest.mark.parametrize("name", ["npr", "ocm"])
def test_each_sample_of_a_batch_has_the_weight_of_its_own_timestep(denoiser, batch, name):
    covariance = LEARNED[name](denoiser, Affine(), PRECONDITIONED)
    assert covariance.network_error > 0
    x0 = batch[0]
    alone = [
        covariance.loss(x0[i : i + 1], T[i : i + 1], seed=5, sample_offset=2 + i)
        for i in range(len(T))
    ]
    torch.testing.assert_close(loss_of(covariance, x0), torch.stack(alone).mean())


def test_a_dense_coloring_gives_the_targets_of_the_plain_one(denoiser, batch):
    """Of as many colors as there are probes both are the same estimate, whatever their weight."""
    losses = [
        loss_of(
            OptimalCovarianceMatching(
                denoiser, Affine(), PRECONDITIONED, 2, hessdiag.Coloring(2, dense=dense)
            ),
            batch[0],
        )
        for dense in (False, True)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", LEARNED)
def test_a_wrapped_head_is_the_one_that_is_called(denoiser, batch, name):
    """In place of the covariance's own, which a wrapper averages gradients for."""
    own = LEARNED[name](denoiser, torch.nn.Identity(), PRECONDITIONED)
    other = LEARNED[name](denoiser, Affine(), PRECONDITIONED)
    found = own.loss(batch[0], T, seed=5, sample_offset=2, head=Affine())
    torch.testing.assert_close(found, loss_of(other, batch[0]))
    assert (found - loss_of(own, batch[0])).abs() > 1e-4


def test_iddpm_counts_the_step_from_one_as_one_from_two(denoiser, batch):
    covariance = ImprovedDDPM(denoiser, Affine())
    losses = [
        covariance.loss(batch[0], torch.full((4,), t), seed=5, sample_offset=2) for t in (1, 2)
    ]
    assert losses[0] == losses[1]
    assert torch.isfinite(losses[0])
