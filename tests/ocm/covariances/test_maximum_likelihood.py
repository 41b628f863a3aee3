"""The likelihood head: its loss is the bound of the chains term by term, and its gradient too."""

import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from path_denoiser import PATHS, SHAPE, gaussian, path_denoiser
from plain_heads import Affine, Constant
from torch.distributions import Normal, kl_divergence
from two_classes import two_classes

import ocm

POSITIVE = ocm.Parameterisation(data_std=0.6, positive=True)
FLOW_TYPES = {"flow": "flow_prediction", "edm": "edm", "trigflow": "trigflow"}


def on_path(path):
    return path_denoiser(gaussian(), path, FLOW_TYPES.get(path, "v_prediction"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spacing", ["even", "trailing"])
def test_its_expectation_is_the_bound(path, spacing):
    """Of the decoder and the steps, which hold the head; the prior does not."""
    denoiser, K, count = on_path(path), 4, 8000
    covariance = ocm.MaximumLikelihood(
        denoiser,
        Affine(),
        POSITIVE,
        step_counts=(K,),
        spacings=(spacing,),
        levels=None,
        x0_range=None,
    )
    x0 = torch.tensor([0.3, -0.5, 0.1, 0.6, -0.2, 0.0, 0.4, -0.3]).double().reshape(1, *SHAPE)
    x0 = x0.expand(count, *SHAPE)
    chain = {"even": ocm.even_timesteps, "trailing": ocm.trailing_timesteps}[spacing]
    bound = ocm.bits_per_dim(
        denoiser, covariance, x0, chain(denoiser.schedule, K), levels=None, x0_range=None
    )
    wanted = (bound.steps.sum(1) + bound.decoder) * math.log(2)

    dtype = torch.float64 if denoiser.schedule.is_continuous else torch.int64
    shares = (torch.arange(count) + 0.5) / count
    t = (1 + shares * 1000).to(dtype).clamp(max=1000)
    with torch.no_grad():
        parts = torch.stack(
            [
                covariance.loss(x0[:40], t[part::200], seed=0, sample_offset=40 * part)
                for part in range(200)
            ]
        )
    error = math.hypot(
        parts.std().item() / math.sqrt(len(parts)), wanted.std().item() / math.sqrt(count)
    )
    assert error < 0.1
    assert parts.mean().item() == pytest.approx(wanted.mean().item(), abs=4 * error + 0.003)


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("schedule", [ocm.linear(), ocm.cosine()])
def test_terms_against_torch_distributions(schedule, levels):
    """The KL of both Gaussians of every step, and the decoder's density or mass, each times K."""
    denoiser = gaussian_denoiser(
        torch.zeros(3), torch.diag(torch.tensor([0.1, 0.2, 0.3])), schedule
    )
    K = 3
    covariance = ocm.MaximumLikelihood(
        denoiser, Affine(), POSITIVE, step_counts=(K,), spacings=("even",), levels=levels
    )
    x0 = torch.tensor([[[[0.25, -0.375, 1.0]]]]).double()
    steps = [(0, 1), (1, 500), (500, 1000)]
    for place, (s, t) in zip((100, 500, 900), steps, strict=True):
        found = covariance.loss(x0, torch.tensor([place]), seed=3, sample_offset=7)
        x_t, _ = ocm.diffusion.noise.noisy(schedule, x0, torch.tensor([t]), 3, 7)
        prediction = denoiser.predict(x_t, t)
        x0_hat = prediction.x0_hat.clamp(-1, 1)
        unit = 1 / (1 / 0.6**2 + schedule.alpha_bar[t] / schedule.beta_bar[t])
        o = 0.3 * x_t - 0.2
        variance = unit * torch.log1p(torch.exp(o + math.log(math.e - 1)))
        if s == 0 and levels is None:
            wanted = -Normal(x0_hat, variance.sqrt()).log_prob(x0).mean()
        elif s == 0:
            law = Normal(x0_hat, variance.sqrt().clamp(min=0.1 / 8))
            upper, lower = law.cdf(x0 + 1 / 16), law.cdf(x0 - 1 / 16)
            wanted = -(torch.where(x0 == 1, 1.0, upper) - lower).log().mean()
        else:
            step = ocm.ddpm(schedule, s, t)
            mean = [step.mean_from_x_t * x_t + step.mean_from_x0 * x for x in (x0, x0_hat)]
            of_step = (step.noise_variance + step.mean_from_x0**2 * variance).sqrt()
            wanted = kl_divergence(
                Normal(mean[0], math.sqrt(step.noise_variance)), Normal(mean[1], of_step)
            ).mean()
        torch.testing.assert_close(found, K * wanted, rtol=1e-5, atol=0)


def test_its_gradient_is_that_of_finite_differences():
    denoiser = on_path("flow")
    x0 = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0)).double() - 0.5
    t = torch.linspace(1, 1000, 16).double()

    def loss(weights):
        class Given(torch.nn.Module):
            def forward(self, features):
                return weights[0] * features + weights[1]

        covariance = ocm.MaximumLikelihood(denoiser, Given(), POSITIVE, x0_range=None)
        return covariance.loss(x0, t, seed=1, sample_offset=0)

    weights = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, weights)


