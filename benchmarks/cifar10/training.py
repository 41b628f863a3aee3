"""CIFAR-10, and the training of a denoiser and its heads on it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ocm
from cifar10.backbone import attention_unet
from cifar10.parts import as_json, say, write_json
from cifar10.sizes import HEADS, NUM_TIMESTEPS, SEED, Size
from ocm import checkpoints
from ocm import data as datasets
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances.names import LEARNED
from ocm.data import Images
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import SCHEDULES
from ocm.evaluation.environment import Row, environment
from ocm.images import ArrowImages
from ocm.training.loop import mean_of_last
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet
from ocm.training.state import remove_states

_FILES = ("train.parquet", "test.parquet")


def check_data(data: Path) -> None:
    """Raise unless ``data`` holds CIFAR-10.

    Raises:
        ValueError: If it lacks train.parquet or test.parquet.
    """
    for file in _FILES:
        if not (data / file).exists():
            raise ValueError(
                f"data must be a directory with train.parquet and test.parquet of CIFAR-10, with "
                f"columns image (encoded images) and label, got {str(data)!r}, which has no "
                f"{file}; put them there, or name another directory with --data"
            )


def data_sizes(data: Path) -> dict[str, int]:
    """Return the bytes of the files of a data set, which tell it from another."""
    check_data(data)
    return {file: (data / file).stat().st_size for file in _FILES}


@lru_cache(maxsize=1)
def load_images(data: Path, size: Size) -> Images:
    """Return CIFAR-10 at the size's resolution, shuffled; the training split's end is validation.

    Raises:
        ValueError: As :func:`check_data`.
    """
    check_data(data)
    return datasets.load(str(data), image_size=size.image_size, limit=size.num_images)


def validation_images(images: Images, size: Size) -> Tensor:
    """Return the training images that nothing was trained on, float32 in [-1, 1]."""
    return images.train[len(images.train) - size.num_validation :]


@dataclass(frozen=True, eq=False)
class ByteImages:
    """Images in memory, on a device, as bytes: a quarter of the memory of float32.

    Indexing gives what the same index of a float32 tensor would: -1 + 2 pixels / 255.

    Attributes:
        pixels: Grey levels 0 .. 255, shape (n, C, H, W), uint8.
    """

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        return self.pixels[index].float() / 127.5 - 1.0

    @property
    def shape(self) -> torch.Size:
        """(n, C, H, W)."""
        return self.pixels.shape


def training_images(images: Images, size: Size, device: torch.device) -> ByteImages:
    """Return all training images but the validation images, as bytes on the device."""
    assert isinstance(images.train, ArrowImages)  # of parquet files
    shown = slice(len(images.train) - size.num_validation)
    return ByteImages(images.train.pixels(shown).to(device))


@dataclass(frozen=True, eq=False)
class ReportedImages:
    """Images that print a line each time so many batches of them were taken.

    Attributes:
        images: What is trained on.
        name: What the line says.
        every: Batches from a line to the next.
        taken: Batches so far, one number.
        start: When it was made, in seconds.
    """

    images: ByteImages
    name: str
    every: int
    taken: list[int] = field(default_factory=lambda: [0])
    start: float = field(default_factory=time.perf_counter)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return images as float32 in [-1, 1], where the bytes are."""
        if self.taken[0] and self.taken[0] % self.every == 0:
            say(
                f"{self.name}: {self.taken[0]} steps here, {time.perf_counter() - self.start:.0f} s"
            )
        # The first batch is not of a step: it tells this training from others.
        self.taken[0] += 1
        return self.images[indices]


