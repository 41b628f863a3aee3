"""The suite `flow`: exact moments against closed forms, its samplers against ocm and diffusers."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from fashion import evaluation, methods, report
from fashion.sizes import QUICK
from fashion.training import Splits, folded, unfolded
from harness import budget, gaussian_flow
from suites import flow

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import trailing_timesteps
from ocm.sampling.samplers import renoised
from ocm.training.small_unet import small_unet

DATA = gaussian_flow.correlated_gaussian(4)
PEERS = {peer.name: peer for peer in gaussian_flow.PEERS}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("path", gaussian_flow.PATHS)
@pytest.mark.parametrize("t", [20, 500, 980])
def test_the_exact_networks_state_the_posterior_of_bayes_rule(path, t):
    denoiser = gaussian_flow.exact_denoiser(path, DATA)
    alpha, sigma = (f(t).item() for f in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = denoiser.predict(x, t)
    precision = torch.linalg.inv(DATA.covariance) + (alpha / sigma) ** 2 * torch.eye(4)
    posterior = torch.linalg.inv(precision)
    information = torch.linalg.solve(DATA.covariance, DATA.mean) + alpha / sigma**2 * x
    assert relative(prediction.x0_hat, information @ posterior) < 1e-7
    stated = ocm.Full(denoiser).at(denoiser.predict(x, t)).multiply(torch.ones_like(x))
    assert relative(stated, posterior.sum(1).expand(3, 4)) < 1e-6
    assert relative(DATA.posterior_covariance(alpha, sigma), posterior) < 1e-7


@pytest.mark.parametrize("path", gaussian_flow.PATHS)
@pytest.mark.parametrize("sampler", flow.SAMPLERS.values(), ids=flow.SAMPLERS)
def test_the_full_covariance_has_the_moments_of_the_data_in_two_steps(path, sampler):
    denoiser = gaussian_flow.exact_denoiser(path, DATA)
    timesteps = trailing_timesteps(denoiser.schedule, 2)
    steps = gaussian_flow.steps_of_sampler(denoiser, ocm.Full(denoiser), sampler, timesteps)
    mean, covariance = gaussian_flow.moments(denoiser.schedule.prior_std, steps)
    # Sampling starts without the signal that x_N still holds.
    lost = denoiser.schedule.alpha(1000).item() / denoiser.schedule.sigma(1000).item()
    assert relative(covariance, DATA.covariance) < 1e-9 + 10 * lost**2
    assert relative(mean, DATA.mean) < 1e-9 + 10 * lost


def test_without_a_covariance_one_step_returns_the_mean():
    denoiser = gaussian_flow.exact_denoiser("flow", DATA)
    steps = gaussian_flow.steps_of_sampler(denoiser, ocm.BetaTilde(denoiser), ocm.ddim, [1000])
    mean, covariance = gaussian_flow.moments(1.0, steps)
    assert relative(mean, DATA.mean) < 1e-9
    assert covariance.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("Euler", ocm.ddim),
        ("stochastic_sampling", renoised),
        ("CPS, 0.8", partial(renoised, noise=0.9510565162951535)),  # sin(0.4 pi)
    ],
)
def test_peers_are_steps_of_ours_without_a_covariance(name, sampler):
    denoiser = gaussian_flow.exact_denoiser("flow", DATA)
    steps = PEERS[name].steps(gaussian_flow.velocity(denoiser), [1.0, 0.7, 0.2, 0.0], 4)
    ours = gaussian_flow.steps_of_sampler(
        denoiser, ocm.BetaTilde(denoiser), sampler, [200, 700, 1000]
    )
    for theirs, own in zip(steps, ours, strict=True):
        for a, b in zip(theirs, own, strict=True):
            assert (a - b).abs().max() < 1e-9


def test_flow_sde_is_euler_maruyama_of_its_sde():
    """dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dsigma + s dw, s^2 = 0.49 sigma/(1 - sigma).

    With the exact score -n_hat / sigma, n_hat = x + (1 - sigma) v, its drift is that of the
    reverse SDE of noise scale s: the marginals are kept as the steps get many.
    """
    denoiser = gaussian_flow.exact_denoiser("flow", DATA)
    errors = []
    for K in (10, 100):
        sigmas = torch.linspace(1, 0, K + 1).double().tolist()
        steps = PEERS["Flow-SDE, a = 0.7"].steps(gaussian_flow.velocity(denoiser), sigmas, 4)
        mean, covariance = gaussian_flow.moments(1.0, steps)
        errors.append(relative(covariance, DATA.covariance))
        assert relative(mean, DATA.mean) < 0.3
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3


def test_heun_is_that_of_diffusers():
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    denoiser = gaussian_flow.exact_denoiser("flow", DATA)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    start = x.double()
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.predict(x.double(), t.item()).output, t, x).prev_sample
    sigmas = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    steps = PEERS["Heun"].steps(gaussian_flow.velocity(denoiser), sigmas, 4)
    for matrix, shift, _ in steps:
        start = start @ matrix.T + shift
    assert relative(x.double(), start) < 1e-5


def test_the_moments_agree_with_samples_drawn():
    found = flow.exact_moments(replace(flow.QUICK, step_counts=(2,), checked=2, num_samples=300))
    checked = [row for row in found["rows"] if "sampled_mean_in_standard_errors" in row]
    assert {row["path"] for row in checked} == set(gaussian_flow.PATHS)
    for row in checked:
        # Root mean squares of about 1; beyond 4 in none of a million.
        assert row["sampled_covariance_in_standard_errors"] < 4, row
        assert row["sampled_mean_in_standard_errors"] < 4, row
    full = [row for row in found["rows"] if row["covariance"] == "full"]
    assert max(row["covariance_error"] for row in full) < 1e-3
    zero = [row for row in found["rows"] if row["covariance"] == "zero"]
    assert min(row["covariance_error"] for row in zero) > 0.3


@pytest.fixture(params=["flow", "cosine"])
def checkpoint(request):
    """An untrained model of two channels of 4x4 pixels whose last layer is not zero."""
    unet = small_unet((4, 4, 4), width=8)
    make, kind = (
        (ocm.flow, "flow_prediction") if request.param == "flow" else (ocm.cosine, "v_prediction")
    )
    denoiser = ocm.Denoiser(unet, make(), kind, data_covariance=0.25).freeze()
    head = ocm.make_head(denoiser)
    learned = ocm.OptimalCovarianceMatching(denoiser, head, ocm.Parameterisation(0.5, True))
    analytic = ocm.Analytic(denoiser, Table({1: [0.3], 1000: [0.1]}))
    return Checkpoint(denoiser, (4, 4, 4), 256, "none", {"ocm": learned}, {"analytic": analytic})


@pytest.mark.parametrize("covariance", methods.COVARIANCES)
def test_both_ends_are_those_of_sample(checkpoint, covariance):
    method = methods.Method("λ = 0.5 σ", covariance, "trailing", noise_at_end=True)
    ends = methods.draw(checkpoint, method, 3, 2, seed=5, first=7)
    stated = methods.covariance_of(checkpoint, covariance, 5)
    for noisy in (False, True):
        wanted = ocm.sample(
            checkpoint.denoiser,
            stated,
            (2, 4, 4, 4),
            trailing_timesteps(checkpoint.denoiser.schedule, 3),
            sampler=partial(renoised, noise=0.5),
            seed=5,
            sample_offset=7,
            noise_at_end=noisy,
        )
        assert (ends[noisy] - wanted).abs().max() < 1e-4


def test_evaluations_are_as_many_as_are_counted(checkpoint):
    path = checkpoint.denoiser.schedule.name
    tried = [methods.Method(name) for name in methods.others(path)]
    tried += [methods.Method(name, "ocm", "trailing", True) for name in methods.PROCESSES]
    for method in tried:
        K = method.steps_within(5)
        with budget.forward_passes(checkpoint.denoiser.backbone) as counted:
            ends = methods.draw(checkpoint, method, K, 2, seed=0, first=0)
        assert counted[0] == method.evaluations_of(K) <= 5, method
        for images in ends.values():
            assert images.shape == (2, 4, 4, 4)


def test_products_of_the_coloring_are_counted():
    without = methods.Method("DDPM", "coloring", noise_at_end=False)
    assert (without.products_of(10), without.evaluations_of(10)) == (9 * 12, 10)
    assert replace(without, noise_at_end=True).products_of(10) == 10 * 12
    assert replace(without, covariance="ocm").products_of(10) == 0
    # 2 + 12 and 3 + 24 evaluations.
    assert [without.steps_with_products_within(E) for E in (10, 14, 26, 27)] == [1, 2, 2, 3]


def test_folding_is_undone_and_keeps_every_pixel():
    images = torch.randn(2, 1, 4, 4)
    assert torch.equal(unfolded(folded(images)), images)
    assert folded(images).shape == (2, 4, 2, 2)


def test_the_terms_of_the_bound_add_up_to_it(checkpoint):
    from cifar10.training import ByteImages

    pixels = torch.randint(256, (4, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    images = ByteImages(pixels.to(torch.uint8))
    splits = Splits(images, torch.zeros(4), images, images, torch.zeros(4))
    timesteps = [1, 500, 1000]
    total = torch.zeros(4, dtype=torch.float64)
    for s, t in [(500, 1000), (1, 500), (0, 1)]:
        terms = evaluation.bits_of_steps_from(checkpoint, splits, t, [(3, s)], QUICK)
        total += torch.tensor(terms["ocm 3"])
        assert set(terms) == {
            f"{name}{end} 3" for name in evaluation.LIKELIHOODS for end in ("", ", calibrated")
        }
    wanted = ocm.bits_per_dim(
        checkpoint.denoiser,
        checkpoint.learned["ocm"],
        images[:],
        timesteps,
        decoder="beta_tilde",
        seed=0,
    )
    assert relative(total, wanted.total) < 1e-5


def test_the_standard_error_is_that_of_the_distance():
    """With equal variances the distance is (mean)^2, whose standard error is 2 |mean| / sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    drawn = 3 + torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    values = evaluation.left_out(real, drawn, 40)
    # From 40 blocks it is known to about a ninth.
    assert report.jackknife(values) == pytest.approx(2 * 3 / 4000**0.5, rel=0.4)


