"""Extractors of features: batches, and Inception's from weights that may be anything."""

import hashlib

import pytest
import torch
from torch import nn

from ocm.evaluation import features


def test_an_extractor_goes_by_batches():
    images = torch.linspace(-1, 1, 5 * 4).view(5, 1, 2, 2)
    sizes = []

    def function(images):
        sizes.append(len(images))
        return images.flatten(1)

    extractor = features.FeatureExtractor("pixels", 4, function, batch_size=2)
    assert torch.equal(extractor(images), images.flatten(1))
    assert sizes == [2, 2, 1]
    with pytest.raises(ValueError, match=r"pixels must give features of shape \(2, 4\), got"):
        extractor(torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"images must hold one or more"):
        extractor(torch.zeros(0, 1, 2, 2))


def test_inception_says_that_torch_fidelity_is_missing(tmp_path, monkeypatch):
    import torchmetrics.image.fid

    weights = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1)}, weights)
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"weights.pth' does not load: .*install torch-fidelity"):
        features.inception(weights)


@pytest.fixture
def torchmetrics_inception(monkeypatch):
    """The network of torchmetrics, played by a mean over pixels."""
    import torchmetrics.image.fid

    class Played(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path, antialias):
            super().__init__()
            assert (features_list, antialias) == (["2048"], False)
            self.weight = nn.Parameter(torch.zeros(1))
            # As torch-fidelity does: with it, a pickle runs what it likes.
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, images):
            assert images.dtype == torch.uint8
            assert images.shape[1] == 3
            return self.weight * images.float().mean((2, 3)).repeat(1, 683)[:, :2048]

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Played)


@pytest.mark.usefixtures("torchmetrics_inception")
def test_inception_gets_bytes_of_three_channels(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(1)}, weights)
    extractor = features.inception(weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"sha256 {digest[:8]}" in extractor.name
    pixels = torch.tensor([0, 1, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, 1, 2, 2)
    found = extractor(pixels.float() / 127.5 - 1)
    assert found.shape == (4, 2048)
    assert found[:, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(ValueError, match=r"shape \(n, 1 or 3, H, W\) for Inception, got"):
        extractor(torch.zeros(1, 2, 4, 4))


class Trap:
    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


@pytest.mark.usefixtures("torchmetrics_inception")
@pytest.mark.parametrize("state", [{"other": torch.ones(1)}, Trap(), {"weight": 1.0}])
def test_inception_of_other_weights_is_one_line_and_runs_nothing(tmp_path, state):
    weights = tmp_path / "weights.pth"
    torch.save(state, weights)
    with pytest.raises(ValueError, match=r"weights.pth' does not load: .") as caught:
        features.inception(weights)
    assert "\n" not in str(caught.value)
    assert not Trap.sprung
