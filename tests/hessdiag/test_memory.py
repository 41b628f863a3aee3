"""Peak memory against depth, counted operator by operator."""

import pytest
import torch
from harness.memory import allocated_bytes, peak_bytes
from torch import nn

import hessdiag


def test_the_counter_counts():
    x = torch.zeros(1000)

    def run():
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        return b + c

    assert peak_bytes(run) == 3 * x.nbytes
    assert allocated_bytes(run) == 3 * x.nbytes


def peak(depth, mode, batching):
    torch.manual_seed(0)
    layers = [
        layer
        for _ in range(depth)
        for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    ]
    module = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(2, 4, 32, 32)
    return (
        peak_bytes(lambda: hessdiag.estimate(module, x, max_probes=3, mode=mode, batching=batching))
        / x.nbytes
    )


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
def test_forward_mode_does_not_grow_with_depth(batching):
    shallow, deep = peak(4, "jvp", batching), peak(32, "jvp", batching)
    assert deep < 1.1 * shallow


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
def test_reverse_mode_does(batching):
    shallow, deep = peak(4, "vjp", batching), peak(32, "vjp", batching)
    assert deep > shallow + 28  # an input's size a layer, at least