def train_schedule(schedule: str, work: Path, data: Path, size: Size, device: torch.device) -> Row:
    """Train the denoiser and the heads of one schedule into ``work/<schedule>/checkpoint``.

    The denoiser's weights are rounded to half precision before the heads are trained, as they are
    stored: a checkpoint's files are at most 15 MB each.

    Args:
        schedule: "linear" or "cosine".
        work: Directory of the states, from which an interrupted training goes on.
        data: Directory of CIFAR-10.
        size: Everything else.
        device: Where to train.

    Returns:
        Settings, seconds (None for what an interrupted run began), losses and numbers of
        parameters.

    Raises:
        ValueError: If ``work`` holds a training of other settings, or ``data`` no CIFAR-10.
    """
    directory = work / schedule
    settings = as_json(
        {
            name: getattr(size, name)
            for name in (
                *("name", "image_size", "widths", "attention_sizes", "num_images"),
                *("num_validation", "denoiser", "heads", "head_kind", "target_probes"),
            )
        }
        | {"data": data_sizes(data)}
    )
    file = directory / "train.json"
    if file.exists():
        record: Row = json.loads(file.read_text())
        if record["settings"] != settings:
            raise ValueError(
                f"{file} is of other settings than those of the size {size.name}; remove "
                f"{directory}, or choose another --work"
            )
        say(f"{schedule}: trained already, in {directory}")
        return record
    images = load_images(data, size)
    shown = training_images(images, size, device)
    states = directory / "training"
    seconds: dict[str, float | None] = {}
    losses: dict[str, float] = {}

    def trained(
        name: str, train: Callable[..., list[float]], what: Any, loop: TrainingSettings
    ) -> None:
        resumed = (states / name).exists()
        start = time.perf_counter()
        source = ReportedImages(shown, f"{schedule} {name}", max(loop.num_steps // 5, 1))
        found = train(what, source, loop, directory=states / name, progress=False)
        spent, losses[name] = time.perf_counter() - start, mean_of_last(found)
        # What an interrupted run spent before is not known.
        seconds[name] = None if resumed else spent
        say(f"{schedule} {name}: loss {losses[name]:.4f} after {spent:.0f} s")

    denoiser = Denoiser(_unet(size, images.shape).to(device), SCHEDULES[schedule](NUM_TIMESTEPS))
    trained("denoiser", ocm.train_denoiser, denoiser, size.denoiser)
    with torch.no_grad():
        for parameter in denoiser.backbone.parameters():
            parameter.copy_(parameter.half())
    learned = {}
    for name in HEADS:
        learned[name] = untrained(name, denoiser, size)
        trained(name, ocm.train_head, learned[name], size.heads)
    checkpoint = Checkpoint(
        denoiser,
        images.shape,
        images.levels,
        "cifar10",
        learned,
        num_calibration=size.num_validation,
    )
    record = {
        "schedule": schedule,
        "settings": settings,
        "parameters": {
            "denoiser": _num_parameters(denoiser.backbone),
            "head": _num_parameters(learned["ocm"].head),
        },
        "seconds": seconds,
        "losses": losses,
        "environment": environment(device),
    }
    _save_checkpoint(checkpoint, directory / "checkpoint")
    write_json(file, record)
    for name in ("denoiser", *HEADS):
        remove_states(states / name)
    return record


def untrained(name: str, denoiser: Denoiser, size: Size) -> Any:
    """Return a learned covariance with an untrained head, of the settings chosen."""
    options = {"num_probes": size.target_probes} if name == "ocm" else {}
    head = ocm.make_head(denoiser, size.head_kind, seed=SEED)
    return LEARNED[name](denoiser, head, ocm.PAPER, **options)


def _unet(size: Size, shape: tuple[int, int, int]) -> Any:
    if len(size.widths) == 1:
        return small_unet(shape, width=size.widths[0], seed=SEED)
    return attention_unet(
        shape, widths=size.widths, attention_sizes=size.attention_sizes, seed=SEED
    )


def _save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint under another name first, so that it is never found half written."""
    partial_one = directory.with_suffix(".partial")
    for path in (partial_one, directory):
        if path.exists():
            shutil.rmtree(path)
    checkpoints.save(checkpoint, partial_one, dtype=torch.float16)
    os.rename(partial_one, directory)


def _num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
