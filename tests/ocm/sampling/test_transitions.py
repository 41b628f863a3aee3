"""The step as a distribution: densities against torch.distributions, and gradients of rewards."""

import math
from functools import partial

import pytest
import torch
from path_denoiser import FEATURES, SHAPE, gaussian, path_denoiser
from torch import nn

import hessdiag
import ocm
from ocm.sampling.samplers import renoised, reverse_step


@pytest.fixture
def flow():
    return path_denoiser(gaussian(), "flow", "flow_prediction")


def normal_of(law, shape):
    """The law of torch.distributions with its mean and covariance."""
    D = math.prod(shape)
    unit = torch.eye(D, dtype=law.mean.dtype)
    columns = [
        law.covariance.multiply(v.expand(len(law.mean), D).reshape(law.mean.shape)).flatten(1)
        for v in unit
    ]
    matrix = torch.stack(columns, dim=2).double()
    mean = law.mean.flatten(1).double()
    return torch.distributions.MultivariateNormal(mean, (matrix + matrix.mT) / 2)


COVARIANCES = {
    "zero": ocm.BetaTilde,
    "beta": ocm.Beta,
    "diagonal": ocm.Exact,
    "coloring": lambda d: ocm.Hutchinson(d, 4, probes=hessdiag.Coloring(4)),
    "blocks": ocm.ChannelBlocks,
    "cosine": partial(ocm.CosineDiagonal, probes=hessdiag.UnitVectors()),
    "full": ocm.Full,
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_log_prob_is_that_of_torch(flow, name):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = SHAPE
    prediction = flow.predict(x, 700)
    step = ocm.ddpm(flow.schedule, 300, 700)
    law = ocm.transition(prediction, COVARIANCES[name](flow), step, x0_range=None)
    x_s = law.draw(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    expected = normal_of(law, shape).log_prob(x_s.flatten(1).double())
    assert law.log_prob(x_s).shape == (3,)
    torch.testing.assert_close(law.log_prob(x_s).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_draw_is_the_step_of_the_sampler(flow):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    step, z = ocm.ddpm(flow.schedule, 300, 700), torch.zeros(x.shape)
    for of in (ocm.Exact, ocm.Full):
        covariance = of(flow)
        prediction = flow.predict(x, 700)
        law = ocm.transition(prediction, covariance, step, x0_range=(-0.5, 0.5))
        bounded = reverse_step(
            prediction, covariance.at(prediction), step, seed=4, x0_range=(-0.5, 0.5)
        )
        z = hessdiag.kernels.normal(x.shape, 4, step=700)
        torch.testing.assert_close(law.draw(z), bounded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise_at_end", [False, True])
def test_a_trajectory_ends_in_the_samples_of_sample(flow, noise_at_end):
    arguments = {"steps": 4, "x0_range": None, "seed": 3, "noise_at_end": noise_at_end}
    trajectory = ocm.sample_trajectory(flow, ocm.Full(flow), (5, *SHAPE), **arguments)
    samples = ocm.sample(flow, ocm.Full(flow), (5, *SHAPE), **arguments)
    torch.testing.assert_close(trajectory.x0, samples, rtol=1e-4, atol=1e-5)
    assert trajectory.timesteps == [1000.0, 667.0, 334.0, 1.0, 0]
    assert trajectory.states.shape == (5, 5, *SHAPE)
    assert trajectory.log_prob.shape == (5, 3 + noise_at_end)


def test_log_prob_of_a_trajectory_does_not_depend_on_the_batch(flow):
    covariance = ocm.Hutchinson(flow, 4)
    draw = partial(ocm.sample_trajectory, flow, covariance, steps=3, x0_range=None, seed=3)
    whole, part = draw(shape=(4, *SHAPE)), draw(shape=(2, *SHAPE), sample_offset=2)
    torch.testing.assert_close(whole.states[:, 2:], part.states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.log_prob[2:], part.log_prob, rtol=1e-5, atol=1e-4)
    again = ocm.trajectory_log_prob(flow, covariance, part, x0_range=None)
    torch.testing.assert_close(again, part.log_prob, rtol=1e-6, atol=1e-5)


def test_half_precision_has_log_probs_in_float32(flow):
    covariance = ocm.Exact(flow)
    options = {"steps": 4, "x0_range": None, "seed": 3}
    trajectory = ocm.sample_trajectory(
        flow, covariance, (5, *SHAPE), dtype=torch.bfloat16, **options
    )
    assert trajectory.states.dtype == torch.bfloat16
    assert trajectory.log_prob.dtype == torch.float32
    # Of the states as they are kept: written out for the first step.
    t, s = 1000.0, 667.0
    x, x_s = (trajectory.states[k].float() for k in (0, 1))
    x0_hat = x - flow.predict(x, t).output
    a, b, noise = ocm.ddpm(flow.schedule, s, t)
    variance = noise + b**2 * gaussian().covariance.diagonal().float().reshape(SHAPE)
    law = torch.distributions.Normal(a * x + b * x0_hat, variance.sqrt())
    expected = law.log_prob(x_s).flatten(1).sum(1)
    torch.testing.assert_close(trajectory.log_prob[:, 0], expected, rtol=1e-5, atol=1e-4)
    again = ocm.trajectory_log_prob(flow, covariance, trajectory, x0_range=None)
    torch.testing.assert_close(again, trajectory.log_prob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["zero", "diagonal", "full"])
def test_the_policy_gradient_is_that_of_the_mean_reward(flow, name):
    """E[r grad log p] against a finite difference of E[r], a linear reward of Gaussian samples."""
    covariance = COVARIANCES[name](flow)
    weight = flow.backbone.weight
    options = {"steps": ocm.trailing_timesteps(flow.schedule, 3), "x0_range": None}
    count, step = 20_000, 0.02

    def mean_reward(shift):
        with torch.no_grad():
            weight.add_(shift)
            # The same noise and the same covariance on both sides.
            states = ocm.sample_trajectory(flow, covariance, (count, *SHAPE), seed=1, **options)
            weight.sub_(shift)
        return states.x0.flatten(1).sum(1).mean().item()

    # The covariance is held: that of the flow at its own weight differs by O(step), in the noise
    # alone, whose mean is zero. The last step draws none and gives no log-density.
    expected = (mean_reward(step) - mean_reward(-step)) / (2 * step)

    weight.requires_grad_(True)
    trajectory = ocm.sample_trajectory(flow, covariance, (count, *SHAPE), seed=1, **options)
    log_prob = ocm.trajectory_log_prob(flow, covariance, trajectory, **_without_steps(options))
    last = flow.predict(trajectory.states[-2], trajectory.timesteps[-2]).x0_hat
    rewards = last.flatten(1).sum(1)
    advantage = (rewards - rewards.mean()).detach()
    terms = advantage * log_prob.sum(1) + rewards
    (gradient,) = torch.autograd.grad(terms.mean(), weight)
    assert gradient.item() == pytest.approx(expected, rel=0.1)


def _without_steps(options):
    return {name: value for name, value in options.items() if name != "steps"}


def test_a_head_gets_the_gradient_of_the_log_density():
    from ocm.covariances.learned.optimal import OptimalCovarianceMatching

    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    head = nn.Conv2d(1, 1, 1)
    units = ocm.Parameterisation(0.5, positive=True)
    covariance = OptimalCovarianceMatching(denoiser, head, units)
    trajectory = ocm.sample_trajectory(denoiser, covariance, (4, *SHAPE), 3, x0_range=None)
    ocm.trajectory_log_prob(denoiser, covariance, trajectory, x0_range=None).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    assert denoiser.backbone.weight.grad is None  # frozen


def test_a_step_without_noise_has_no_density(flow):
    with pytest.raises(ValueError, match=r"covariance must be positive for log p.*adds no noise"):
        ocm.sample_trajectory(
            flow, ocm.BetaTilde(flow), (2, *SHAPE), 3, sampler=ocm.ddim, x0_range=None
        )
    with pytest.raises(TypeError, match="must have a density"):
        ocm.sample_trajectory(flow, ocm.Lanczos(flow, 2), (2, *SHAPE), 3, x0_range=None)
    # and one with the covariance's noise alone has
    trajectory = ocm.sample_trajectory(
        flow, ocm.Exact(flow), (2, *SHAPE), 3, sampler=ocm.ddim, x0_range=None
    )
    assert torch.isfinite(trajectory.log_prob).all()


def test_one_step_draws_nothing_and_has_no_log_prob(flow):
    trajectory = ocm.sample_trajectory(flow, ocm.Exact(flow), (2, *SHAPE), 1, x0_range=None)
    assert trajectory.log_prob.shape == (2, 0)
    assert ocm.trajectory_log_prob(flow, ocm.Exact(flow), trajectory).shape == (2, 0)


def test_any_share_of_new_noise_has_a_density(flow):
    for noise in (0.0, 0.4, 1.0):
        sampler = partial(renoised, noise=noise)
        trajectory = ocm.sample_trajectory(
            flow, ocm.Full(flow), (2, *SHAPE), 3, sampler=sampler, x0_range=None
        )
        again = ocm.trajectory_log_prob(
            flow, ocm.Full(flow), trajectory, sampler=sampler, x0_range=None
        )
        torch.testing.assert_close(again, trajectory.log_prob, rtol=1e-5, atol=1e-4)
        assert trajectory.log_prob.shape[1] * FEATURES > 0
