"""The processes of a training, and the device of each.

``torchrun`` and ``accelerate launch`` tell every process its number and where the others are by the
environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Processes:
    """The number of this process, 0 for the main one; how many there are; its own device."""

    rank: int
    count: int
    device: torch.device

    def all_of(self, value: int) -> list[int]:
        """Return the numbers of all processes, in their order."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()


def shard(backbone: nn.Module, device: torch.device | str | None = None) -> None:
    """Spread the weights of a model of diffusers over the processes, as ``fully_shard`` does.

    Each holds its part on its device, and a block is whole while it is computed: those blocks that
    diffusers itself would not split over devices.

    Args:
        backbone: The model, changed in place; on the CPU it may be larger than a device.
        device: As in :func:`join`.

    Raises:
        ValueError: If there is one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    processes = join(device)
    if processes.count == 1:
        raise ValueError(
            "a backbone is sharded over several processes, and there is one: start them by "
            "torchrun --nproc-per-node N"
        )
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    names = getattr(backbone, "_no_split_modules", None) or ()
    # Inner blocks before those that hold them.
    for module in reversed(list(backbone.modules())[1:]):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(backbone, mesh=mesh)


def join(device: torch.device | str | None) -> Processes:
    """Find the other processes, if a launcher started several, and the device of this one.

    None takes the process's GPU if it has one, else the CPU. The processes stay joined until the
    end: whoever started them may not find them a second time.

    Example:
        >>> join("cpu")
        Processes(rank=0, count=1, device=device(type='cpu'))
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    place, count = torch.device(device), int(os.environ.get("WORLD_SIZE", 1))
    if place.type == "cuda":
        if count > 1:
            own = int(os.environ.get("LOCAL_RANK", 0))
            torch.cuda.set_device(own if place.index is None else place)
        if place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
    if count == 1:
        return Processes(0, 1, place)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Processes(distributed.get_rank(), count, place)
