"""A batch split over 1, 2 and 4 processes gives the probes and estimates of one process."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from process_worker import BATCH, estimate, mlp_in_float64, small_unet, worker


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_give_the_same_estimate(world_size):
    functions = (mlp_in_float64, small_unet)
    with tempfile.TemporaryDirectory() as directory:
        store, out = Path(directory) / "store", Path(directory) / "out.pt"
        mp.spawn(worker, (world_size, functions, str(store), str(out)), nprocs=world_size)
        spread = torch.load(out, weights_only=True)
    for make in functions:
        diagonal, stderr, probes = estimate(make, 0, BATCH)
        result = spread[make.__name__]
        assert torch.equal(result[2], probes)
        if make is mlp_in_float64:
            assert torch.equal(result[0], diagonal)
            assert torch.equal(result[1], stderr)
        else:
            assert (result[0] - diagonal).norm() <= 1e-5 * diagonal.norm()
            assert (result[1] - stderr).norm() <= 1e-5 * stderr.norm()
