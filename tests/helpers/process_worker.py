"""What a process of ``test_processes`` does; importable by name from a process started anew."""

from pathlib import Path

import torch

import hessdiag

BATCH, M = 8, 12


def shifts_in_float64():
    """Products of single numbers and shifts, which round the same in any batch and process."""
    torch.manual_seed(0)
    weight, x = torch.randn(2, 24, dtype=torch.float64), torch.randn(BATCH, 24, dtype=torch.float64)

    def score_fn(z):
        return weight[0] * z * z * z + weight[1] * z * torch.roll(z, 1, dims=-1)

    return score_fn, x


def small_unet():
    from ocm.training.small_unet import small_unet

    module = small_unet((1, 8, 8)).eval()
    torch.manual_seed(0)
    return lambda z: module(z, 9).sample, torch.randn(BATCH, 1, 8, 8)


def estimate(make, first, count):
    torch.set_num_threads(1)
    score_fn, x = make()
    part = x[first : first + count]
    result = hessdiag.estimate(
        score_fn, part, max_probes=M, seed=3, sample_offset=first, mode="vjp"
    )
    probes = hessdiag.kernels.rademacher((M, *part.shape), 3, sample_offset=first)
    return result.diagonal, result.stderr, probes.transpose(0, 1).contiguous()


def worker(rank, world_size, functions, directory):
    """Estimate a share of the batch and write it down.

    To a file, not through a process group: nothing here needs one, and its threads can abort a
    process that leaves.
    """
    share = BATCH // world_size
    parts = {make.__name__: estimate(make, rank * share, share) for make in functions}
    torch.save(parts, Path(directory) / f"{rank}.pt")
