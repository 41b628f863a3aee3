"""Products that choose a design: those of the block that is estimated."""

import torch

from hessdiag.choosing import Request, choose_start
from hessdiag.kernels import rademacher

SHAPE, COLORS = (1, 12, 12), 24


def started(block):
    """What is chosen for two samples without structure, and the pilots behind it."""
    taken = []

    def products(probes):
        taken.append(probes)
        return torch.ones_like(probes)

    request = Request(
        torch.zeros(2, *SHAPE), COLORS, None, geometry=True, total=False, seed=torch.tensor(5),
        sample_offset=3, probe_offset=block * COLORS,
    )  # fmt: skip
    return choose_start(products, request, "auto", []), torch.cat(taken)


def test_every_block_has_its_own_sets_and_signs():
    z = rademacher((2, 2, *SHAPE), 5, sample_offset=3)
    (first, pilots), (second, others) = started(0), started(1)
    for block, drawn in enumerate((pilots, others)):
        assert (drawn != 0).any()
        assert torch.equal(drawn, z[block] * (drawn != 0))
    assert not torch.equal(first.lanes[0].design.sets, second.lanes[0].design.sets)


def test_pilots_are_the_first_probes_of_the_estimate():
    start, pilots = started(0)
    assert start.num_spent == 0
    assert torch.equal(start.begun[0], pilots)
    assert len(start.begun[1]) == len(pilots)
