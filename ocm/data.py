"""Images, in [-1, 1] on a grid of grey levels, with a held-out split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory.

    Attributes:
        name: What it is called on the command line.
        train: Training images in [-1, 1], shape (n, C, H, W), float32.
        test: Held-out images.
        levels: Number of grey levels; they lie at -1 + 2 k / (levels - 1).
    """

    name: str
    train: Tensor
    test: Tensor
    levels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def digits() -> Images:
    """Load scikit-learn's handwritten digits: 1,797 real 8x8 images of 17 grey levels.

    They come with the package (from the UCI repository, Alpaydin and Kaynak, 1998). A fixed
    permutation holds out 297 images.

    Example:
        >>> digits().test.shape
        torch.Size([297, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8.0 - 1.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Images("digits", train=images[order[297:]], test=images[order[:297]], levels=17)


DATASETS = {"digits": digits}


def load(name: str) -> Images:
    """Load a data set by name.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> load("digits").levels
        17
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]()
