"""Labelled images, in [-1, 1] on a grid of grey levels, with a held-out split.

Everything but the bundled digits is read by Hugging Face's ``datasets``: folders of images, parquet
files, and data sets of the Hub.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int
from ocm.images import ArrowImages, Headers, headers

_DIGITS_SIZE = 8
_MAX_HELD_OUT = 10_000
# A split without "train" in its name that may serve as the held-out one, best first.
_TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True, eq=False)
class Images:
    """A data set.

    Attributes:
        name: What it is called on the command line.
        train: Training images in [-1, 1], shape (n, C, H, W), float32: a tensor for the digits,
            and :class:`ocm.images.ArrowImages`, which decodes what is indexed, for all else.
        test: Held-out images.
        levels: Number of grey levels; they lie at -1 + 2 k / (levels - 1).
        train_labels: Classes 0 .. num_classes - 1 of the training images, shape (n,), int64, or
            None where there are none.
        test_labels: Classes of the held-out images, or None.
        num_classes: Number of classes, or None without labels.
        options: Arguments of :func:`load`, but for ``image_size``, that give the same again.
    """

    name: str
    train: Tensor | ArrowImages
    test: Tensor | ArrowImages
    levels: int
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    num_classes: int | None = None
    options: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def first(self, count: int) -> Images:
        """Return the same with the first ``count`` training images only.

        Example:
            >>> len(digits().first(100).train_labels)
            100
        """
        labels = None if self.train_labels is None else self.train_labels[:count]
        return replace(self, train=_first(self.train, count), train_labels=labels)


def digits() -> Images:
    """Load scikit-learn's handwritten digits: 1,797 real 8x8 images of 17 grey levels.

    They come with the package (from the UCI repository, Alpaydin and Kaynak, 1998). A fixed
    permutation holds out 297 images.

    Example:
        >>> digits().test.shape
        torch.Size([297, 1, 8, 8])
        >>> digits().test_labels[:5]
        tensor([6, 5, 5, 7, 9])
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().unsqueeze(1) / 8.0 - 1.0
    labels = torch.from_numpy(bundle.target).long()
    order = _order(len(images))
    train, test = order[297:], order[:297]
    return Images(
        "digits",
        train=images[train],
        test=images[test],
        levels=17,
        train_labels=labels[train],
        test_labels=labels[test],
        num_classes=10,
    )


