"""Encoded images on disk, decoded as they are asked for.

The rows of a data set of Hugging Face's ``datasets`` lie in memory-mapped Arrow files: the bytes of
image files, or their paths. Nothing of them is held in memory. A path is opened only if it is that
of a regular file below folders that were asked for: a table of others could have any file read, or
any address fetched.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_SIDE = 8192
"""Pixels of the longest side that an image may be scaled to."""

_GREY_MODES = ("1", "L", "LA")
# Orientations of EXIF that swap width and height.
_TURNED = (5, 6, 7, 8)


@dataclass(frozen=True, eq=False)
class ArrowImages:
    """Images that are decoded when they are indexed, by integers, slices or tensors of indices.

    Attributes:
        dataset: A data set of one column, of encoded images.
        rows: Which rows of it are the images, in which order, int64 of shape (n,).
        image_shape: (C, H, W) of an image: 1 channel for grey images, 3 for RGB.
        resize: Whether images are cropped and scaled to H = W, or must be of that size.
        name: What they are, for errors.
    """

    dataset: Any
    rows: Tensor
    image_shape: tuple[int, int, int]
    resize: bool
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """(n, C, H, W)."""
        return torch.Size((len(self.rows), *self.image_shape))

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Return -1 + 2 pixels / 255, float32 of the shape a tensor's index would have."""
        return self.pixels(index).float() / 127.5 - 1.0

    def pixels(self, index: int | slice | Tensor) -> Tensor:
        """Return grey levels 0 .. 255, uint8.

        Raises:
            ValueError: That names the file or the row, if an image cannot be read.
        """
        chosen = self.rows[index]
        numbers = chosen.reshape(-1).tolist()
        (column,) = self.dataset.column_names
        pixels = torch.empty((len(numbers), *self.image_shape), dtype=torch.uint8)
        for place, value in enumerate(self.dataset[numbers][column]):
            pixels[place] = self._decoded(value, numbers[place])
        return pixels.reshape(*chosen.shape, *self.image_shape)

    def _decoded(self, value: Mapping[str, Any], row: int) -> Tensor:
        import datasets
        import numpy as np
        from PIL import Image, ImageOps

        channels, height, width = self.image_shape
        where = _where(value, row, self.name)
        try:
            image = datasets.Image(mode="L" if channels == 1 else "RGB").decode_example(value)
        # PIL has all of these for broken files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{where} holds no image that PIL can read: {error}") from error
        if self.resize:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
        if image.size != (width, height):
            raise ValueError(_different(where, image.size, (width, height)))
        return torch.from_numpy(np.array(image)).reshape(height, width, channels).movedim(2, 0)


def arrow_images(
    splits: Mapping[str, tuple[Any, Tensor, str]],
    image_size: int | None,
    folders: Sequence[str] = (),
) -> dict[str, ArrowImages]:
    """Return the images of some splits, of the shape that the beginnings of their files tell.

    A split is a data set of one column, of encoded images; the rows to take; and its name. What was
    read from the files stays in the cache of ``datasets``: once, not again. Images that are files
    must lie below one of ``folders``.
    """
    channels, size = 1, None
    for dataset, rows, name in splits.values():
        order = rows.sort().values.tolist()  # as they lie on the disk
        (column,) = dataset.column_names
        table = dataset.select(order).map(
            _read_headers,
            batched=True,
            with_indices=True,
            input_columns=dataset.column_names,
            remove_columns=dataset.column_names,
            fn_kwargs={"name": name, "rows": order, "column": column, "folders": list(folders)},
            desc=f"headers of the {name}",
        )
        numbers = table.data.column("header").combine_chunks().flatten()
        found = torch.tensor(numbers.to_numpy()).view(-1, 3)
        channels = max(channels, int(found[:, 0].max()))
        size = found[0, 1:] if size is None else size
        differs = (found[:, 1:] != size).any(dim=1)
        if image_size is None and bool(differs.any()):
            place = int(differs.long().argmax())
            (value,) = dataset[order[place]].values()
            where = _where(value, order[place], name)
            raise ValueError(_different(where, found[place, 1:].tolist(), size.tolist()))
    assert size is not None
    width, height = size.tolist() if image_size is None else (image_size, image_size)
    shape, resize = (channels, height, width), image_size is not None
    return {
        split: ArrowImages(dataset, rows, shape, resize, name)
        for split, (dataset, rows, name) in splits.items()
    }


def _read_headers(
    values: Sequence[Any],
    indices: Sequence[int],
    *,
    name: str,
    rows: Sequence[int],
    column: str,
    folders: Sequence[str],
) -> dict[str, list[tuple[int, int, int]]]:
    return {
        "header": [
            _header(value, _where(value, rows[i], name), column, folders)
            for value, i in zip(values, indices, strict=True)
        ]
    }


def _header(
    value: Mapping[str, Any] | None, where: str, column: str, folders: Sequence[str]
) -> tuple[int, int, int]:
    """Return channels, width and height of an image."""
    from PIL import ExifTags, Image, UnidentifiedImageError

    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError(f"{where} must hold an image, got none")
    file: str | io.BytesIO
    if value["bytes"] is None:
        file = _file_of(value["path"], f"column {column!r} in {where}", folders)
    else:
        file = io.BytesIO(value["bytes"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                mode, (width, height) = image.mode, image.size
                encoding, raw = image.format, str(getattr(image, "tile", ""))
                # Elsewhere getexif would decode the image to look for what follows it.
                exif = image.getexif() if "exif" in image.info else {}
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where} is too large: {error} It is read where PIL.Image.MAX_IMAGE_PIXELS is set to "
            "more"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        # The text of PIL's error is of an object in memory.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where} holds no image that PIL can read: {reason}") from error
    if encoding == "EPS":
        raise ValueError(f"{where} must not be PostScript, which is a program to be run")
    # Integers and floating-point numbers would be clipped to white, or cut to their upper 8 bits.
    if mode[0] in "IF" or ";16" in raw:
        raise ValueError(f"{where} must have 8 bits a channel, got an image of PIL's mode {mode!r}")
    if exif.get(ExifTags.Base.Orientation) in _TURNED:
        width, height = height, width
    return 1 if mode in _GREY_MODES else 3, width, height


def _file_of(path: str, where: str, folders: Sequence[str]) -> str:
    """Return the path of an image, if it may be opened."""
    place = os.path.normpath(path)
    if not any(place.startswith(os.path.join(folder, "")) for folder in folders):
        raise ValueError(
            f"{where} must hold the bytes of an image, or its path in the folder asked for: other "
            "paths and addresses are neither opened nor fetched"
        )
    if not os.path.isfile(place):
        raise ValueError(f"{where} must be a regular file")
    return place


def _where(value: Mapping[str, Any] | None, row: int, name: str) -> str:
    path = None if value is None else value["path"]
    return f"row {row} of the {name}" + (f" ({path})" if path else "")


def _different(where: str, size: Sequence[int], other: Sequence[int]) -> str:
    return (
        f"image_size must be given for images of different sizes, got None: {where} has "
        f"{size[0]}x{size[1]} pixels, others {other[0]}x{other[1]}"
    )
