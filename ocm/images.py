"""Encoded images on disk, decoded as they are asked for.

The rows of a data set of Hugging Face's ``datasets`` lie in memory-mapped Arrow files: the bytes of
image files, or their paths. Nothing of them is held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Modes of PIL that hold 8 bits or fewer a channel; wider ones would be clipped to white.
_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
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
        if numbers:
            for place, value in enumerate(self.dataset[numbers][column]):
                pixels[place] = self._decoded(value, numbers[place])
        return pixels.reshape(*chosen.shape, *self.image_shape)

    def part(self, which: slice) -> ArrowImages:
        """Return some of the images, as they are: not decoded."""
        return replace(self, rows=self.rows[which])

    def _decoded(self, value: Mapping[str, Any], row: int) -> Tensor:
        import datasets
        import numpy as np
        from PIL import Image, ImageOps

        where = _where(value, row, self.name)
        try:
            image = datasets.Image().decode_example(value)
        except (OSError, ValueError, SyntaxError) as error:  # PIL has all three for broken files
            raise ValueError(f"{where} holds no image that PIL can read: {error}") from error
        channels, height, width = self.image_shape
        image = image.convert("L") if image.mode in _GREY_MODES else image
        image = image.convert("L" if channels == 1 else "RGB")
        if self.resize:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
        if image.size != (width, height):
            raise ValueError(
                f"image_size must be given for images of different sizes, got None: {where} has "
                f"{image.width}x{image.height} pixels, others {width}x{height}"
            )
        array = torch.from_numpy(np.array(image))
        return array.unsqueeze(0) if channels == 1 else array.permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Headers:
    """What the files of some images say before they are decoded.

    Attributes:
        channels: 1 for grey, 3 for colours: the most of any image.
        size: Width and height, as all images have them; None if they differ.
        difference: Two images that differ in size, in words, if there are.
    """

    channels: int
    size: tuple[int, int] | None
    difference: str


def headers(dataset: Any, rows: Tensor, name: str) -> Headers:
    """Read the beginnings of image files, which ``datasets`` keeps in its cache: once, not again.

    Args:
        dataset: A data set of one column, of encoded images.
        rows: Which rows of it.
        name: What they are, for errors and the progress bar.

    Raises:
        ValueError: That names the file or the row, if one holds no image, or more than 8 bits a
            channel.
    """
    order = rows.sort().values.tolist()  # as they lie on the disk
    table = dataset.select(order).map(
        _read_headers,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"name": name, "rows": order},
        desc=f"headers of the {name}",
    )
    found = {key: torch.tensor(table.data.column(key).to_numpy()) for key in table.column_names}
    other = (found["width"] != found["width"][0]) | (found["height"] != found["height"][0])
    size, difference = (int(found["width"][0]), int(found["height"][0])), ""
    if bool(other.any()):
        place = int(other.long().argmax())
        (value,) = dataset[order[place]].values()
        difference = (
            f"{_where(value, order[place], name)} has {found['width'][place]}x"
            f"{found['height'][place]} pixels, others {size[0]}x{size[1]}"
        )
    return Headers(int(found["channels"].max()), None if difference else size, difference)


def _read_headers(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int], *, name: str, rows: Sequence[int]
) -> dict[str, list[int]]:
    (values,) = batch.values()
    columns: dict[str, list[int]] = {"channels": [], "width": [], "height": []}
    for value, index in zip(values, indices, strict=True):
        header = _header(value, _where(value, rows[index], name))
        for column, number in zip(columns.values(), header, strict=True):
            column.append(number)
    return columns


def _header(value: Mapping[str, Any] | None, where: str) -> tuple[int, int, int]:
    """Return channels, width and height of an image."""
    import io

    from PIL import ExifTags, Image

    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError(f"{where} must hold an image, got none")
    file = value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
    try:
        with Image.open(file) as image:
            mode, (width, height) = image.mode, image.size
            # Elsewhere getexif would decode the image to look for what follows it.
            exif = image.getexif() if "exif" in image.info else {}
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where} holds no image that PIL can read: {error}") from error
    if mode not in (*_GREY_MODES, *_COLOUR_MODES):
        raise ValueError(f"{where} must have 8 bits a channel, got an image of PIL's mode {mode!r}")
    if exif.get(ExifTags.Base.Orientation) in _TURNED:
        width, height = height, width
    return 1 if mode in _GREY_MODES else 3, width, height


def _where(value: Mapping[str, Any] | None, row: int, name: str) -> str:
    path = None if value is None else value["path"]
    return f"row {row} of the {name}" + (f" ({path})" if path else "")
