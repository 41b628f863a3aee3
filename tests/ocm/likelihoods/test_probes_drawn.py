"""Which probes are drawn: of each evaluation, draw and sample, whatever the batch."""

from dataclasses import dataclass, field

import pytest
import torch

import hessdiag
import ocm
from ocm.likelihoods.settings import LikelihoodSettings

SHAPE = (2, 4, 4)


@dataclass(frozen=True)
class Recorded(hessdiag.Rademacher):
    """Signs whose numbers are written down, by the evaluation that they are for."""

    drawn: list = field(default_factory=list)

    @property
    def is_signs(self):
        return False

    def draw(self, shape, seed, *, probe_offset, sample_offset, dtype, device):
        self.drawn.append((range(probe_offset, probe_offset + shape[0]), sample_offset))
        return super().draw(
            shape,
            seed,
            probe_offset=probe_offset,
            sample_offset=sample_offset,
            dtype=dtype,
            device=device,
        )


def denoiser(coupling=0.3):
    """A network on which probes err: features see all others, not linearly."""
    generator = torch.Generator().manual_seed(1)
    A = coupling * torch.randn(32, 32, generator=generator, dtype=torch.float64)

    def network(x, time):
        return torch.tanh(x.flatten(1) @ A.to(x)).view_as(x)

    return ocm.Denoiser(network, ocm.flow(), "sample")


def images(count=5):
    x = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    return ocm.quantise(x.clamp(-1, 1))


def drawn(levels=None, sample_offset=0, **settings):
    """The numbers of the probes, one after the other."""
    design = Recorded()
    settings = LikelihoodSettings("heun", 3, probes=design, max_probes=4, **settings)
    ocm.log_likelihood(denoiser(), images(2), settings, levels=levels, sample_offset=sample_offset)
    assert {offset for _, offset in design.drawn} == {sample_offset}
    return [number for numbers, _ in design.drawn for number in numbers]


def test_every_evaluation_has_probes_of_its_own():
    assert sorted(drawn()) == list(range(6 * 4))


def test_kept_probes_are_drawn_once():
    assert drawn(new_probes=False) == list(range(4))


@pytest.mark.parametrize(("new_probes", "number"), [(True, 24), (False, 4)])
def test_every_draw_has_probes_of_its_own(new_probes, number):
    numbers = drawn(256, new_probes=new_probes, num_draws=3)
    assert sorted(numbers) == list(range(3 * number))


@pytest.mark.parametrize("new_probes", [True, False])
def test_draws_that_are_weighed_share_their_probes(new_probes):
    one = drawn(256, new_probes=new_probes)
    assert drawn(256, new_probes=new_probes, num_draws=3, importance_weighted=True) == 3 * one


def test_probes_are_those_of_the_sample():
    assert drawn(sample_offset=7) == drawn()


def test_adaptive_steps_keep_their_probes():
    design = Recorded()
    settings = LikelihoodSettings("bosh3", tolerance=1e-2, probes=design, max_probes=4)
    found = ocm.log_likelihood(denoiser(), images(2), settings)
    assert [number for numbers, _ in design.drawn for number in numbers] == list(range(4))
    assert found.num_products == 4 * found.num_evaluations


CHOICES = [
    ("rademacher", True),
    ("rademacher", False),
    ("coloring", True),
    ("coloring", False),
    (hessdiag.BalancedColoring(4), True),
    (hessdiag.Normal(), True),
]


@pytest.mark.parametrize(("probes", "new_probes"), CHOICES)
@pytest.mark.parametrize("levels", [None, 256])
def test_a_sample_is_the_same_in_any_batch(probes, new_probes, levels):
    settings = LikelihoodSettings(
        "heun", 3, probes=probes, max_probes=8, new_probes=new_probes, num_draws=2
    )
    x = images()
    whole = ocm.log_likelihood(denoiser(), x, settings, levels=levels, seed=3, sample_offset=10)
    parts = [
        ocm.log_likelihood(
            denoiser(), x[first:end], settings, levels=levels, seed=3, sample_offset=10 + first
        )
        for first, end in ((0, 1), (1, 3), (3, 5))
    ]
    for name in ("value", "log_prior", "probe_stderr", "draw_stderr", "degrees"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(getattr(whole, name), together, rtol=1e-7, atol=1e-7)
    elsewhere = ocm.log_likelihood(denoiser(), x, settings, levels=levels, seed=3).value
    assert ((whole.value - elsewhere).abs() > 1e-4).all()


@pytest.mark.parametrize(("probes", "new_probes"), CHOICES[:4])
def test_seeds_differ(probes, new_probes):
    settings = LikelihoodSettings("heun", 3, probes=probes, max_probes=8, new_probes=new_probes)
    first, again, other = (
        ocm.log_likelihood(denoiser(), images(), settings, seed=seed).value for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert ((first - other).abs() > 1e-4).all()


def test_copies_of_a_sample_have_probes_of_their_own():
    settings = LikelihoodSettings("heun", 3, probes="rademacher", max_probes=4)
    value = ocm.log_likelihood(denoiser(), images(1).repeat(6, 1, 1, 1), settings).value
    assert len(value.unique()) == 6


def test_new_probes_average_out_what_kept_ones_do_not():
    """Of a velocity that is much the same everywhere, whose errors then add up."""
    x = images(1).repeat(400, 1, 1, 1)
    spreads = [
        ocm.log_likelihood(
            denoiser(),
            x,
            LikelihoodSettings("heun", 8, probes="rademacher", max_probes=4, new_probes=new),
        ).value.std()
        for new in (True, False)
    ]
    assert spreads[0] < 0.8 * spreads[1]
