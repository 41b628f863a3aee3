"""The images and the denoisers that heads are compared on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cifar10.parts import as_json, say, write_json
from cifar10.training import ByteImages
from fashion.training import folded
from torch import Tensor

import ocm
from heads.sizes import NUM_TIMESTEPS, SEED, DataSize
from ocm import data as datasets
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import SCHEDULES
from ocm.evaluation.environment import Row, environment
from ocm.images import ArrowImages
from ocm.training.loop import mean_of_last
from ocm.training.small_unet import small_unet

# Images that tell the variance of the data.
_TELLING = 10_000


@dataclass(frozen=True, eq=False)
class Splits:
    """Images in [-1, 1], folded where the data set's are.

    Attributes:
        train: What is trained on.
        validation: The end of the training split, which nothing is trained on.
        test: Held-out images, for the tables alone.
        levels: Number of grey levels.
    """

    train: ByteImages | Tensor
    validation: ByteImages | Tensor
    test: ByteImages | Tensor
    levels: int


def load_images(name: str, data: Path, size: DataSize) -> Splits:
    """Return the images of a data set; digits come with scikit-learn.

    Raises:
        ValueError: If the data set is not in ``data``.
    """
    kept = size.num_validation
    if name == "digits":
        images = datasets.digits()
        return Splits(images.train[:-kept], images.train[-kept:], images.test, images.levels)
    images = datasets.load(str(data), image_size=size.image_size)
    assert isinstance(images.train, ArrowImages)  # of parquet files
    assert isinstance(images.test, ArrowImages)
    train, test = (part.pixels(slice(None)) for part in (images.train, images.test))
    if size.folded:
        train, test = folded(train), folded(test)
    parts = (train[:-kept], train[-kept:], test)
    return Splits(*(ByteImages(part) for part in parts), images.levels)


def train_denoiser(
    name: str, path: str, work: Path, images: Splits, size: DataSize
) -> tuple[Denoiser, Row]:
    """Train the denoiser of one path, or restore it from ``work``.

    Args:
        name: The data set.
        path: A key of the size's paths.
        work: Directory of the states, from which an interrupted training goes on.
        images: What to train on.
        size: Everything else.

    Returns:
        The denoiser; and settings, seconds (None for what an interrupted run began) and loss.
    """
    directory = work / name / path
    some = images.train[:_TELLING]
    unet = small_unet(tuple(some.shape[1:]), width=size.width, seed=SEED)
    denoiser = Denoiser(
        unet, SCHEDULES[path](NUM_TIMESTEPS), size.paths[path], data_covariance=some.var(0)
    )
    file, states = directory / "denoiser.json", directory / "denoiser"
    resumed, start = states.exists(), time.perf_counter()
    losses = ocm.train_denoiser(
        denoiser, images.train, size.denoiser, directory=states, progress=False
    )
    spent = time.perf_counter() - start
    if not file.exists():
        found = {
            "data": name,
            "path": path,
            "prediction_type": size.paths[path],
            "parameters": sum(parameter.numel() for parameter in unet.parameters()),
            "settings": as_json(asdict(size.denoiser)),
            "loss": mean_of_last(losses),
            "seconds": None if resumed else round(spent, 1),
            "environment": environment(torch.device("cpu")),
        }
        write_json(file, found)
        say(f"{name} {path} denoiser: loss {found['loss']:.4f} after {spent:.0f} s")
    record: Row = json.loads(file.read_text())
    return denoiser.freeze(), record
