"""Labelled images, in [-1, 1] on a grid of grey levels, with a held-out split.

Everything but the bundled digits is read by Hugging Face's ``datasets``: folders of images, parquet
files, and data sets of the Hub.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int
from ocm.images import LARGEST_SIDE, ArrowImages, arrow_images

_MAX_HELD_OUT = 10_000
_MOST_CLASSES = 1_000_000
_TEXT_TYPES = ("string", "large_string")
# A split without "train" in its name that may serve as the held-out one, best first.
_TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor, in another order, without a copy of it: it may be memory-mapped.

    Example:
        >>> Rows(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0]))[torch.tensor([1, 0])]
        tensor([1., 4.])
    """

    tensor: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.tensor[self.rows[index]]


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
        train_captions: Texts of the training images, or None.
        train_conditions: What a network is told of the training images, by the names of its
            arguments: the embeddings of their texts.
        null_conditions: What it is told without a text, of shape (1, ...).
    """

    name: str
    train: Tensor | ArrowImages
    test: Tensor | ArrowImages
    levels: int
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    num_classes: int | None = None
    options: Mapping[str, str | int] = field(default_factory=dict)
    train_captions: tuple[str, ...] | None = None
    train_conditions: Mapping[str, Rows] = field(default_factory=dict)
    null_conditions: Mapping[str, Tensor] = field(default_factory=dict)

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
        train = self.train
        if isinstance(train, ArrowImages):
            train = replace(train, rows=train.rows[:count])
        else:
            train = train[:count]
        conditions = self.train_conditions.items()
        return replace(
            self,
            train=train,
            train_labels=None if self.train_labels is None else self.train_labels[:count],
            train_captions=None if self.train_captions is None else self.train_captions[:count],
            train_conditions={k: replace(own, rows=own.rows[:count]) for k, own in conditions},
        )


def digits(limit: int | None = None) -> Images:
    """Load scikit-learn's handwritten digits: 1,797 real 8x8 images of 17 grey levels.

    They come with the package (from the UCI repository, Alpaydin and Kaynak, 1998). A fixed
    permutation holds out 297 images. ``limit`` is the most of either split, if it is given.

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
    train, test = order[297:][:limit], order[:297][:limit]
    return Images(
        "digits",
        train=images[train],
        test=images[test],
        levels=17,
        train_labels=labels[train],
        test_labels=labels[test],
        num_classes=10,
        options={} if limit is None else {"limit": limit},
    )