def test_the_exact_variance_is_its_minimum():
    """For Gaussian data and a denoiser without errors, at every level that the chains visit."""
    schedule, data = ocm.linear(), torch.diag(torch.tensor([0.05, 0.1, 0.3]))
    denoiser = gaussian_denoiser(torch.zeros(3), data, schedule)
    covariance = ocm.MaximumLikelihood(denoiser, torch.nn.Identity(), POSITIVE, x0_range=None)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    class Exact(torch.nn.Module):
        """The o of the exact variance times e^scale, where the features are x_t."""

        def __init__(self, t):
            super().__init__()
            self.t = t

        def forward(self, features):
            unit = POSITIVE.scale(schedule, self.t, features)
            exact = torch.stack([posterior_covariance(data, schedule, t).diag() for t in self.t])
            ratio = exact.reshape(-1, 1, 1, 3) / unit * scale.exp()
            return torch.log(torch.expm1(ratio)) - math.log(math.e - 1)

    def gradients():
        generator, found = torch.Generator().manual_seed(0), []
        for i in range(40):
            x0 = torch.randn(64, 1, 1, 3, generator=generator).double() * data.diag().sqrt()
            t = 1 + torch.randperm(1000, generator=generator)[:64]
            _, taken, _ = covariance._steps(t, 0, 64 * i)
            loss = covariance.loss(x0, t, seed=0, sample_offset=64 * i, head=Exact(taken))
            found.append(torch.autograd.grad(loss, scale)[0])
        return torch.stack(found)

    at_the_exact = gradients()
    error = at_the_exact.std() / math.sqrt(len(at_the_exact))
    assert at_the_exact.mean().abs() < 4 * error
    with torch.no_grad():
        scale.fill_(0.7)  # twice the variance is told from it
    assert gradients().mean() > 6 * error


def test_batches_and_chunks_take_the_same_chains():
    denoiser = on_path("linear")
    covariance = ocm.MaximumLikelihood(denoiser, Affine(), POSITIVE)
    x0 = torch.rand(10, *SHAPE).double() - 0.5
    t = torch.arange(1, 11) * 100
    whole = covariance.loss(x0, t, seed=4, sample_offset=20)
    parts = [
        covariance.loss(x0[i : i + 5], t[i : i + 5], seed=4, sample_offset=20 + i) for i in (0, 5)
    ]
    torch.testing.assert_close(whole, sum(parts) / 2)
    counts = covariance._steps(torch.arange(1, 1001), 0, 0)[2]
    assert {int(K): int((counts == K).sum()) for K in counts.unique()}.keys() == {5, 10, 25, 50}
    assert all(int((counts == K).sum()) > 200 for K in (5, 10, 25, 50))


