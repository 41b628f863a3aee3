"""What a training of heads leaves in the checkpoint that it started from."""

import copy

import pytest
import torch

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.data import Images
from ocm.diffusion.tables import Table
from ocm.training import workflow
from ocm.training.settings import TrainingSettings
from ocm.training.small_unet import small_unet
from ocm.training.state import TrainingStateError
from ocm.training.workflow import NewHeads, train_checkpoint

X = torch.linspace(-1, 1, 20).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_the_likelihood_head_leaves_the_one_that_it_starts_from(tmp_path, monkeypatch):
    """Calibrations of what is trained anew are dropped, and the others kept."""
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine()).freeze()
    npr = ocm.NPR(denoiser, ocm.make_head(denoiser, "simple"), ocm.Parameterisation(0.4))
    table = Table({1: [1.0, 0.0]})
    start = Checkpoint(
        denoiser, (1, 4, 4), 21, "numbers", {"npr": npr, "ml": npr},
        calibrations={"npr": table, "ml": table},
    )  # fmt: skip
    before = copy.deepcopy(npr.head.state_dict())

    def train_head(covariance, *arguments, **options):
        with torch.no_grad():
            for parameter in covariance.head.parameters():
                parameter += 1.0
        return [0.0]

    monkeypatch.setattr(workflow, "train_head", train_head)
    heads = NewHeads(TrainingSettings(1), ("ml",), start_from="npr", x0_range=(-2.0, 2.0))
    images = Images("numbers", X, X[:4], 21)
    made, _ = train_checkpoint(images, start, heads, tmp_path, progress=False)
    for name, moved in (("npr", 0.0), ("ml", 1.0)):
        for key, value in made.learned[name].head.state_dict().items():
            torch.testing.assert_close(value, before[key] + moved)
    assert made.learned["ml"].parameterisation == npr.parameterisation
    assert made.learned["ml"].x0_range == (-2.0, 2.0)
    assert made.learned["ml"].levels == 21
    assert set(made.calibrations) == {"npr"}


def test_heads_start_from_the_seed_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "train_head", lambda *arguments, **options: [0.0])
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine()).freeze()
    start = Checkpoint(denoiser, (1, 4, 4), 21, "numbers")
    images = Images("numbers", X, X[:4], 21)
    made = [
        train_checkpoint(
            images, start, NewHeads(TrainingSettings(1), ("npr",), seed=seed), tmp_path,
            progress=False,
        )[0].learned["npr"].head.state_dict()
        for seed in (3, 3, 4)
    ]  # fmt: skip
    name = next(key for key in made[0] if key.endswith("weight") and "2" in key)
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


def test_a_state_goes_on_from_the_same_head_alone(tmp_path):
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine()).freeze()
    heads = {
        name: ocm.NPR(denoiser, ocm.make_head(denoiser, "simple", seed=seed))
        for seed, name in enumerate(("npr", "sn"))
    }
    start, images = Checkpoint(denoiser, (1, 4, 4), 21, "numbers", heads), Images("X", X, X[:4], 21)

    def trained(start_from):
        new = NewHeads(TrainingSettings(1, batch_size=4), ("ml",), start_from=start_from)
        return train_checkpoint(images, start, new, tmp_path, progress=False)

    trained("npr")
    trained("npr")
    said = "name was 'ml head from npr', now it is 'ml head from sn'"
    with pytest.raises(TrainingStateError, match=said):
        trained("sn")
