"""The classifier learns digits, gives the same weights every time, and survives a round trip."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ocm import data
from ocm.evaluation import classifier as classifiers
from ocm.evaluation.classifier import accuracy, train_classifier
from ocm.evaluation.distances import frechet_distance
from ocm.evaluation.features import classifier_features


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return train_classifier(digits.train, digits.train_labels, 10, num_steps=300)


@pytest.fixture
def saved(trained, tmp_path):
    classifiers.save(trained, tmp_path)
    return tmp_path


def test_digits_are_told_apart(trained, digits):
    predicted = trained(digits.test).argmax(1)
    expected = sum(int(p == t) for p, t in zip(predicted, digits.test_labels, strict=True)) / 297
    assert accuracy(trained, digits.test, digits.test_labels) == expected
    assert expected > 0.95


def test_wrong_labels_are_not_learned(digits):
    """So that the test above can fail: the labels matter."""
    shuffled = digits.train_labels[torch.randperm(1500, generator=torch.Generator().manual_seed(1))]
    classifier = train_classifier(digits.train, shuffled, 10, num_steps=60)
    assert accuracy(classifier, digits.test, digits.test_labels) < 0.4


def test_features_feed_the_output_and_see_a_difference(trained, digits):
    extractor = classifier_features(trained)
    assert "64 features" in extractor.name
    assert "seed 0" in extractor.name
    features = extractor(digits.test)
    logits = features @ trained.output.weight.T + trained.output.bias
    torch.testing.assert_close(logits, trained(digits.test))
    half = extractor(digits.train[:297])
    near = frechet_distance(half, features)
    far = frechet_distance(half, extractor(digits.test.roll(2, dims=3)))
    assert far > 5 * near


def test_the_seed_fixes_the_weights(digits):
    images, labels = digits.train[:50], digits.train_labels[:50]

    def weights(seed):
        classifier = train_classifier(
            images, labels, 10, seed=seed, num_steps=3, batch_size=16, num_features=12
        )
        return torch.cat([p.flatten() for p in classifier.parameters()])

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights(5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, weights(5))
    assert not torch.equal(first, weights(6))


def test_colour_images():
    labels = torch.arange(40) % 3
    pixels = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    pixels[torch.arange(40), labels] = 200
    images = pixels.float() / 127.5 - 1
    classifier = train_classifier(images, labels, 3, num_steps=15, num_features=10)
    assert accuracy(classifier, images, labels) == 1.0
    assert classifier.features(images[:2]).shape == (2, 10)


def test_images_on_the_disk(tmp_path):
    """Three shades of grey, a folder each."""
    for index in range(30):
        folder = tmp_path / "images" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 + 100 * (index % 3)).save(folder / f"{index}.png")
    images = data.load(str(tmp_path / "images"), cache_dir=tmp_path / "cache")
    classifier = train_classifier(images.train, images.train_labels, 3, num_steps=20)
    assert accuracy(classifier, images.test, images.test_labels) == 1.0
    extractor = classifier_features(classifier)
    assert torch.equal(extractor(images.train), classifier.features(images.train[:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": torch.zeros(4)},
            r"labels must be int64 in 0 \.\. 2, .* got torch.float32",
        ),
        (
            {"labels": torch.zeros(3).long()},
            r"one for each of 4 .*\[0, 0, 0\]",
        ),
        (
            {"labels": torch.tensor([0, 1, 2, 3])},
            r"must be int64 in 0 \.\. 2, .*2, 3\]",
        ),
        ({"labels": torch.tensor([0, 1, 2, -1])}, r"labels must be int64 in 0 \.\. 2, .* -1\]"),
        ({"images": torch.zeros(4, 8, 8)}, r"images must have shape \(n, C, H, W\)"),
        ({"images": torch.zeros(4, 1, 3, 8)}, r"4x4 pixels or more, got 3x8"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
    ],
)
def test_odd_arguments(arguments, message):
    usual = {"images": torch.zeros(4, 1, 8, 8), "labels": torch.zeros(4).long(), "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        train_classifier(**{"num_steps": 1} | usual | arguments)


def test_images_that_are_not_finite():
    images = torch.full((4, 1, 8, 8), torch.nan)
    with pytest.raises(
        FloatingPointError,
        match=r"loss of the classifier is nan at step 0, with seed 0; .* if the images are finite",
    ):
        train_classifier(images, torch.zeros(4).long(), 2, num_steps=1)


def test_images_of_another_shape(trained):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 8, 8\), got \(2, 3, 8"):
        trained.features(torch.zeros(2, 3, 8, 8))


def test_round_trip(trained, saved, digits):
    loaded = classifiers.load(saved)
    assert torch.equal(loaded(digits.test), trained(digits.test))
    assert loaded.description == trained.description
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {"config.json", "model.safetensors"} <= {file.name for file in saved.iterdir()}


def edit_json(directory, **changes):
    file = directory / "config.json"
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))


def edit_weights(directory, edit):
    file = directory / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "config.json").unlink(),
            "config.json cannot be read as JSON: No such file",
        ),
        (
            lambda d: (d / "config.json").write_text("{"),
            "config.json cannot be read as JSON: Expecting",
        ),
        (
            lambda d: edit_json(d, num_features=None),
            "config.json describes no model: TypeError.*num_features",
        ),
        (
            lambda d: edit_json(d, num_classes="ten"),
            "config.json describes no model: TypeError.*num_classes",
        ),
        (
            lambda d: edit_json(d, image_shape=[1, 8]),
            "config.json describes no model: ValueError.*unpack",
        ),
        (
            lambda d: edit_json(d, num_classes=11),
            "another model: .output.weight. must be F16 .* of shape .11, 64",
        ),
        (
            lambda d: (d / "model.safetensors").unlink(),
            "cannot be read: No such file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"x"),
            "safetensors cannot be read",
        ),
        (
            lambda d: edit_weights(d, lambda w: w.pop("output.bias")),
            r"(?s)of another model.*Missing key.*output\.bias",
        ),
        (
            lambda d: edit_weights(d, lambda w: w["output.bias"].fill_(torch.nan)),
            r"model\.safetensors holds NaN or infinite values",
        ),
    ],
)
def test_damaged_files(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message):
        classifiers.load(saved)
