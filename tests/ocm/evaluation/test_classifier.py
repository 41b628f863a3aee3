"""The classifier learns digits, gives the same weights every time, and survives a round trip."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ocm import data
from ocm.evaluation import classifier as classifiers
from ocm.evaluation.classifier import accuracy, train_classifier
from ocm.evaluation.distances import classifier_features, frechet_distance


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
    predicted = trained.logits(digits.test).argmax(1)
    expected = sum(int(p == t) for p, t in zip(predicted, digits.test_labels, strict=True)) / 297
    assert accuracy(trained, digits.test, digits.test_labels, batch_size=100) == expected
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
    logits = features @ trained.network.output.weight.T + trained.network.output.bias
    torch.testing.assert_close(logits, trained.logits(digits.test))
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
        return torch.cat([p.flatten() for p in classifier.network.parameters()])

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(4)}, r"labels must be int64 of shape \(4,\).* got torch.float32"),
        ({"labels": torch.zeros(3).long()}, r"labels must be int64 of shape \(4,\)"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"labels must lie in 0 \.\. 2, .* got 0 \.\. 3"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, r"labels must lie in 0 \.\. 2, .* got -1"),
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
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; are the images finite"):
        train_classifier(images, torch.zeros(4).long(), 2, num_steps=1)


def test_images_of_another_shape(trained):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 8, 8\), got \(2, 3, 8"):
        trained.features(torch.zeros(2, 3, 8, 8))


def test_round_trip(trained, saved, digits):
    loaded = classifiers.load(saved)
    assert torch.equal(loaded.logits(digits.test), trained.logits(digits.test))
    assert loaded.description == trained.description
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert {file.name for file in saved.iterdir()} == {"classifier.json", "classifier.safetensors"}


def edit_json(directory, **changes):
    file = directory / "classifier.json"
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))


def edit_weights(directory, edit):
    file = directory / "classifier.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "classifier.json").unlink(), r"classifier\.json is missing"),
        (lambda d: (d / "classifier.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: edit_json(d, format="other"), 'is no classifier of ocm: "format" must be'),
        (lambda d: edit_json(d, version=9), "has version 9, this ocm reads 1"),
        (lambda d: edit_json(d, num_features=None), "lacks or misstates an entry.*num_features"),
        (lambda d: edit_json(d, num_classes="ten"), "lacks or misstates an entry.*num_classes"),
        (lambda d: edit_json(d, surprise=1), "lacks or misstates an entry.*surprise"),
        (lambda d: edit_json(d, num_classes=11), r"safetensors is of another classifier"),
        (lambda d: (d / "classifier.safetensors").unlink(), r"safetensors cannot be read"),
        (lambda d: (d / "classifier.safetensors").write_bytes(b"x"), "safetensors cannot be read"),
        (
            lambda d: edit_weights(d, lambda w: w.pop("output.bias")),
            "safetensors is of another classifier",
        ),
        (
            lambda d: edit_weights(d, lambda w: w["output.bias"].fill_(torch.nan)),
            "holds NaN or infinite weights",
        ),
    ],
)
def test_damaged_files(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message):
        classifiers.load(saved)
