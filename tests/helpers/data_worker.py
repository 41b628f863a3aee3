"""A regression, its data in batches, and a process that has every other sample."""

import torch
from torch import distributed, nn
from torch.utils.data import TensorDataset

import hessdiag


def regression():
    """A network in float64 and 13 samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return module, TensorDataset(torch.randn(13, 3).double(), torch.randn(13, 4).double())


def batches(size):
    """The samples in order."""
    x, y = regression()[1].tensors
    return list(zip(x.split(size), y.split(size), strict=True))


def worker(rank, world_size, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    module, data = regression()
    numbers = torch.arange(rank, len(data), world_size)
    x, y = data[numbers]
    parts = zip(x.split(3), y.split(3), numbers.split(3), strict=True)
    for max_probes in (None, 2):
        result = hessdiag.gauss_newton_over_data(
            module,
            nn.functional.mse_loss,
            list(parts) if max_probes is None else [(x, y, numbers)],
            max_probes=max_probes,
            process_group=distributed.group.WORLD,
        )
        torch.save(result.diagonal, f"{folder}/{rank}-{max_probes}.pt")
    distributed.destroy_process_group()
