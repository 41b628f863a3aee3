"""Images and tables of them that are damaged, hostile or odd: one clear error each, or they work.

Nothing here may reach for the network.
"""

import io
import json
import os
import struct
import time
import zlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from bad_input import Case, run, table
from no_network import no_network
from PIL import Image

from ocm import data
from ocm.images import arrow_images

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
ADDRESS = "http://127.0.0.1:9/x.png"


@pytest.fixture(autouse=True)
def alone():
    with no_network() as reached:
        yield
    assert not reached


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNGS = [encoded(Image.fromarray(pixels), "png") for pixels in PIXELS]
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6


def png_of(width, height, depth=8, rows=b""):
    """A PNG whose header may say anything."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    size = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


def pictures(folder, count=3):
    for index in range(count):
        (folder / f"{index}.png").write_bytes(PNGS[index])
    return folder


def load(folder, name="", **options):
    images = data.load(str(folder / name), cache_dir=folder.parent / "cache", **options)
    images.train[:], images.test[:]
    return images


def beside(make, **options):
    """Return a call that loads a folder of three images to which something is added."""

    def call(folder):
        make(pictures(folder))
        return load(folder, **options)

    return call


def among(name, make, *says, **options):
    return Case(name, beside(make, **options), ValueError, says)


def works(name, make, count=3, shape=(3, 4, 4), **options):
    def check(found):
        assert (len(found.train) + len(found.test), found.shape) == (count, shape)

    return Case(name, beside(make, **options), check=check)


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def instead(suffix, content):
    """Return what puts other contents in place of the images."""

    def make(folder):
        for place in sorted(folder.iterdir()):
            place.unlink()
            place.with_suffix(f".{suffix}").write_bytes(content)

    return make


def half(suffix):
    """Return what cuts every image short, whose header is whole."""
    content = encoded(NOISE, suffix)
    return instead(suffix, content[: len(content) // 2])


def saved(mode, suffix="png", **options):
    return lambda folder: (
        Image.fromarray(PIXELS[0]).convert(mode).save(folder / f"x.{suffix}", **options)
    )


def named(file_name):
    """Return what names the file of an image in a table beside the images."""
    lines = [{"file_name": name} for name in ("0.png", file_name, "1.png")]
    return lambda folder: (folder / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, lines)), encoding="utf-8"
    )


ROW = "row 3 of the train split of "
NO_IMAGE = "x.png) holds no image that PIL can read: "
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
FOLDERS = [
    among("text for an image", file("x.png", b"text"), ROW, NO_IMAGE, "of no known format"),
    among("an empty image", file("x.png", b""), ROW, NO_IMAGE),
    among("half a header", file("x.png", PNGS[0][:20]), ROW, NO_IMAGE),
    among("half a PNG", half("png"), "holds no image that PIL can read", image_size=4),
    among("half a JPEG", half("jpeg"), "holds no image that PIL can read", image_size=4),
    among(
        "a bomb",
        file("x.png", png_of(50_000, 50_000)),
        ROW,
        "x.png) is too large: Image size (2500000000 pixels) exceeds limit",
        "PIL.Image.MAX_IMAGE_PIXELS",
        image_size=4,
    ),
    among(
        "an image that is large enough for a warning",
        file("x.png", png_of(10_000, 10_000)),
        "x.png) is too large: Image size (100000000 pixels) exceeds limit",
        image_size=4,
    ),
    among(
        "a program for an image", file("x.eps", POSTSCRIPT), "x.eps) must not be PostScript, which"
    ),
    among("a program by another name", file("x.png", POSTSCRIPT), "x.png) must not be PostScript"),
    among(
        "16 bits of grey",
        file("x.png", encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "png")),
        "x.png) must have 8 bits a channel",
    ),
    among(
        "16 bits of colour",
        file("x.png", png_of(4, 4, 16, (b"\0" + b"\1\2" * 12) * 4)),
        "x.png) must have 8 bits a channel",
    ),
    among(
        "floating-point numbers",
        file("x.tiff", encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff")),
        "x.tiff) must have 8 bits a channel",
    ),
    among(
        "another size",
        file("x.png", encoded(Image.new("RGB", (5, 4)), "png")),
        "image_size must be given for images of different sizes",
        "5x4 pixels",
    ),
    among("a size of zero", pictures, "image_size must be at least 1, got 0", image_size=0),
    among("a huge size", pictures, "image_size must be at most 8192", image_size=10**9),
    among("no images asked for", pictures, "limit must be at least 1, got 0", limit=0),
    among("an unknown column", pictures, "image_column must be", image_column="photo"),
    *(
        among(f"a table that names {name}", named(path), "x.png")
        for name, path in (
            ("a file outside", "../x.png"),
            ("an absolute path", "/x.png"),
            ("an address", ADDRESS),
            ("a bucket", "s3://bucket/x.png"),
        )
    ),
    Case("no images", load, ValueError, ("cannot be read as imagefolder",)),
    Case(
        "only text",
        lambda folder: ((folder / "a.txt").write_text("a", encoding="utf-8"), load(folder)),
        ValueError,
        ("cannot be read as imagefolder",),
    ),
    Case(
        "one image",
        lambda folder: load(pictures(folder, 1)),
        ValueError,
        ("must have a test split, or two images or more to hold one out, got 1",),
    ),
    works("text beside the images", file("a.txt", b"text")),
    works("a pipe beside the images", lambda folder: os.mkfifo(folder / "x.png")),
    works("a folder in a circle", lambda folder: (folder / "loop").symlink_to(folder)),
    works(
        "a link to an image elsewhere",
        lambda folder: (
            (folder.parent / "x.png").write_bytes(PNGS[0]),
            (folder / "x.png").symlink_to(folder.parent / "x.png"),
        ),
        count=4,
    ),
    works(
        "a split behind a link",
        lambda folder: (
            folder.rename(folder.parent / "other"),
            folder.mkdir(),
            (folder / "train").symlink_to(folder.parent / "other"),
        ),
    ),
    works("names in other scripts", file("ünïcödé ☃ 图.png", PNGS[0]), count=4),
    works("images smaller than their size", lambda folder: None, image_size=9, shape=(3, 9, 9)),
    works("a limit beyond all", lambda folder: None, limit=10**30),
    works("transparency", saved("RGBA"), count=4),
    works("a palette", saved("P"), count=4),
    works("grey with transparency", saved("LA"), count=4),
    works("black and white", saved("1"), count=4),
    works("inks", saved("CMYK", "jpg"), count=4),
    works(
        "an animation",
        saved("P", "gif", save_all=True, append_images=[Image.new("P", (4, 4))]),
        count=4,
    ),
    works(
        "photographs on their side",
        instead("jpg", encoded(Image.new("RGB", (6, 4)), "jpeg", exif=ON_ITS_SIDE)),
        shape=(3, 6, 4),
    ),
]


@table(FOLDERS)
def test_a_folder_of_images(case, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    run(case, folder)


def rows(name, columns, *says, **options):
    """Return a case of a parquet file."""

    def call(folder):
        tables = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
        pyarrow.parquet.write_table(tables, folder / "x.parquet")
        return load(folder, "x.parquet", **options)

    return Case(name, call, ValueError, says)


def path_of(path):
    return {"image": [{"bytes": None, "path": path}] * 3}


def labels(name, values, *says):
    return rows(name, {"image": PNGS, "label": values}, "label", *says)


def described(columns, features):
    """A table with features as ``datasets`` writes them."""
    return pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


CLASSES = {
    "image": {"dtype": "binary", "_type": "Value"},
    "label": {"names": ["a", "b"], "_type": "ClassLabel"},
}
NOT_OPENED = "other paths and addresses are neither opened nor fetched"
TABLES = [
    rows("addresses", path_of(ADDRESS), "column 'image' in row 0 of the train split", NOT_OPENED),
    rows("buckets", path_of("s3://bucket/x.png"), "column 'image' in row 0", NOT_OPENED),
    rows("addresses in an archive", path_of(f"zip://x.png::{ADDRESS}"), "column 'im", NOT_OPENED),
    rows("files elsewhere", path_of("/etc/hostname"), "(/etc/hostname) must hold", NOT_OPENED),
    rows("files beside", path_of("x.png"), "(x.png) must hold the bytes", NOT_OPENED),
    rows("devices", path_of("/dev/zero"), "(/dev/zero) must hold the bytes", NOT_OPENED),
    rows(
        "an address among images",
        {"image": [{"bytes": PNGS[0], "path": None}] * 3 + [{"bytes": None, "path": ADDRESS}]},
        "column 'image' in row 3",
        NOT_OPENED,
    ),
    rows("addresses in words", {"image": [ADDRESS] * 3}, "must have one column of images", "image"),
    rows(
        "addresses that are declared images",
        described({"image": [ADDRESS] * 3}, {"image": {"_type": "Image"}}),
        "must have one column of images",
    ),
    rows("no rows", {"image": pyarrow.array([], pyarrow.binary())}, "cannot be read as parquet"),
    rows("no columns of images", {"x": [1, 2, 3]}, "must have one column of images", "columns x"),
    rows("nothing", {"image": pyarrow.array([None] * 3, pyarrow.binary())}, "must hold an image"),
    rows("nothing among images", {"image": [*PNGS, None]}, "row 3 of the", "must hold an image"),
    rows("no bytes", {"image": [b"", *PNGS]}, "row 0 of the", "holds no image that PIL can read"),
    rows("a program", {"image": [*PNGS, POSTSCRIPT]}, "row 3 of the", "must not be PostScript"),
    rows("a bomb", {"image": [*PNGS, png_of(50_000, 50_000)]}, "row 3 of the", "too large"),
    labels("negative classes", [-5, 1, 2], "from 0 on, or -1 for all, got -5 in 'label'"),
    labels("some classes hidden", [-1, 1, 2], "from 0 on, or -1 for all, got -1 in 'label'"),
    labels("endless classes", [10**12, 1, 2], "classes below 1000000, got 1000000000000"),
    labels("some classes missing", [None, 1, 2], "which misses 1 of"),
    labels(
        "classes beyond 64 bits",
        pyarrow.array([2**63 + 1, 1, 2], pyarrow.uint64()),
        "label_column must name integers, got 'label'",
    ),
    rows(
        "a class that has no name",
        described({"image": PNGS, "label": [0, 1, 7]}, CLASSES),
        "label_column must name classes below 2, got 7 in 'label'",
    ),
    rows(
        "classes in words",
        {"image": PNGS, "kind": ["a", "b", "c"]},
        "label_column must be a column of integers",
        label_column="kind",
    ),
    Case(
        "a file cut short",
        lambda folder: (
            rows("", {"image": PNGS}).call(folder),
            os.truncate(folder / "x.parquet", 200),
            load(folder, "x.parquet"),
        ),
        ValueError,
        ("x.parquet' cannot be read as parquet: ",),
    ),
    Case(
        "a pipe",
        lambda folder: (os.mkfifo(folder / "x.parquet"), load(folder, "x.parquet")),
        ValueError,
        ("data must be 'digits', an existing folder or .parquet file", "x.parquet"),
    ),
    Case(
        "a folder of a pipe",
        lambda folder: (os.mkfifo(folder / "x.parquet"), load(folder)),
        ValueError,
        ("cannot be read as parquet",),
    ),
    Case(
        "a folder by the name of a table",
        lambda folder: ((folder / "x.parquet").mkdir(), load(folder, "x.parquet")),
        ValueError,
        ("x.parquet' cannot be read as imagefolder",),
    ),
]


@table(TABLES)
def test_a_table_of_images(case, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    run(case, folder)


def test_an_image_whose_path_leaves_its_folder_is_not_opened(tmp_path):
    """Whatever the library that lists them lets through."""
    inside = tmp_path / "images"
    inside.mkdir()
    pictures(inside), pictures(tmp_path)
    encoded = datasets.Features({"image": datasets.Image(decode=False)})

    def decoded(path):
        values = {"image": [{"bytes": None, "path": str(path)}]}
        dataset = datasets.Dataset.from_dict(values, features=encoded)
        split = {"train": (dataset, torch.tensor([0]), "train split")}
        return arrow_images(split, None, [str(inside)])["train"].shape

    assert decoded(inside / "0.png") == (1, 3, 4, 4)
    for path in (inside / ".." / "0.png", tmp_path / "0.png", f"{inside}2/0.png"):
        with pytest.raises(ValueError, match="neither opened nor fetched"):
            decoded(path)
    os.mkfifo(inside / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png\) must be a regular file"):
        decoded(inside / "pipe.png")


def test_a_larger_image_is_read_where_pil_is_told_so(tmp_path, monkeypatch):
    pictures(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.raises(ValueError, match=r"Image size \(16 pixels\) exceeds limit of 15"):
        load(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    assert load(tmp_path).shape == (3, 4, 4)


@pytest.mark.parametrize("name", ["images/none", "images/0.png", "images/none.parquet"])
def test_a_path_that_does_not_exist_is_no_name_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    pictures(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data must be 'digits', an existing .* got '{name}'"):
        data.load(name, cache_dir=tmp_path / "cache")


def test_a_name_of_the_hub_without_a_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    refused = pytest.raises(ValueError, match="data 'no/one' is no folder, and cannot be loaded")
    with no_network() as reached, refused:
        data.load("no/one", cache_dir=tmp_path)
    assert reached


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    pictures(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=f"cannot be read as imagefolder: .*'{tmp_path}/file'"):
        data.load(str(tmp_path), cache_dir=tmp_path / "file")


def test_a_home_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert load(pictures(tmp_path)).shape == (3, 4, 4)
