"""The ImageNet network of the benchmarks: its weights are the trained ones, its input is right."""

import pytest
import torch
from harness import imagenet_features
from harness.imagenet_features import load_network, network_input

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(4, 3, 16, 16, generator=GENERATOR) * 2 - 1
PALACE, DAISY = 698, 985


@pytest.fixture(scope="module")
def extractor():
    return imagenet_features.imagenet_features()


def test_it_names_what_is_in_photographs():
    """The top classes of scikit-learn's two photographs, a palace in China and a flower."""
    from sklearn.datasets import load_sample_images

    network = load_network(224)
    for picture, wanted in zip(load_sample_images().images, (PALACE, DAISY), strict=True):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
        side = min(pixels.shape[2:])
        square = pixels[..., :side, (pixels.shape[3] - side) // 2 :][..., :side]
        logits = network(network_input(square / 127.5 - 1, 224))
        assert wanted in logits.topk(5).indices


def test_features_are_those_before_the_last_layer(extractor):
    network = load_network()
    logits = network(network_input(IMAGES))
    torch.testing.assert_close(network._fc(extractor(IMAGES)), logits, rtol=1e-4, atol=1e-4)
    assert extractor(IMAGES).shape == (4, 1280)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_an_image_is_seen_alone_and_the_same_each_time(extractor):
    together = extractor(IMAGES)
    assert torch.equal(extractor(IMAGES), together)
    for i in range(len(IMAGES)):
        torch.testing.assert_close(
            extractor(IMAGES[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4
        )
    assert (together[0] - together[1]).norm() > 0.1 * together[0].norm()


def test_a_grey_image_is_its_three_channels(extractor):
    grey = IMAGES[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_the_input_is_scaled_as_in_training():
    levels = torch.tensor([0.0, 127.0, 128.0, 255.0])
    images = (levels / 127.5 - 1).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    found = network_input(images, 32)
    assert found.shape == (4, 3, 32, 32)
    wanted = torch.tensor([-127.0, 0.0, 1.0, 128.0]) / 128
    torch.testing.assert_close(found, wanted.view(4, 1, 1, 1).expand(4, 3, 32, 32))


def test_channels_keep_their_order():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert network_input(red, 32)[0, :, 5, 5].tolist() == pytest.approx(
        [1.0, -127 / 128, -127 / 128]
    )


def test_damaged_weights_are_refused(monkeypatch):
    monkeypatch.setattr(imagenet_features, "_DIGEST", "00000000")
    with pytest.raises(ValueError, match="must hold the weights whose sha256 begins with 00000000"):
        load_network()


def test_missing_packages_are_named(monkeypatch):
    assert imagenet_features.missing() == ""
    monkeypatch.setattr(imagenet_features, "_PACKAGES", ("not_here", "torch"))
    assert imagenet_features.missing().startswith(
        "There are no distances in ImageNet features: not_here is not installed"
    )
    with pytest.raises(ImportError, match="not_here"):
        load_network()


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 8, 8)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1 or 3, H, W\)"):
        network_input(torch.zeros(shape))