def test_settings_are_those_of_least_distance():
    rows = [
        {"method": "Euler", "covariance": "", "features": 2.0, "spacing": "even"},
        {"method": "Euler", "covariance": "", "features": 1.0, "spacing": "trailing"},
        {"method": "λ = 0", "covariance": "analytic", "features": 3.0, "spacing": "even"},
    ]
    best = evaluation.chosen(rows)
    assert {name: row["spacing"] for name, row in best.items()} == {
        "Euler": "trailing",
        "λ = 0": "even",
    }


def test_the_verdict_says_which_is_below():
    row = {"budget": 10, "pixels": 1.0, "features_left_out": [2.0, 2.2, 1.8]}
    other = row | {"features_left_out": [2.0, 2.1, 1.9]}
    model = {
        "path": "flow",
        "rows": [
            other | {"method": "Euler", "covariance": "", "features": 2.0},
            row | {"method": "λ = 0", "covariance": "ocm", "features": 3.0},
            row | {"method": "DDPM", "covariance": "ocm", "features": 2.1},
        ],
    }
    text = report.verdict(model)
    assert "ours (DDPM, OCM head) is at 2.100" in text
    assert "above by 0.100 ± 0.115, within two" in text
    assert "first order" not in text
    model["rows"].append(other | {"method": "Heun", "covariance": "", "features": 1.5})
    text = report.verdict(model)
    assert "(Heun) at 1.500: ours is above by 0.600" in text
    assert "first order (Euler) is at 2.000: ours is above by 0.100" in text
