"""Fashion-MNIST, and the training of a model and its head on it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cifar10.parts import as_json, say, write_json
from cifar10.training import ByteImages
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import ocm
from fashion.sizes import MODELS, NUM_TIMESTEPS, SEED, Size
from ocm import data as datasets
from ocm.covariances import OptimalCovarianceMatching
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import SCHEDULES
from ocm.evaluation.environment import Row, environment
from ocm.images import ArrowImages
from ocm.training.loop import mean_of_last
from ocm.training.small_unet import small_unet

# Of the data that are left in x_t, for targets of OCM's head.
_LEAST_ALPHA = 0.1


@dataclass(frozen=True, eq=False)
class Splits:
    """The images as bytes, and the classes of those to train on.

    Attributes:
        train: Training images.
        train_labels: Their classes.
        validation: The end of the training split: settings are chosen and variances fitted on it.
        test: Held-out images, for the tables alone.
        test_labels: Their classes.
    """

    train: ByteImages
    train_labels: Tensor
    validation: ByteImages
    test: ByteImages
    test_labels: Tensor


@lru_cache(maxsize=1)
def load_images(data: Path, size: Size) -> Splits:
    """Return Fashion-MNIST at the size's resolution.

    Raises:
        ValueError: If it is not in ``data``.
    """
    images = datasets.load(str(data), image_size=size.image_size)
    assert isinstance(images.train, ArrowImages)  # of parquet files
    assert isinstance(images.test, ArrowImages)
    assert images.train_labels is not None
    assert images.test_labels is not None
    train, test = (folded(part.pixels(slice(None))) for part in (images.train, images.test))
    shown = len(train) - size.num_validation
    return Splits(
        ByteImages(train[:shown]),
        images.train_labels[:shown],
        ByteImages(train[shown:]),
        ByteImages(test),
        images.test_labels,
    )


def folded(images: Tensor) -> Tensor:
    """Return images (n, 1, 2 h, 2 w) as (n, 4, h, w): 2x2 pixels are channels of one place.

    So the network's convolutions take a quarter of the time; moments and densities are the same.
    """
    return pixel_unshuffle(images, 2)


def unfolded(images: Tensor) -> Tensor:
    """Return the images that :func:`folded` took."""
    return pixel_shuffle(images, 2)


@dataclass(frozen=True)
class TrainedWithSignal(OptimalCovarianceMatching):
    """OCM's head trained at timesteps up to a last one, and used beyond it.

    Towards alpha = 0 the Jacobian of v or of a velocity is multiplied by up to 1 / alpha in the
    targets, and with it the network's errors, which then are all that the loss sees.

    Attributes:
        last: The last timestep of training.
    """

    last: int = NUM_TIMESTEPS

    def loss(self, x0: Tensor, t: Tensor, **options: Any) -> Tensor:
        """Return the loss at timesteps that are at most the last one."""
        return super().loss(x0, t.clamp(max=self.last), **options)


@dataclass(frozen=True, eq=False)
class Model:
    """A trained denoiser and OCM's covariance with its trained head."""

    denoiser: Denoiser
    ocm: OptimalCovarianceMatching


def train_model(path: str, work: Path, images: Splits, size: Size) -> tuple[Model, Row]:
    """Train the denoiser and the head of one path, or restore them from ``work``.

    Args:
        path: "flow" or "cosine".
        work: Directory of the states, from which an interrupted training goes on.
        images: What to train on.
        size: Everything else.

    Returns:
        The model; and settings, seconds (None for what an interrupted run began) and losses.
    """
    directory = work / path
    unet = small_unet((4, size.image_size // 2, size.image_size // 2), width=size.width, seed=SEED)
    some = images.train[:10_000]
    denoiser = Denoiser(
        unet,
        SCHEDULES[path](NUM_TIMESTEPS),
        MODELS[path],
        data_covariance=some.var(0),
    )
    units = ocm.Parameterisation(round(some.std().item(), 4), positive=True)
    head = ocm.make_head(denoiser, "residual", seed=SEED)
    alpha = denoiser.schedule.alpha(torch.arange(NUM_TIMESTEPS + 1))
    last = int((alpha >= _LEAST_ALPHA).nonzero().max())
    covariance = TrainedWithSignal(denoiser, head, units, last=last)
    record: Row = {
        "path": path,
        "prediction_type": MODELS[path],
        "data_std": units.data_std,
        "head_trained_up_to": last,
    }
    for name, train, what, settings in (
        ("denoiser", ocm.train_denoiser, denoiser, size.denoiser),
        ("head", ocm.train_head, covariance, size.head),
    ):
        file, states = directory / f"{name}.json", directory / name
        resumed, start = states.exists(), time.perf_counter()
        losses = train(what, images.train, settings, directory=states, progress=False)
        spent = time.perf_counter() - start
        if not file.exists():
            found = {
                "settings": as_json(asdict(settings)),
                "loss": mean_of_last(losses),
                "seconds": None if resumed else round(spent, 1),
                "environment": environment(torch.device("cpu")),
            }
            write_json(file, found)
            say(f"{path} {name}: loss {found['loss']:.4f} after {spent:.0f} s")
        record[name] = json.loads(file.read_text())
    record["parameters"] = {
        "denoiser": sum(p.numel() for p in unet.parameters()),
        "head": sum(p.numel() for p in head.parameters()),
    }
    return Model(denoiser, covariance), record
