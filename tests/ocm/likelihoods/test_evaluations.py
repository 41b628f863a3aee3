"""How often the network is evaluated: once for the velocity and its divergence."""

import pytest
import torch
from torch import nn

import hessdiag
import ocm

ARCHITECTURE = ocm.Architecture("Counted", None, lambda network, x, time, labels: network(x))


class Counted(nn.Module):
    """A layer of convolutions that counts its evaluations, and their samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)
        ).double()
        self.batches = []
        self.register_forward_hook(lambda module, inputs, output: self.batches.append(len(output)))

    def forward(self, x):
        return self.layers(x)


def evaluated(settings, **options):
    network = Counted()
    denoiser = ocm.Denoiser(network, ocm.flow(), "flow_prediction", ARCHITECTURE).freeze()
    x = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).reshape(3, 2, 4, 4)
    if "levels" in options:
        x = ocm.quantise(x, options["levels"])
    return network.batches, ocm.log_likelihood(denoiser, x, settings, **options)


@pytest.mark.parametrize("new_probes", [True, False])
@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize(
    ("probes", "max_probes", "products"),
    [("rademacher", 5, 5), ("coloring", 10, 10), ("exact", 32, 32), ("exact", 70, 32)],
)
def test_fixed_steps(probes, max_probes, products, solver, stages, new_probes):
    settings = ocm.LikelihoodSettings(
        solver, 3, probes=probes, max_probes=max_probes, new_probes=new_probes
    )
    batches, found = evaluated(settings)
    assert found.num_evaluations == 3 * stages
    # The samples of a batch alone: products are of the graph of that evaluation.
    assert batches == [3] * found.num_evaluations
    assert found.num_products == products * found.num_evaluations


@pytest.mark.parametrize("probes", ["rademacher", "coloring"])
def test_adaptive_steps(probes):
    settings = ocm.LikelihoodSettings("dopri5", tolerance=1e-2, probes=probes, max_probes=8)
    batches, found = evaluated(settings)
    assert batches == [3] * found.num_evaluations
    assert found.num_products == 8 * found.num_evaluations


def test_every_draw_counts():
    settings = ocm.LikelihoodSettings(
        "heun", 2, probes="rademacher", max_probes=4, num_draws=3, importance_weighted=True
    )
    batches, found = evaluated(settings, levels=256)
    assert batches == [3] * found.num_evaluations
    assert (found.num_evaluations, found.num_products) == (12, 48)


def test_draws_are_those_of_images_alone():
    _, found = evaluated(ocm.LikelihoodSettings("heun", 2, max_probes=4, num_draws=3))
    assert found.num_evaluations == 4


def test_whole_blocks_alone():
    """Of a design whose block does not divide the products that may be taken."""
    settings = ocm.LikelihoodSettings("euler", 2, probes=hessdiag.Coloring(4), max_probes=11)
    _, found = evaluated(settings)
    assert found.num_products == 16


def test_a_bar_shows_the_steps(capsys):
    evaluated(ocm.LikelihoodSettings("euler", 2, max_probes=4))
    assert capsys.readouterr().err == ""
    evaluated(ocm.LikelihoodSettings("euler", 2, max_probes=4), progress=True)
    assert capsys.readouterr().err.startswith("log-likelihood: 2/2 steps, ")
