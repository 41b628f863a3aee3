"""The processes of a training, and the device of each.

``torchrun`` and ``accelerate launch`` tell every process its number and where the others are by the
environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

Once they are joined, they hold connections to each other. Where one of them ends, the next thing
that the others do together fails at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from ocm.diffusion.backbones.wrappers import class_of
from ocm.training.settings import TrainingSettings

# How long to wait for processes that have not started yet.
MEETING = timedelta(minutes=5)
# In errors of gloo, which have no type of their own.
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


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


@contextmanager
def naming_lost(count: int, doing: Callable[[], str]) -> Iterator[None]:
    """Raise what is raised where another of ``count`` processes has ended as a ConnectionError.

    Args:
        count: How many processes there are.
        doing: What this process was doing then, for the error.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or any(x in str(error) for x in _GLOO)
        if count == 1 or not lost:
            raise
        raise ConnectionError(
            f"another of {count} processes has ended, or cannot be reached, {doing()}; start all "
            f"of them again ({str(error).splitlines()[0]})"
        ) from error


def check_fits(settings: TrainingSettings, processes: Processes) -> None:
    """Raise unless these processes, on their devices, can train by the settings.

    Raises:
        ValueError: If not; it names the setting.
    """
    if settings.mixed_precision == "fp16" and processes.device.type == "cpu":
        raise ValueError('mixed_precision "fp16" needs a GPU, and device is the CPU; give "bf16"')
    parts = processes.count * settings.gradient_accumulation_steps
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, which is {processes.count} processes times "
            f"gradient_accumulation_steps = {settings.gradient_accumulation_steps}; got "
            f"{settings.batch_size}"
        )


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
    if class_of(backbone).__name__ == "DiTTransformer2DModel":  # it looks into its first block
        names = ()
    # Inner blocks before those that hold them.
    for module in reversed(list(backbone.modules())[1:]):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(backbone, mesh=mesh)


def join(device: torch.device | str | None) -> Processes:
    """Find the other processes, if a launcher started several, and the device of this one.

    None takes the process's GPU if it has one, else the CPU. The processes stay joined until the
    end: whoever started them may not find them a second time.

    Raises:
        ConnectionError: If the others have not come after five minutes.

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
        with naming_lost(count, lambda: "before all had come together"):
            store, rank, _ = next(rendezvous("env://", timeout=MEETING))
            store.set_timeout(distributed.default_pg_timeout)
            backend = "nccl" if place.type == "cuda" else "gloo"
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    return Processes(distributed.get_rank(), count, place)
