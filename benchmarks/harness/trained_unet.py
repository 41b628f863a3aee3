"""A U-Net trained on real images, for suites that need the Jacobian of a true denoiser.

CIFAR-10 at 16x16 where a copy of it is at hand (parquet files with a column of images), else
scikit-learn's digits. Training takes about a quarter of an hour on two cores and is cached; the
name of the cache states the data and the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ocm import Denoiser, cosine
from ocm.data import digits
from ocm.training.objectives import train_denoiser
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet

SIZE = 16
_NUM_TRAIN, _NUM_TEST = 10_000, 64
_NUM_STEPS = 3000
_NUM_QUICK_STEPS = 30


@dataclass(frozen=True, eq=False)
class TrainedUNet:
    """A trained denoiser and the images it has not seen.

    Attributes:
        denoiser: Frozen, in eval mode.
        train_images: What it was trained on.
        test_images: Held-out ones, in [-1, 1], shape (n, C, H, W).
        description: Data and training, for the record.
    """

    denoiser: Denoiser
    train_images: Tensor
    test_images: Tensor
    description: str


def trained_unet(data: Path, cache: Path, device: torch.device, *, quick: bool) -> TrainedUNet:
    """Train the U-Net, or load it from the cache.

    Args:
        data: Directory with train.parquet and test.parquet of CIFAR-10; digits if there is none.
        cache: Directory of the cache.
        device: Where to train it and leave it.
        quick: A hundredth of the steps, unless the cache holds the full number.
    """
    if (data / "train.parquet").exists():
        name = f"cifar10-{SIZE}x{SIZE}"
        train = cifar10_images(data / "train.parquet", _NUM_TRAIN)
        test = cifar10_images(data / "test.parquet", _NUM_TEST)
    else:
        print(f"no train.parquet in {data}: the U-Net is trained on digits")
        name, images = "digits", digits()
        train, test = images.train, images.test[:_NUM_TEST]
    denoiser = Denoiser(small_unet(tuple(train.shape[1:])), cosine())

    def cached(num_steps: int) -> Path:
        return cache / f"unet-{name}-cosine-{num_steps}-steps.safetensors"

    short = quick and not cached(_NUM_STEPS).exists()
    settings = TrainingSettings(num_steps=_NUM_QUICK_STEPS if short else _NUM_STEPS)
    file = cached(settings.num_steps)
    if file.exists():
        denoiser.backbone.load_state_dict(load_file(file))
    else:
        denoiser.backbone.to(device)
        train_denoiser(denoiser, train, settings, progress=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(denoiser.backbone.state_dict(), file)
    denoiser.backbone.to(device)
    description = (
        f"{name}, {len(train)} images, cosine schedule, {settings.num_steps} steps of "
        f"{settings.batch_size} images"
    )
    return TrainedUNet(denoiser.freeze(), train, test, description)


def cifar10_images(file: Path, count: int, first: int = 0) -> Tensor:
    """Return images spread over the file, which is sorted by class, at 16x16 by 2x2 means.

    Args:
        file: Parquet file with a column of images.
        count: Number of images.
        first: The first of them; other ones are other images where it is below their distance.
    """
    from datasets import Image, disable_progress_bars, load_dataset

    disable_progress_bars()

    rows = load_dataset("parquet", data_files=str(file), split="train")
    rows = rows.select(range(first, len(rows), len(rows) // count)).cast_column("image", Image())
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
    return torch.nn.functional.avg_pool2d(images[:count], images.shape[-1] // SIZE)
