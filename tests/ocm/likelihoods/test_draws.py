"""Several draws of dequantisation noise: bounds on the mass of bins, and their standard errors."""

import pytest
import torch
from known_likelihoods import Data, denoiser_of, noise_variance

import ocm
from ocm.likelihoods.settings import LikelihoodSettings

LEVELS, HALF_BIN = 9, 1 / 8
STDS = torch.tensor([0.1, 0.2, 0.3, 0.15], dtype=torch.float64)
MEAN = torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64)
DATA = Data([1.0], MEAN[None], torch.diag(STDS**2)[None])
# A ring, on which errors of probes are not skewed.
RING = torch.tensor([[1, 0.5, 0, -0.5], [0.5, 1, 0.5, 0], [0, 0.5, 1, 0.5], [-0.5, 0, 0.5, 1]])
COUPLED = RING * STDS[:, None] * STDS
IMAGE = torch.tensor([0.25, -0.25, 0.5, 0.25]).double().reshape(1, 1, 2, 2)
FIRST = 20


def log_mass():
    """log P of the image: features are independent."""
    std = (STDS**2 + noise_variance(ocm.flow(), FIRST)).sqrt()
    normal = torch.distributions.Normal(MEAN, std)
    x = IMAGE.flatten()
    return (normal.cdf(x + HALF_BIN) - normal.cdf(x - HALF_BIN)).log().sum().item()


def found_by(
    copies, num_draws, importance_weighted=False, data=DATA, levels=LEVELS, first=FIRST, **options
):
    settings = LikelihoodSettings(
        num_steps=4,
        num_draws=num_draws,
        importance_weighted=importance_weighted,
        **{"probes": "exact", "max_probes": 4, **options},
    )
    return ocm.log_likelihood(
        denoiser_of(data, ocm.flow(), "flow_prediction"),
        IMAGE.expand(copies, 1, 2, 2),
        settings,
        levels=levels,
        first_timestep=first,
    )


def test_bounds_rise_to_the_mass_with_the_draws_that_are_weighed():
    """Whereas the mean of bounds is another one of them, with less chance."""
    one = found_by(600, 1).value
    mean, weighed = (found_by(200, 8, importance_weighted=iw).value for iw in (False, True))
    error = one.std() / 600**0.5
    gap = log_mass() - one.mean()
    assert 0.05 < gap < 0.5
    assert (one.mean() - mean.mean()).abs() < 4 * 2**0.5 * error
    assert log_mass() - weighed.mean() < 0.35 * gap
    assert log_mass() - weighed.mean() > -4 * weighed.std() / 200**0.5
    # Draw by draw: the logarithm of a mean is above the mean of logarithms.
    assert (weighed >= mean).all()


@pytest.mark.parametrize("importance_weighted", [False, True])
@pytest.mark.parametrize("probes", ["exact", "rademacher"])
def test_errors_by_draws_and_probes_are_those_that_are_stated(importance_weighted, probes):
    """Probes err where features are coupled; of a diagonal they know all."""
    data = Data([1.0], MEAN[None], COUPLED[None])
    # Bins so narrow that both errors are of one size.
    levels = 33 if probes == "exact" or importance_weighted else 65
    options = {"levels": levels, "probes": probes, "max_probes": 8, "new_probes": False}
    found = found_by(500, 8, importance_weighted, data, **options)
    stated = found.stderr.square().mean().sqrt()
    assert 0.88 < found.value.std() / stated < 1.12
    assert found.draw_stderr.mean() > 0
    share = found.probe_stderr.square().mean().sqrt() / stated
    assert (share > 0.3) == (probes == "rademacher")
    low, high = found.interval(0.9)
    middle = found.value.mean()
    covered = ((low <= middle) & (middle <= high)).double().mean()
    assert 0.84 < covered < 0.95


def test_a_single_draw_knows_no_error():
    found = found_by(2, 1)
    assert found.draw_stderr.tolist() == [torch.inf] * 2
    assert found.interval()[1].tolist() == [torch.inf] * 2
    assert found.probe_stderr.tolist() == [0.0] * 2


def test_an_unknown_error_stays_unknown_whatever_the_weights():
    """Of draws so far apart that one weight is 0, by a single probe."""
    narrow = Data([1.0], MEAN[None], 1e-6 * torch.eye(4)[None])
    found = found_by(2, 4, True, narrow, first=1, probes="rademacher", max_probes=1)
    assert found.probe_stderr.tolist() == [torch.inf] * 2
    assert found.stderr.tolist() == [torch.inf] * 2


def test_continuous_data_have_no_draws():
    settings = LikelihoodSettings(num_steps=2, max_probes=4, num_draws=5)
    denoiser = denoiser_of(DATA, ocm.flow(), "flow_prediction")
    found = ocm.log_likelihood(denoiser, IMAGE, settings)
    assert found.draw_stderr.tolist() == [0.0]
    assert found.num_evaluations == 8


def test_noise_that_is_drawn_once_more_is_other_noise():
    values = found_by(3, 1).value, found_by(3, 2).value
    assert ((values[0] - values[1]).abs() > 1e-6).all()


def test_the_prior_is_the_mean_over_draws():
    """A part of the value, of the size of a normal density of z."""
    found = found_by(50, 4)
    entropy = -0.5 * 4 * (1 + torch.tensor(2 * torch.pi).log())
    assert found.log_prior.shape == (50,)
    assert (found.log_prior - entropy).abs().max() < 4
    assert found.log_prior.std() > 0
