"""Images are read as PIL reads them, whatever they come in, and odd ones end in a clear error."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

from ocm import data

CIFAR = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(
    not CIFAR.is_dir(), reason="needs CIFAR-10 as parquet in ../shared/data/cifar10"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def random_pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save_images(folder, pixels, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.{suffix}")


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, pixels, **columns):
    rows = [{"bytes": png(image), "path": None} for image in pixels]
    columns = {"image": rows} | columns
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def as_bytes(images):
    return ((images[:] + 1) * 127.5).round().to(torch.uint8)


def by_content(images, labels):
    """Order-free: the bytes of every image with its label."""
    return sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(as_bytes(images), labels, strict=True)
    )


def test_digits_are_those_of_scikit_learn():
    images = data.load("digits")
    bundle = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).numpy()
    for pixels, labels, rows in (
        (images.test, images.test_labels, order[:297]),
        (images.train, images.train_labels, order[297:]),
    ):
        expected = (bundle.images[rows] / 8 - 1).astype(np.float32)[:, None]
        assert isinstance(pixels, torch.Tensor)
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(labels, bundle.target[rows])
    assert (images.name, images.levels, images.num_classes) == ("digits", 17, 10)
    assert images.shape == (1, 8, 8)


def test_digits_up_to_a_limit():
    whole, part = data.load("digits"), data.load("digits", limit=7, image_size=8)
    assert torch.equal(part.train, whole.train[:7])
    assert torch.equal(part.test_labels, whole.test_labels[:7])


def test_folder_with_splits_and_classes(tmp_path, cache):
    pixels = random_pixels(14, 6, 5, 3)
    save_images(tmp_path / "train" / "cats", pixels[:5])
    save_images(tmp_path / "train" / "dogs", pixels[5:10])
    save_images(tmp_path / "test" / "cats", pixels[10:11])
    save_images(tmp_path / "test" / "dogs", pixels[11:])
    images = data.load(str(tmp_path), cache_dir=cache)
    assert (images.shape, images.levels, images.num_classes) == ((3, 6, 5), 256, 2)
    assert images.name == str(tmp_path)
    channels_first = pixels.transpose(0, 3, 1, 2)
    for got, labels, expected, classes in (
        (images.train, images.train_labels, channels_first[:10], [0] * 5 + [1] * 5),
        (images.test, images.test_labels, channels_first[10:], [0] + [1] * 3),
    ):
        assert labels.dtype == torch.int64
        assert by_content(got, labels) == sorted(
            (image.tobytes(), label) for image, label in zip(expected, classes, strict=True)
        )


def test_without_a_test_split_a_tenth_is_held_out_and_always_the_same(tmp_path, cache):
    pixels = random_pixels(30, 4, 4)
    save_images(tmp_path, pixels)
    images, again = (data.load(str(tmp_path), cache_dir=cache) for _ in range(2))
    assert (len(images.train), len(images.test), images.shape) == (27, 3, (1, 4, 4))
    assert images.train_labels is None
    assert images.test_labels is None
    assert images.num_classes is None
    both = torch.cat([as_bytes(images.train), as_bytes(images.test)]).numpy()
    assert sorted(map(bytes, both)) == sorted(map(bytes, pixels))
    assert torch.equal(images.train[:], again.train[:])
    assert torch.equal(images.test[:], again.test[:])


def test_images_sorted_by_class_are_shuffled(tmp_path, cache):
    labels = [0] * 30 + [1] * 30
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-00000.parquet", random_pixels(60, 2, 2), label=labels)
    images = data.load(str(tmp_path), cache_dir=cache)
    for shuffled in (images.train_labels, images.test_labels):
        assert sorted(shuffled.tolist()) == labels
        assert 5 < shuffled[:30].sum() < 25
    assert images.num_classes == 2


def test_a_limit_takes_the_first_of_the_shuffled(tmp_path, cache):
    file = tmp_path / "all.parquet"
    write_parquet(file, random_pixels(40, 2, 2), label=list(range(40)))
    whole, part = (data.load(str(file), cache_dir=cache, limit=limit) for limit in (None, 3))
    assert torch.equal(part.train_labels, whole.train_labels[:3])
    assert torch.equal(part.train[:], whole.train[:3])
    assert torch.equal(part.test[:], whole.test[:3])


def test_resizing_crops_the_centre_and_averages_areas(tmp_path, cache):
    pixels = random_pixels(4, 12, 8, 3)
    save_images(tmp_path, pixels)
    images = data.load(str(tmp_path), image_size=4, cache_dir=cache)
    assert images.shape == (3, 4, 4)
    square = torch.from_numpy(pixels[:, 2:10]).permute(0, 3, 1, 2).double()
    expected = functional.avg_pool2d(square, 2)
    got = torch.cat([as_bytes(images.train), as_bytes(images.test)]).double()
    distances = (got.unsqueeze(1) - expected).abs().amax(dim=(2, 3, 4))
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3]
    assert distances.amin(1).max() <= 1.0  # rounded to bytes twice, after rows and columns


def test_images_of_different_sizes_need_an_image_size(tmp_path, cache):
    save_images(tmp_path / "a", random_pixels(3, 4, 6))
    save_images(tmp_path / "b", random_pixels(3, 4, 4))
    with pytest.raises(ValueError, match=r"image_size must be given .*(6x4 .*4x4|4x4 .*6x4)"):
        data.load(str(tmp_path), cache_dir=cache)
    assert data.load(str(tmp_path), image_size=4, cache_dir=cache).shape == (1, 4, 4)


def test_splits_of_different_sizes_need_an_image_size(tmp_path, cache):
    write_parquet(tmp_path / "train.parquet", random_pixels(2, 4, 6))
    write_parquet(tmp_path / "test.parquet", random_pixels(2, 4, 4))
    with pytest.raises(
        ValueError, match=r"image_size .* row \d of the test split .* 4x4 pixels, others 6x4"
    ):
        data.load(str(tmp_path), cache_dir=cache)


@pytest.mark.parametrize("grey_split", ["train", "test", "both"])
def test_grey_images_among_colours_become_rgb(tmp_path, cache, grey_split):
    grey, colour = random_pixels(3, 4, 4), random_pixels(3, 4, 4, 3)
    splits = {split: grey if split == grey_split else colour for split in ("train", "test")}
    if grey_split == "both":
        splits["train"] = [*grey, *colour]
    for split, pixels in splits.items():
        write_parquet(tmp_path / f"{split}.parquet", pixels, label=[0] * len(pixels))
    images = data.load(str(tmp_path), cache_dir=cache)
    assert images.shape == (3, 4, 4)
    for split, got in (("train", images.train), ("test", images.test)):
        as_colour = [np.broadcast_to(p.reshape(4, 4, -1), (4, 4, 3)) for p in splits[split]]
        expected = sorted((p.transpose(2, 0, 1).tobytes(), 0) for p in as_colour)
        assert by_content(got, torch.zeros(len(got))) == expected


def test_wide_pixels_are_refused(tmp_path, cache):
    save_images(tmp_path, random_pixels(2, 4, 4).astype(np.uint16) * 256)
    message = r"row \d of the .* \(.*/[01]\.png\) must have 8 bits a channel, .* 'I;16'"
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path), cache_dir=cache)


def test_folders_without_labels(tmp_path, cache):
    pixels = random_pixels(7, 4, 4)
    save_images(tmp_path / "train", pixels[:5])
    save_images(tmp_path / "test", pixels[5:])
    images = data.load(str(tmp_path), cache_dir=cache)
    assert (images.train_labels, images.test_labels, images.num_classes) == (None, None, None)
    for got, expected in ((images.train, pixels[:5]), (images.test, pixels[5:])):
        assert sorted(map(bytes, as_bytes(got).numpy())) == sorted(map(bytes, expected))


def test_a_folder_with_a_name_of_patterns(tmp_path, cache):
    save_images(tmp_path / "a[b]*?", random_pixels(4, 2, 2))
    images = data.load(str(tmp_path / "a[b]*?"), cache_dir=cache)
    assert (len(images.train), len(images.test)) == (3, 1)


def test_a_column_of_labels_without_any_is_none(tmp_path, cache):
    labels = pyarrow.array([None, None, None], pyarrow.int64())
    write_parquet(tmp_path / "a.parquet", random_pixels(3, 2, 2), label=labels)
    images = data.load(str(tmp_path / "a.parquet"), cache_dir=cache)
    assert (images.train_labels, images.num_classes) == (None, None)


def test_images_are_decoded_when_they_are_indexed(tmp_path, cache):
    save_images(tmp_path, random_pixels(20, 8, 8, 3))
    images = data.load(str(tmp_path), cache_dir=cache)
    whole = images.train[:]
    for index in (3, -1, slice(2, 9, 3), torch.tensor([5, 0, 0]), torch.tensor([[1], [2]])):
        assert torch.equal(images.train[index], whole[index])
    assert images.train[:0].shape == (0, 3, 8, 8)
    part = images.first(7)
    assert torch.equal(part.train[:], whole[:7])
    assert torch.equal(part.test[:], images.test[:])
    # A file that is cut short has its header still.
    row = int(images.train.rows[4])
    file = Path(images.train.dataset[row]["image"]["path"])
    file.write_bytes(file.read_bytes()[:60])
    assert torch.equal(images.train[:4], whole[:4])
    message = rf"row {row} of the train split .* \({file}\) holds no image that PIL can read"
    with pytest.raises(ValueError, match=message):
        images.train[4:6]


def test_an_image_that_changed_its_size_is_named(tmp_path, cache):
    save_images(tmp_path, random_pixels(10, 8, 8))
    images = data.load(str(tmp_path), cache_dir=cache)
    file = images.train.dataset[int(images.train.rows[0])]["image"]["path"]
    Image.fromarray(random_pixels(1, 8, 4)[0]).save(file)
    with pytest.raises(ValueError, match=rf"{file}\) has 4x8 pixels, others 8x8"):
        images.train[0]


def test_bytes_lie_on_the_grid_of_levels(tmp_path, cache):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    save_images(tmp_path, np.repeat(every, 2, axis=0))
    image = data.load(str(tmp_path), cache_dir=cache).train[0]
    assert image.min() == -1
    assert image.max() == 1
    levels = (image.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
    assert len(levels.round().unique()) == 256


def test_turned_photographs_stand_upright(tmp_path, cache):
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(3):
        Image.fromarray(random_pixels(1, 4, 6)[0]).save(tmp_path / f"{index}.jpg", exif=exif)
    images = data.load(str(tmp_path), cache_dir=cache)
    assert images.train[:].shape == (2, 1, 6, 4)


def test_headers_are_read_once(tmp_path, cache, monkeypatch):
    from ocm import images as encoded

    save_images(tmp_path, random_pixels(10, 4, 4))
    read, real = [], encoded._header
    monkeypatch.setattr(encoded, "_header", lambda *a: read.append(a) or real(*a))
    shapes = [data.load(str(tmp_path), cache_dir=cache).shape for _ in range(2)]
    assert shapes == [(1, 4, 4)] * 2
    assert len(read) == 10


def test_progress_is_shown_while_headers_are_read(tmp_path, cache, capsys):
    save_images(tmp_path, random_pixels(10, 4, 4))
    data.load(str(tmp_path), cache_dir=cache, progress=True)
    assert f"headers of the train split of {tmp_path}" in capsys.readouterr().err
    save_images(tmp_path, random_pixels(11, 4, 4))
    data.load(str(tmp_path), cache_dir=cache)
    assert capsys.readouterr().err == ""


def test_workers_read_encoded_images(tmp_path, cache):
    from torch.utils.data import DataLoader

    save_images(tmp_path, random_pixels(20, 4, 4))
    images = data.load(str(tmp_path), cache_dir=cache).train
    places = [torch.tensor([2, 5]), torch.tensor([17, 0])]
    loader = DataLoader(images, batch_size=None, sampler=places, num_workers=1)
    for got, place in zip(loader, places, strict=True):
        assert torch.equal(got, images[place])


def test_options_give_the_same_again(tmp_path, cache):
    write_parquet(tmp_path / "a.parquet", random_pixels(30, 2, 2), kind=list(range(30)))
    name = str(tmp_path / "a.parquet")
    images = data.load(name, label_column="kind", limit=9, cache_dir=cache)
    assert images.options == {"label_column": "kind", "limit": 9}
    again = data.load(name, cache_dir=cache, **images.options)
    assert torch.equal(again.train[:], images.train[:])
    assert torch.equal(again.test_labels, images.test_labels)
    assert data.load("digits", limit=5).options == {"limit": 5}


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({}, {"image_column": "photo"}, r"image_column .* \(image\), got 'photo'"),
        ({"x": [1.0, 2.0]}, {"label_column": "x"}, r"label_column .* \(it has none\), got 'x'"),
        ({"label": [0, None]}, {}, "'label', which misses 1 of 1 labels in the t"),
        ({"image": [1, 2]}, {}, r"must have one column of images .* the columns image"),
        (
            {"image": [b"no image"] * 2},
            {},
            r"row \d of the train split .* holds no image that PIL can read",
        ),
        (
            {"image": pyarrow.array([None, None], pyarrow.binary())},
            {},
            r"row \d of the train split .* must hold an image, got none",
        ),
        ({}, {"limit": 0}, "limit must be at least 1, got 0"),
        ({}, {"image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_odd_tables(tmp_path, cache, columns, arguments, message):
    file = tmp_path / "odd.parquet"
    write_parquet(file, random_pixels(2, 4, 4), **columns)
    with pytest.raises(ValueError, match=message):
        data.load(str(file), cache_dir=cache, **arguments)


def test_columns_by_name(tmp_path, cache):
    first, second = random_pixels(6, 2, 2), random_pixels(6, 3, 3)
    file = tmp_path / "two.parquet"
    columns = {"small": [png(p) for p in first], "large": [png(p) for p in second]}
    pyarrow.parquet.write_table(pyarrow.table(columns | {"kind": list(range(6))}), file)
    with pytest.raises(ValueError, match=r"image_column must be given, one of small, large"):
        data.load(str(file), cache_dir=cache)
    images = data.load(str(file), image_column="large", label_column="kind", cache_dir=cache)
    for image, label in zip(as_bytes(images.train), images.train_labels, strict=True):
        np.testing.assert_array_equal(image[0], second[label])


def test_hidden_labels_are_none(tmp_path, cache):
    write_parquet(tmp_path / "train.parquet", random_pixels(3, 2, 2), label=[0, 1, 2])
    write_parquet(tmp_path / "test.parquet", random_pixels(3, 2, 2), label=[-1, -1, -1])
    images = data.load(str(tmp_path), cache_dir=cache)
    assert sorted(images.train_labels.tolist()) == [0, 1, 2]
    assert images.test_labels is None
    assert images.num_classes == 3


def test_one_image_cannot_be_split(tmp_path, cache):
    save_images(tmp_path, random_pixels(1, 2, 2))
    with pytest.raises(ValueError, match=r"two images or more to hold one out, got 1"):
        data.load(str(tmp_path), cache_dir=cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "cannot be read as imagefolder"),
        (lambda path: None, "data must be 'digits', an existing folder"),
        (lambda path: path.write_text("text"), "data must be 'digits', an existing folder"),
    ],
)
def test_what_is_no_data_set(tmp_path, cache, make, message):
    path = tmp_path / "data"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(str(path), cache_dir=cache)
    assert "\n" not in str(caught.value)


def test_tables_of_a_folder_are_splits_by_their_names(tmp_path, cache):
    pixels = random_pixels(6, 2, 2)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pixels[:2])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pixels[2:4])
    write_parquet(tmp_path / "validation.parquet", pixels[4:])
    images = data.load(str(tmp_path), cache_dir=cache)
    for got, expected in ((images.train, pixels[:4]), (images.test, pixels[4:])):
        assert sorted(map(bytes, as_bytes(got).numpy())) == sorted(map(bytes, expected))
    (tmp_path / "other").mkdir()
    write_parquet(tmp_path / "other" / "all.parquet", pixels)
    images = data.load(str(tmp_path / "other"), cache_dir=cache)
    assert (len(images.train), len(images.test)) == (5, 1)


def test_a_damaged_file(tmp_path, cache):
    file = tmp_path / "damaged.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"damaged\.parquet' cannot be read as parquet") as caught:
        data.load(str(file), cache_dir=cache)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub(tmp_path, cache, monkeypatch):
    """The Hub is played by a folder; the name, splits and columns are those of a data set there."""
    import datasets

    for split, labels in (("train", [0, 1, 2, 3]), ("validation", [3, 2])):
        rows = [png(p) for p in random_pixels(len(labels), 2, 2)]
        table = pyarrow.table({"img": rows, "fine_label": labels})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list("abcde"))}
    )
    real, asked = datasets.load_dataset, []

    def load_dataset(path, **arguments):
        asked.append(path)
        return real(str(tmp_path), features=features, **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    images = data.load("someone/pictures", cache_dir=cache)
    assert asked == ["someone/pictures"]
    assert (images.name, images.num_classes) == ("someone/pictures", 5)
    assert sorted(images.train_labels.tolist()) == [0, 1, 2, 3]
    assert sorted(images.test_labels.tolist()) == [2, 3]


def test_the_hub_out_of_reach_is_one_line(cache, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'no/such' is no folder, and cannot") as caught:
        data.load("no/such", cache_dir=cache)
    assert "\n" not in str(caught.value)


def test_the_progress_bars_of_datasets_are_left_as_they_were(tmp_path, cache):
    import datasets

    save_images(tmp_path, random_pixels(2, 2, 2))
    before = datasets.are_progress_bars_disabled()
    data.load(str(tmp_path), cache_dir=cache, progress=before)
    assert datasets.are_progress_bars_disabled() == before


@needs_cifar
def test_cifar_10_is_decoded_as_pil_does(cache):
    images = data.load(str(CIFAR), limit=40, cache_dir=cache)
    assert (images.shape, images.num_classes, images.levels) == ((3, 32, 32), 10, 256)
    table = pyarrow.parquet.read_table(CIFAR / "test.parquet")
    rows = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:40].tolist()
    for index, row in enumerate(rows):
        decoded = Image.open(io.BytesIO(table["image"][row]["bytes"].as_py()))
        np.testing.assert_array_equal(
            as_bytes(images.test)[index], np.asarray(decoded).transpose(2, 0, 1)
        )
        assert images.test_labels[index] == table["label"][row].as_py()
    assert len(images.train_labels.unique()) > 5


@needs_cifar
def test_cifar_10_small_and_from_one_file(cache):
    images = data.load(str(CIFAR / "test.parquet"), image_size=8, limit=30, cache_dir=cache)
    assert images.shape == (3, 8, 8)
    assert (len(images.train), len(images.test)) == (30, 30)
    assert not torch.equal(images.train[:], images.test[:])


# Captions


def test_captions_stay_with_their_images(tmp_path, cache):
    """Of a folder with metadata, and of a table, whatever the order and the limit."""
    pixels = random_pixels(30, 2, 2)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}) for i in range(30)]
    save_images(tmp_path / "folder" / "train", pixels)
    (tmp_path / "folder" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    write_parquet(tmp_path / "a.parquet", pixels, text=[f"image {i}" for i in range(30)])
    for name in ("folder", "a.parquet"):
        source, options = str(tmp_path / name), {"cache_dir": cache, "limit": 20}
        images = data.load(source, caption_column="text", **options)
        assert len(images.train_captions) == len(images.train) == 20
        for image, caption in zip(as_bytes(images.train), images.train_captions, strict=True):
            index = int(caption.removeprefix("image "))
            assert torch.equal(image[0], torch.from_numpy(pixels[index]))
        assert images.first(3).train_captions == images.train_captions[:3]
        assert images.options == {"caption_column": "text", "limit": 20}
        assert data.load(source, **options).train_captions is None


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [
        (["a", "b", None, "c"], "text", r"which misses 1 of \d in the train split"),
        ([1, 2, 3, 4], "text", r"a column of texts of data .* \(it has none\), got 'text'"),
        (["a", "b", "c", "d"], "txt", r"\(text\), got 'txt'"),
    ],
)
def test_columns_that_are_no_captions(tmp_path, cache, texts, column, message):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", random_pixels(4, 2, 2), text=texts)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path), caption_column=column, cache_dir=cache)


def test_the_first_images_keep_their_conditions():
    digits = data.digits(5)
    rows = data.Rows(torch.arange(9.0), torch.tensor([8, 1, 3, 0, 2]))
    kept = replace(digits, train_conditions={"text": rows}).first(2).train_conditions["text"]
    assert len(kept) == 2
    assert kept[torch.tensor([1, 0])].tolist() == [1, 8]
