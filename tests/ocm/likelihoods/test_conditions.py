"""Likelihoods under labels and guidance, of Gaussian classes whose densities are known."""

import dataclasses

import pytest
import torch
from known_likelihoods import Data, noise_variance, points
from torch import nn

import ocm
from ocm.likelihoods.settings import LikelihoodSettings

COVARIANCE = [[0.4, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.2]]
MEANS = torch.tensor([[0.5, 0.0, -0.5], [-1.0, 0.4, 0.2], [0.0, 0.9, 0.0]]).double()
FIRST = 10
NULL = 2  # the last class stands for no class
SETTINGS = LikelihoodSettings(num_steps=48, max_probes=3)
QUICK = LikelihoodSettings("heun", 4, probes="rademacher", max_probes=3)


class Classes(nn.Module):
    """The velocity of the straight path, for the class of each sample."""

    def __init__(self):
        super().__init__()
        self.classes = [Data([1.0], mean[None], [COVARIANCE]) for mean in MEANS]

    def forward(self, x, time, labels):
        sigma = time.double() / 1000
        each = torch.stack([one.mean(x.double(), 1 - sigma, sigma) for one in self.classes])
        chosen = nn.functional.one_hot(labels, len(MEANS)).T[..., None]
        return ((x - (chosen * each).sum(0)) / sigma[:, None]).to(x.dtype)


DENOISER = ocm.Denoiser(
    Classes(),
    ocm.flow(),
    "flow_prediction",
    ocm.Architecture(
        "Classes",
        None,
        lambda network, x, time, labels: network(x, time, labels),
        lambda network: NULL,
        lambda network: NULL,
    ),
)


def exact(x, means):
    laws = Data([1.0], MEANS[:1], [COVARIANCE])
    return laws.log_prob(x - means + MEANS[0], noise_variance(ocm.flow(), FIRST))


def test_every_sample_has_its_own_label():
    x, labels = points(4, 3), torch.tensor([0, 1, 1, 0])
    found = ocm.log_likelihood(
        DENOISER, x, SETTINGS, first_timestep=FIRST, condition=DENOISER.condition(labels)
    )
    torch.testing.assert_close(found.value, exact(x, MEANS[labels]), rtol=0, atol=1e-4)
    other = ocm.log_likelihood(
        DENOISER, x, SETTINGS, first_timestep=FIRST, condition=DENOISER.condition(1 - labels)
    )
    torch.testing.assert_close(other.value, exact(x, MEANS[1 - labels]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.7])
def test_guidance_is_the_model_of_both_means(scale):
    """With one covariance for all: guided x0_hat is that of the class at the guided mean."""
    x, labels = points(4, 3, seed=1), torch.tensor([0, 1, 1, 0])
    condition = DENOISER.condition(labels, guidance_scale=scale)
    found = ocm.log_likelihood(DENOISER, x, SETTINGS, first_timestep=FIRST, condition=condition)
    means = (1 - scale) * MEANS[NULL] + scale * MEANS[labels]
    torch.testing.assert_close(found.value, exact(x, means), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_labels_go_with_the_samples_of_a_batch(scale):
    """By probes, which are laid out beside them."""
    x, labels = points(4, 3, seed=2), torch.tensor([0, 1, 1, 0])

    def found(rows):
        condition = DENOISER.condition(labels[rows], guidance_scale=scale)
        return ocm.log_likelihood(
            DENOISER, x[rows], QUICK, condition=condition, sample_offset=rows.start
        ).value

    parts = torch.cat([found(slice(0, 1)), found(slice(1, 3)), found(slice(3, 4))])
    torch.testing.assert_close(found(slice(0, 4)), parts)


def test_the_decoder_is_of_the_condition_too():
    """P of the levels of a pixel, by its class: the mean over draws is the mass of one."""
    levels, copies = 9, 60
    grid = torch.linspace(-1, 1, levels, dtype=torch.float64).repeat_interleave(copies)
    x = torch.stack([grid, torch.zeros_like(grid), torch.zeros_like(grid)], dim=1)
    labels = torch.ones(len(x), dtype=torch.long)
    condition = DENOISER.condition(labels)
    settings = dataclasses.replace(SETTINGS, num_steps=6)
    value = {
        name: ocm.log_likelihood(
            DENOISER,
            x,
            settings,
            levels=levels,
            covariance=ocm.Exact(DENOISER) if name == "decoder" else None,
            condition=condition,
            first_timestep=100,
        )
        .value.reshape(levels, copies)
        .exp()
        for name in ("decoder", "uniform")
    }
    # Both are of the class at -1: most of their mass is in the lower half of the grid.
    for found in value.values():
        assert found[:4].sum() > 5 * found[5:].sum()
    ratio = value["decoder"].mean(1).sum() / value["uniform"].mean(1).sum()
    assert 0.7 < ratio < 1.4


def test_one_label_for_each_sample():
    condition = DENOISER.condition(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="labels"):
        ocm.log_likelihood(DENOISER, points(4, 3), QUICK, condition=condition)
