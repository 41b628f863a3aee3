"""A batch split over 2 and 4 processes gives the probes and estimates of one process."""

import pytest
import torch
import torch.multiprocessing as mp
from process_worker import BATCH, estimate, shifts_in_float64, small_unet, worker


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_processes_give_the_same_estimate(world_size, tmp_path):
    functions = (shifts_in_float64, small_unet)
    mp.spawn(worker, (world_size, functions, str(tmp_path)), nprocs=world_size)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for make in functions:
        diagonal, stderr, probes = estimate(make, 0, BATCH)
        shares = zip(*(part[make.__name__] for part in parts), strict=True)
        result = [torch.cat(share) for share in shares]
        assert torch.equal(result[2], probes)
        if make is shifts_in_float64:
            assert torch.equal(result[0], diagonal)
            assert torch.equal(result[1], stderr)
        else:
            assert (result[0] - diagonal).norm() <= 1e-5 * diagonal.norm()
            assert (result[1] - stderr).norm() <= 1e-5 * stderr.norm()
