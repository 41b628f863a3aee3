"""A batch split over 1, 2 and 4 processes gives the probes and estimates of one process."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from process_worker import BATCH, estimate, mlp_in_float64, small_unet, worker


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("make", [mlp_in_float64, small_unet])
def test_processes_give_the_same_estimate(make, world_size):
    torch.manual_seed(0)
    diagonal, stderr, probes = estimate(make, 0, BATCH)
    with tempfile.TemporaryDirectory() as directory:
        store, out = Path(directory) / "store", Path(directory) / "out.pt"
        mp.spawn(worker, (world_size, make, str(store), str(out)), nprocs=world_size)
        spread = torch.load(out)
    assert torch.equal(spread[2], probes)
    if make is mlp_in_float64:
        assert torch.equal(spread[0], diagonal)
        assert torch.equal(spread[1], stderr)
    else:
        assert (spread[0] - diagonal).norm() <= 1e-5 * diagonal.norm()
        assert (spread[1] - stderr).norm() <= 1e-5 * stderr.norm()