def load(
    name: str,
    *,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Images:
    """Load a data set: the digits, a folder of images, parquet, or a data set of the Hub.

    Args:
        name: One of

            - ``"digits"``: :func:`digits`;
            - a folder of images, as the ``imagefolder`` of ``datasets`` reads it: folders of
              classes or none, below ``train`` and ``test`` if there are such;
            - a ``.parquet`` file, or a folder of them: those with ``train`` and ``test`` in their
              names are these splits;
            - ``"owner/name"`` of a data set on the Hugging Face Hub, which is downloaded if it is
              not in the cache.
        image_size: Crop images to their central square and scale that to this size by PIL's box
            filter, which averages areas. None leaves them as they are.
        image_column: Column of the images; by default ``image`` or ``img``, or the only column
            that holds images.
        label_column: Column of integer labels; by default ``label`` or ``labels``, or the only
            column of classes, or none.
        limit: At most this many images of each split, after shuffling.
        cache_dir: Where ``datasets`` keeps its files; by default its own cache.
        progress: Whether to show progress bars.

    Both splits are shuffled by a fixed permutation, since files are often sorted by class. Where
    there is no test (nor validation) split, a tenth of the images, at most 10,000, is held out.
    All but the digits have 256 grey levels and stay on the disk. Images are grey if all are, else
    all are RGB; transparency is dropped. Which they are, and of which size, is read from the
    beginnings of all files, once: ``datasets`` keeps it in its cache.

    Raises:
        ValueError: If there is no such data set, it cannot be read, it has no images or no column
            of that name, or its images differ in size and ``image_size`` is None.

    Example:
        >>> load("digits").levels
        17
    """
    if image_size is not None:
        check_positive_int("image_size", image_size)
    if limit is not None:
        check_positive_int("limit", limit)
    if name == "digits":
        return _load_digits(image_size, image_column, label_column, limit)
    with _progress_bars(progress):
        splits = _read(name, cache_dir)
        return _images(name, splits, image_size, image_column, label_column, limit)


def _images(
    name: str,
    splits: dict[str, Any],
    image_size: int | None,
    image_column: str | None,
    label_column: str | None,
    limit: int | None,
) -> Images:
    import datasets

    features = splits["train"].features
    images_from = _image_column(name, features, image_column)
    labels_from = _label_column(name, features, label_column)
    rows = {split: _order(len(dataset)) for split, dataset in splits.items()}
    if "test" not in splits:
        splits, rows = _hold_out(name, splits["train"], rows["train"])
    rows = {split: chosen[:limit] for split, chosen in rows.items()}
    what = {split: f"{split} split of {name}" for split in rows}
    encoded = {
        split: dataset.select_columns(images_from).cast_column(
            images_from, datasets.Image(decode=False)
        )
        for split, dataset in splits.items()
    }
    found = {split: headers(encoded[split], rows[split], what[split]) for split in rows}
    channels = max(header.channels for header in found.values())
    height, width = _size(name, found, image_size)
    images = {
        split: ArrowImages(
            encoded[split],
            rows[split],
            (channels, height, width),
            resize=image_size is not None,
            name=what[split],
        )
        for split in rows
    }
    labels = {
        split: _labels(what[split], splits[split], labels_from, rows[split]) for split in rows
    }
    given = {"image_column": image_column, "label_column": label_column, "limit": limit}
    return Images(
        name,
        train=images["train"],
        test=images["test"],
        levels=256,
        train_labels=labels["train"],
        test_labels=labels["test"],
        num_classes=_num_classes(splits["train"], labels_from, labels),
        options={option: value for option, value in given.items() if value is not None},
    )


def _size(name: str, found: Mapping[str, Headers], image_size: int | None) -> tuple[int, int]:
    """Return height and width, of which all images are or to which they are resized."""
    if image_size is not None:
        return image_size, image_size
    for header in found.values():
        if header.size is None:
            raise ValueError(
                f"image_size must be given for images of different sizes, got None: "
                f"{header.difference}"
            )
    train, test = found["train"].size, found["test"].size
    assert train is not None
    assert test is not None
    if train != test:
        raise ValueError(
            f"image_size must be given for data {name!r}: its training images are "
            f"{train[0]}x{train[1]}, its test images {test[0]}x{test[1]} pixels"
        )
    return train[1], train[0]


def _load_digits(
    image_size: int | None, image_column: str | None, label_column: str | None, limit: int | None
) -> Images:
    if image_size not in (None, _DIGITS_SIZE):
        raise ValueError(
            f"image_size must be {_DIGITS_SIZE} or None for data 'digits', got {image_size}"
        )
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None:
            raise ValueError(f"{argument} must be None for data 'digits', got {column!r}")
    images = digits()
    if limit is None:
        return images
    part = images.first(limit)
    assert part.test_labels is not None
    return replace(
        part,
        test=_first(part.test, limit),
        test_labels=part.test_labels[:limit],
        options={"limit": limit},
    )


def _first(images: Tensor | ArrowImages, count: int) -> Tensor | ArrowImages:
    which = slice(count)
    return images.part(which) if isinstance(images, ArrowImages) else images[which]


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _hold_out(name: str, dataset: Any, order: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if len(order) < 2:
        raise ValueError(
            f"data {name!r} must have a test split, or two images or more to hold one out, got "
            f"{len(order)}"
        )
    count = min(max(len(order) // 10, 1), _MAX_HELD_OUT)
    return (
        {"train": dataset, "test": dataset},
        {"train": order[count:], "test": order[:count]},
    )


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Show or hide the bars of ``datasets``, whose switch is one for the whole process."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()


def _read(name: str, cache_dir: str | Path | None) -> dict[str, Any]:
    """Return the splits of a data set, as data sets of ``datasets``: train, and test if any."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(name).expanduser()
    if path.exists():
        source = _local_source(name, path)
        kind = {"parquet": "parquet", "imagefolder": "a folder of images"}[source["path"]]
        origin = f"data {name!r} cannot be read as {kind}"
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and path.suffix != ".parquet":
        source = {"path": name}
        origin = (
            f"data {name!r} is no file or folder, and cannot be loaded from the Hugging Face Hub"
        )
    else:
        raise ValueError(
            "data must be 'digits', an existing folder or .parquet file, or 'owner/name' of a data "
            f"set on the Hugging Face Hub, got {name!r}"
        )
    try:
        found = datasets.load_dataset(
            **source, cache_dir=None if cache_dir is None else str(cache_dir)
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{origin}: {_reason(error)}") from error
    return _choose_splits(name, dict(found))


def _reason(error: BaseException) -> str:
    """Return the first line of what lies at the root: ``datasets`` wraps errors in vaguer ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def _local_source(name: str, path: Path) -> dict[str, Any]:
    """Return the arguments of ``load_dataset`` for a file or folder."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"data must be a folder or a .parquet file, got the file {name!r}")
        return {"path": "parquet", "data_files": {"train": str(path)}}
    if any(path.glob("*.parquet")):
        # By their names: train*, test* and so on.
        return {"path": "parquet", "data_dir": str(path)}
    return _image_folder(path)


def _image_folder(path: Path) -> dict[str, Any]:
    """Return the arguments of ``load_dataset`` for a folder of images.

    Its splits are named here: ``imagefolder`` itself would list all files once for each name that
    a split may have.
    """
    test = next((split for split in _TEST_SPLITS if (path / split).is_dir()), None)
    folders = {"train": path}
    if (path / "train").is_dir():
        folders = {"train": path / "train"} | ({} if test is None else {"test": path / test})
    # Else the names of the splits would be taken for classes.
    unlabelled = not any(entry.is_dir() for entry in folders["train"].iterdir())
    return {
        "path": "imagefolder",
        "data_files": {
            split: f"{glob.escape(str(folder.resolve()))}/**" for split, folder in folders.items()
        },
        "drop_labels": True if unlabelled else None,
    }


def _choose_splits(name: str, found: dict[str, Any]) -> dict[str, Any]:
    if len(found) == 1:
        splits = {"train": next(iter(found.values()))}
    elif "train" in found:
        test = next((found[split] for split in _TEST_SPLITS if split in found), None)
        splits = {"train": found["train"]} | ({} if test is None else {"test": test})
    else:
        raise ValueError(f"data {name!r} must have a split 'train', got {', '.join(found)}")
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"data {name!r} must have images, got none in its {split} split")
    return splits


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) == "binary"


def _image_column(name: str, features: dict[str, Any], wanted: str | None) -> str:
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if wanted is not None:
        if wanted not in found:
            raise ValueError(
                f"image_column must be a column of images of data {name!r} "
                f"({', '.join(found) or 'it has none'}), got {wanted!r}"
            )
        return wanted
    if not found:
        raise ValueError(
            f"data {name!r} must have a column of images (encoded, as bytes or "
            f"{{bytes, path}}), got the columns {', '.join(features)}"
        )
    preferred = ["image", "img"] + (found if len(found) == 1 else [])
    for column in preferred:
        if column in found:
            return column
    raise ValueError(
        f"image_column must be given for data {name!r}, one of {', '.join(found)}, got None"
    )


def _label_column(name: str, features: dict[str, Any], wanted: str | None) -> str | None:
    import datasets

    found = [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
        or str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))
    ]
    if wanted is not None:
        if wanted not in found:
            raise ValueError(
                f"label_column must be a column of integers of data {name!r} "
                f"({', '.join(found) or 'it has none'}), got {wanted!r}"
            )
        return wanted
    classes = [column for column in found if isinstance(features[column], datasets.ClassLabel)]
    preferred = ["label", "labels"] + (classes if len(classes) == 1 else [])
    return next((column for column in preferred if column in found), None)


def _labels(what: str, dataset: Any, column: str | None, rows: Tensor) -> Tensor | None:
    if column is None:
        return None
    values = dataset.data.column(column)
    if values.null_count == len(values):
        return None
    known = torch.tensor(values.is_valid().to_numpy())[rows]
    if not bool(known.all()):
        raise ValueError(
            f"label_column must name integers, got {column!r}, which misses "
            f"{int((~known).sum())} of {len(known)} labels in the {what}"
        )
    labels = torch.tensor(values.cast("int64").fill_null(-1).to_numpy())[rows]
    # The Hub marks test labels that are kept secret by -1.
    return None if bool((labels < 0).any()) else labels


def _num_classes(dataset: Any, column: str | None, labels: dict[str, Tensor | None]) -> int | None:
    known = [int(values.max()) for values in labels.values() if values is not None]
    if column is None or not known:
        return None
    named = getattr(dataset.features[column], "num_classes", None)
    return max(known) + 1 if named is None else int(named)
