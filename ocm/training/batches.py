"""The batches of a training: which images a step takes, at which timesteps, and their reading.

A batch is a pure function of the seed and the number of its step. So a training goes on at any step
as if it had never stopped, however many processes train, and however many read ahead.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ocm.training.settings import TrainingSettings

# The least of continuous timesteps, above 0 where there is no noise.
_LEAST = 1e-3


class ImageSource(Protocol):
    """Images that are read as they are needed; a tensor of shape (n, C, ...) is one too.

    What they are conditioned on may lie in such a source too, as rows of one shape.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return the images of ``indices``, int64 of shape (b,), as (b, C, ...) in [-1, 1]."""


Conditions = Mapping[str, Tensor | ImageSource]
"""What images are conditioned on, by name: "labels", and arguments of the backbone."""


@dataclass(frozen=True)
class Batch:
    """Which images a step takes, at which timesteps in (0, N], and which of them are flipped."""

    indices: Tensor
    timesteps: Tensor
    flips: Tensor


def batch_of_step(
    step: int,
    settings: TrainingSettings,
    num_images: int,
    num_timesteps: int,
    is_continuous: bool = False,
) -> Batch:
    """Draw images with replacement, and timesteps spread over (0, N], for one step.

    They are whole unless the path is continuous. Each u of the timesteps N u^exponent is uniform
    alone; spreading them evenly within a batch lowers the gradient's variance.

    Example:
        >>> settings = TrainingSettings(num_steps=9, batch_size=4)
        >>> batch_of_step(7, settings, num_images=100, num_timesteps=1000).timesteps.diff()
        tensor([250, 250, 250])
    """
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "batch", step))
    size = settings.batch_size
    indices = torch.randint(num_images, (size,), generator=generator)
    place = (torch.arange(size) + torch.rand(1, generator=generator)) / size
    place = place**settings.timestep_exponent
    if is_continuous:
        timesteps = (place.double() * num_timesteps).clamp(_LEAST, num_timesteps)
    else:
        timesteps = 1 + (place * num_timesteps).long().clamp(max=num_timesteps - 1)
    flips = torch.rand(size, generator=generator) < (0.5 if settings.horizontal_flip else 0.0)
    return Batch(indices, timesteps, flips)


class MicroBatch(NamedTuple):
    """What one process takes into one evaluation of the loss, as ``train`` hands it on."""

    x0: Tensor
    t: Tensor
    conditions: Mapping[str, Tensor]
    sample_offset: int


@dataclass(frozen=True, eq=False)
class MicroBatches(Dataset[MicroBatch]):
    """The micro-batches, by number, of process ``rank`` among ``num_processes``."""

    images: Tensor | ImageSource
    conditions: Conditions
    num_timesteps: int
    settings: TrainingSettings
    rank: int = 0
    num_processes: int = 1
    is_continuous: bool = False

    def __getitem__(self, number: int) -> MicroBatch:
        settings = self.settings
        parts = settings.gradient_accumulation_steps
        step, part = divmod(number, parts)
        batch = batch_of_step(
            step, settings, len(self.images), self.num_timesteps, self.is_continuous
        )
        size = settings.batch_size // (self.num_processes * parts)
        first = (self.rank * parts + part) * size
        own = slice(first, first + size)
        picked = batch.indices[own]
        x0 = self.images[picked]
        if settings.horizontal_flip:
            if x0.dim() < 4:
                raise ValueError(
                    f"horizontal_flip needs images of shape (n, C, H, W), got {tuple(x0.shape)}"
                )
            flips = batch.flips[own].to(x0.device).reshape(-1, *[1] * (x0.dim() - 1))
            x0 = torch.where(flips, x0.flip(-1), x0)
        conditions = {name: rows_at(rows, picked) for name, rows in self.conditions.items()}
        return MicroBatch(x0, batch.timesteps[own], conditions, step * settings.batch_size + first)

    def from_step(self, step: int) -> DataLoader[MicroBatch]:
        """Return a loader of all micro-batches from this step on, in order."""
        parts = self.settings.gradient_accumulation_steps
        workers = self.settings.num_workers
        # Those of a fork server would outlive this process, were it killed.
        forked = workers > 0 and sys.platform == "linux"
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(step * parts, self.settings.num_steps * parts),
            num_workers=workers,
            multiprocessing_context="fork" if forked else None,
        )


def rows_at(rows: Tensor | ImageSource, indices: Tensor) -> Tensor:
    """Return what a tensor, on whatever device, or a source holds at ``indices``."""
    return rows[indices.to(rows.device) if isinstance(rows, Tensor) else indices]


def check_data(images: Tensor | ImageSource, conditions: Conditions) -> None:
    """Raise unless images and their conditions can be trained on."""
    count = len(images)
    if count == 0:
        raise ValueError("images must hold at least one image, got none")
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers in [-1, 1], got {images.dtype}")
    for name, rows in conditions.items():
        if name == "labels" and isinstance(rows, Tensor):
            if rows.dtype != torch.int64 or rows.shape != (count,):
                raise ValueError(
                    f"labels must be int64 of shape ({count},), one for each image, got "
                    f"{rows.dtype} of shape {tuple(rows.shape)}"
                )
        elif len(rows) != count:
            raise ValueError(
                f"conditions must have a row for each of {count} images, got {len(rows)} of "
                f"{name!r}"
            )


def derived_seed(*parts: object) -> int:
    """Return a seed for torch that differs, but for chance, wherever a part does."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63
