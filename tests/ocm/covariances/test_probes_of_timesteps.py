"""Which probes a covariance takes: those of its timestep, of its samples, of its own denoiser.

The network predicts A x_t at every timestep, so that an estimate of Cov[x0 | x_t] differs between
timesteps by its probes and by a known factor alone.
"""

from dataclasses import replace

import pytest
import torch

import hessdiag
import ocm

SHAPE = (2, 2, 4)
A = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).double()
X = torch.zeros(3, *SHAPE).double()
V = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()


def denoiser_of(matrix):
    def network(x, time):
        return (x.flatten(1) @ matrix.T).reshape(x.shape)

    return ocm.Denoiser(network, ocm.linear(), "sample")


DENOISER = denoiser_of(A)
COVARIANCES = {
    "hutchinson": lambda m: ocm.Hutchinson(DENOISER, m, floor=None),
    "coloring": lambda m: ocm.Hutchinson(DENOISER, 4 * m, probes=hessdiag.Coloring(4), floor=None),
    "cosine": lambda m: ocm.CosineDiagonal(DENOISER, m),
    "blocks": lambda m: ocm.ChannelBlocks(DENOISER, 2 * m, probes=hessdiag.Rademacher()),
}


def estimated(covariance, t, rows=slice(None)):
    """What products with the covariance say of J."""
    prediction = DENOISER.predict(X[rows], t, sample_offset=rows.start or 0)
    factor = DENOISER.schedule.sigma(t) ** 2 / DENOISER.schedule.alpha(t)
    return covariance.at(prediction).multiply(V[rows]) / factor


@pytest.mark.parametrize("name", COVARIANCES)
def test_no_two_timesteps_share_probes(name):
    """Two neighbours have what a timestep of half their number has of twice as many probes."""
    covariance = COVARIANCES[name]
    one, next_one = (estimated(covariance(3), t) for t in (500, 501))
    assert (one - next_one).abs().max() > 0.1
    both = estimated(covariance(6), 250)
    torch.testing.assert_close((one + next_one) / 2, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", COVARIANCES)
def test_every_sample_has_probes_of_its_own_number(name):
    covariance = COVARIANCES[name](3)
    whole = estimated(covariance, 500)
    assert (whole[0] / V[0] - whole[1] / V[1]).abs().max() > 0.1
    torch.testing.assert_close(estimated(covariance, 500, slice(1, 3)), whole[1:])


def test_a_prediction_of_another_denoiser_is_taken_again():
    other = replace(DENOISER, backbone=denoiser_of(2.0 * A).backbone)
    covariance = ocm.Hutchinson(DENOISER, 2, floor=None)
    stated = covariance.at(other.predict(X, 500, sample_offset=7)).diagonal()
    expected = covariance.at(DENOISER.predict(X, 500, sample_offset=7)).diagonal()
    torch.testing.assert_close(stated, expected)