def test_it_trains_the_head_of_another_on(unet):
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    npr = ocm.NPR(denoiser, ocm.make_head(denoiser), POSITIVE)
    further = ocm.MaximumLikelihood.of(npr)
    assert further.head is npr.head
    assert further.parameterisation == POSITIVE
    x0 = torch.rand(16, 2, 8, 8) * 2 - 1
    ocm.train_head(further, x0, ocm.TrainingSettings(2, batch_size=4), progress=False)
    prediction = denoiser.predict(x0, 300)
    torch.testing.assert_close(npr.at(prediction).diagonal(), further.at(prediction).diagonal())
    with pytest.raises(ValueError, match="SN, whose head puts out something else"):
        ocm.MaximumLikelihood.of(ocm.SN(denoiser, npr.head, POSITIVE))


def test_its_training_goes_on_and_only_with_its_own_chains(unet, tmp_path):
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    x0 = torch.rand(16, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = ocm.TrainingSettings(2, batch_size=4)

    def trained(**options):
        covariance = ocm.MaximumLikelihood(denoiser, ocm.make_head(denoiser), **options)
        return ocm.train_head(covariance, x0, settings, directory=tmp_path, progress=False)

    assert trained() == trained()
    with pytest.raises(ValueError, match="step_counts"):
        trained(step_counts=(5, 10))


@pytest.mark.parametrize("units", [ocm.PAPER, POSITIVE])
def test_units_without_a_sign_have_a_finite_loss(units):
    denoiser = gaussian_denoiser(torch.zeros(3), 0.2 * torch.eye(3), ocm.linear())
    covariance = ocm.MaximumLikelihood(denoiser, Constant(-3.0), units)
    x0 = torch.zeros(64, 1, 1, 3)
    t = torch.linspace(1, 1000, 64).long()
    assert covariance.loss(x0, t, seed=0, sample_offset=0).isfinite()


def test_impossible_chains():
    denoiser = on_path("linear")
    for wrong in ((), (0,), (5, 1001)):
        with pytest.raises(ValueError, match=r"step_counts must hold numbers in 1 \.\. 1000"):
            ocm.MaximumLikelihood(denoiser, Affine(), step_counts=wrong)
    for wrong in ((), ("uneven",)):
        with pytest.raises(ValueError, match="spacings must be some of even, trailing, leading"):
            ocm.MaximumLikelihood(denoiser, Affine(), spacings=wrong)


def test_the_mean_is_clipped_to_the_range_of_the_data():
    """The network says 0.2: right where that is allowed, and right of data up to 0.1 otherwise."""
    denoiser = two_classes()
    condition, t = denoiser.condition(torch.ones(8, dtype=torch.int64)), torch.arange(50, 900, 110)
    losses = [
        ocm.MaximumLikelihood(denoiser, Constant(0.0), levels=None, x0_range=x0_range).loss(
            torch.full((8, 1, 2, 2), most), t, seed=0, sample_offset=0, condition=condition
        )
        for x0_range, most in ((None, 0.2), ((-0.1, 0.1), 0.1), (None, 0.1))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[2] > losses[0] + 1e-3


def test_whole_timesteps_stand_for_the_intervals_below_them():
    """Half of a thousand train each step of a chain of two."""
    denoiser = gaussian_denoiser(torch.zeros(3), 0.1 * torch.eye(3), ocm.linear())
    covariance = ocm.MaximumLikelihood(denoiser, Affine(), step_counts=(2,), spacings=("even",))
    s, t, K = covariance._steps(torch.arange(1, 1001), 0, 0)
    assert torch.equal(s, torch.arange(1, 1001).gt(500).long())
    assert torch.equal(t, torch.where(s == 1, 1000, 1))
    assert (K == 2).all()