def load(
    name: str,
    *,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
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
        image_size: Crop images to their central square and scale that to this size, at most 8192,
            by PIL's box filter, which averages areas, and repeats the pixels of smaller images.
            None leaves them as they are.
        image_column: Column of the images; by default ``image`` or ``img``, or the only column
            that holds images.
        label_column: Column of integer labels; by default ``label`` or ``labels``, or the only
            column of classes, or none.
        caption_column: Column of texts, of ``metadata.jsonl`` in a folder of images say; by default
            none is read.
        limit: At most this many images of each split, after shuffling.
        cache_dir: Where ``datasets`` keeps its files; by default its own cache.
        progress: Whether to show progress bars.

    Both splits are shuffled by a fixed permutation, since files are often sorted by class. Where
    there is no test (nor validation) split, a tenth of the images, at most 10,000, is held out.
    All but the digits have 256 grey levels and stay on the disk. Images are grey if all are, else
    all are RGB; transparency is dropped. Which they are, and of which size, is read from the
    beginnings of all files, once: ``datasets`` keeps it in its cache. Of an animation the first
    frame is taken. Images with more than 8 bits a channel, or more pixels than
    ``PIL.Image.MAX_IMAGE_PIXELS``, are refused. Nothing is fetched but a data set of the Hub, and a
    path in a table is not opened.

    Raises:
        ValueError: If there is no such data set, it cannot be read, it has no images or no column
            of that name, its images differ in size and ``image_size`` is None, or one of them or
            of the labels is refused.

    Example:
        >>> load("digits").levels
        17
    """
    if image_size is not None:
        check_positive_int("image_size", image_size)
        if image_size > LARGEST_SIDE:
            raise ValueError(f"image_size must be at most {LARGEST_SIDE}, got {image_size}")
    if limit is not None:
        check_positive_int("limit", limit)
    if name == "digits":
        if image_size not in (None, 8) or {image_column, label_column, caption_column} != {None}:
            raise ValueError(
                "data 'digits' must be given without columns, and with no image_size but 8, got "
                f"image_column {image_column!r}, label_column {label_column!r}, caption_column "
                f"{caption_column!r}, image_size {image_size}"
            )
        return digits(limit)
    import datasets

    with _progress_bars(progress):
        splits, folders = _read(name, cache_dir)
        features = splits["train"].features
        images_from = _image_column(name, features, image_column)
        labels_from = _label_column(name, features, label_column)
        texts = [c for c, f in features.items() if getattr(f, "dtype", None) in _TEXT_TYPES]
        rule = f"caption_column must be a column of texts of data {name!r}"
        captions_from = caption_column and _column(rule, caption_column, texts, [], [])
        rows = {split: _order(len(dataset)) for split, dataset in splits.items()}
        if "test" not in splits:
            if len(rows["train"]) < 2:
                raise ValueError(
                    f"data {name!r} must have a test split, or two images or more to hold one out, "
                    f"got {len(rows['train'])}"
                )
            count = min(max(len(rows["train"]) // 10, 1), _MAX_HELD_OUT)
            splits["test"] = splits["train"]
            rows = {"train": rows["train"][count:], "test": rows["train"][:count]}
        encoded = datasets.Image(decode=False)
        images = arrow_images(
            {
                split: (
                    dataset.select_columns(images_from).cast_column(images_from, encoded),
                    rows[split][:limit],
                    f"{split} split of {name}",
                )
                for split, dataset in splits.items()
            },
            image_size,
            folders,
        )
    labels = {split: _labels(splits[split], labels_from, images[split]) for split in images}
    known = [int(values.max()) + 1 for values in labels.values() if values is not None]
    most = getattr(features.get(labels_from), "num_classes", _MOST_CLASSES)
    if known and max(known) > most:
        raise ValueError(
            f"label_column must name classes below {most}, got {max(known) - 1} in {labels_from!r}"
        )
    given = {
        "image_column": image_column,
        "label_column": label_column,
        "caption_column": caption_column,
        "limit": limit,
    }
    return Images(
        name,
        train=images["train"],
        test=images["test"],
        levels=256,
        train_labels=labels["train"],
        test_labels=labels["test"],
        num_classes=getattr(features[labels_from], "num_classes", max(known)) if known else None,
        options={option: value for option, value in given.items() if value is not None},
        train_captions=_captions(splits["train"], captions_from, images["train"]),
    )


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


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


def _read(name: str, cache_dir: str | Path | None) -> tuple[dict[str, Any], list[str]]:
    """Return the splits of a data set, and the folders that images may be read from.

    The splits are data sets of ``datasets``: train, and test if any.
    """
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = os.path.abspath(cache_dir or datasets.config.HF_DATASETS_CACHE)
    path = Path(name).expanduser()
    source: dict[str, Any]
    if path.is_dir():
        # Tables are splits by their names: train*, test* and so on.
        tables = any(path.glob("*.parquet"))
        source = {"path": "parquet", "data_dir": str(path)} if tables else _image_folder(path)
        # Splits may be links; archives in a folder of images are unpacked in the cache.
        images = (path, *(path / split for split in ("train", *_TEST_SPLITS)))
        unpacked = os.path.join(cache, "downloads", "extracted")
        folders = [] if tables else [*(str(folder.resolve()) for folder in images), unpacked]
        origin = f"data {name!r} cannot be read as {source['path']}"
    elif path.is_file() and path.suffix == ".parquet":
        source, folders = {"path": "parquet", "data_files": {"train": str(path)}}, []
        origin = f"data {name!r} cannot be read as parquet"
    elif _is_name_of_hub(name, path):
        source, folders = {"path": name}, [cache, os.path.abspath(HF_HUB_CACHE)]
        origin = f"data {name!r} is no folder, and cannot be loaded from the Hugging Face Hub"
    else:
        raise ValueError(
            "data must be 'digits', an existing folder or .parquet file, or 'owner/name' of a data "
            f"set on the Hugging Face Hub, with no folder 'owner' here, got {name!r}"
        )
    try:
        with _uncounted():
            found = datasets.load_dataset(**source, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{origin}: {_reason(error)}") from error
    return _choose_splits(name, dict(found)), folders


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep ``datasets`` from telling a server that its loaders are used, on local files too."""
    from datasets import config

    counted, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _is_name_of_hub(name: str, path: Path) -> bool:
    """Return whether a name is "owner/name" and not rather a path that does not exist."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
    return is_name and path.suffix != ".parquet" and not (path.exists() or path.parent.is_dir())


def _reason(error: BaseException) -> str:
    """Return the first line of what lies at the root: ``datasets`` wraps errors in vaguer ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def _image_folder(path: Path) -> dict[str, Any]:
    """Name the splits, for each of whose possible names ``imagefolder`` would list all files."""
    splits = [split for split in ("train", *_TEST_SPLITS) if (path / split).is_dir()][:2]
    folders = {split: path / split for split in splits} if "train" in splits else {"train": path}
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
    rule = f"image_column must be a column of images of data {name!r}"
    column = _column(rule, wanted, found, ["image", "img"], found)
    if column is None:
        raise ValueError(
            f"data {name!r} must have one column of images (encoded, as bytes or {{bytes, path}}), "
            f"or image_column must be given, one of {', '.join(found) or 'none'}; got the columns "
            f"{', '.join(features)}"
        )
    return column


def _label_column(name: str, features: dict[str, Any], wanted: str | None) -> str | None:
    import datasets

    kinds = ("int", "uint", "bool")
    found = [c for c, f in features.items() if str(getattr(f, "dtype", "")).startswith(kinds)]
    classes = [c for c in found if isinstance(features[c], datasets.ClassLabel)]
    rule = f"label_column must be a column of integers of data {name!r}"
    return _column(rule, wanted, found, ["label", "labels"], classes)


def _column(
    rule: str, wanted: str | None, found: list[str], usual: list[str], single: list[str]
) -> str | None:
    """Return the column that is wanted, one of a usual name, or a single one, if there is."""
    if wanted is None:
        preferred = usual + (single if len(single) == 1 else [])
        return next((column for column in preferred if column in found), None)
    if wanted not in found:
        raise ValueError(f"{rule} ({', '.join(found) or 'it has none'}), got {wanted!r}")
    return wanted


def _captions(dataset: Any, column: str | None, images: ArrowImages) -> tuple[str, ...] | None:
    if column is None:
        return None
    values = dataset.data.column(column).take(images.rows.numpy())
    if values.null_count:
        raise ValueError(
            f"caption_column must name a text of each image, got {column!r}, which misses "
            f"{values.null_count} of {len(images)} in the {images.name}"
        )
    return tuple(values.to_pylist())


def _labels(dataset: Any, column: str | None, images: ArrowImages) -> Tensor | None:
    if column is None:
        return None
    try:
        values = dataset.data.column(column).cast("int64")
    except ValueError as error:  # of 64 bits without a sign
        raise ValueError(f"label_column must name integers, got {column!r}: {error}") from error
    if values.null_count == len(values):
        return None
    missing = int(torch.tensor(values.is_null().to_numpy())[images.rows].sum())
    if missing:
        raise ValueError(
            f"label_column must name integers, got {column!r}, which misses {missing} of "
            f"{len(images)} labels in the {images.name}"
        )
    labels = torch.tensor(values.fill_null(-1).to_numpy())[images.rows]
    # The Hub marks test labels that are kept secret by -1.
    if bool((labels == -1).all()):
        return None
    if bool((labels < 0).any()):
        raise ValueError(
            f"label_column must name classes from 0 on, or -1 for all, got {int(labels.min())} in "
            f"{column!r} of the {images.name}"
        )
    return labels
