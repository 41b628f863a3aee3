"""What is fitted after a training sees images that it did not see, with their own classes."""

from types import SimpleNamespace

import pytest
import torch
from two_classes import two_classes

import ocm
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.held_back import held_back
from ocm.data import Images

NUMBERS = torch.arange(20)


def images():
    x = NUMBERS.reshape(-1, 1, 1, 1) / 20
    return Images("numbers", x, x[:4], 21, NUMBERS % 2, NUMBERS[:4] % 2, 2)


@pytest.mark.parametrize(
    ("kept", "count", "numbers"),
    [
        (6, 4, NUMBERS[14:18]),  # the last six were held back
        (6, 9, NUMBERS[14:]),
        (0, 4, NUMBERS[:4]),  # none were: they are all that there is
        (0, 30, NUMBERS),
    ],
)
def test_images_held_back_with_their_classes(kept, count, numbers):
    checkpoint = Checkpoint(two_classes(), (1, 1, 1), 21, "numbers", num_calibration=kept)
    x0, labels = held_back(checkpoint, images(), count)
    assert torch.equal(x0, images().train[numbers])
    assert torch.equal(labels, numbers % 2)


def test_classes_are_for_a_denoiser_that_takes_them():
    denoiser = ocm.Denoiser(lambda x, time: x, ocm.linear())
    checkpoint = Checkpoint(denoiser, (1, 1, 1), 21, "numbers", num_calibration=6)
    assert held_back(checkpoint, images(), 4)[1] is None


def test_training_leaves_out_what_is_held_back(tmp_path, monkeypatch):
    """Neither the denoiser nor a head sees them, and the checkpoint says how many they are."""
    from ocm.training import workflow
    from ocm.training.settings import TrainingSettings

    seen = []

    def train(what, shown, settings, *, labels, **options):
        seen.append((shown, labels, options.get("directory")))
        return [0.0]

    def train_denoiser(denoiser, *arguments, **options):
        denoiser.freeze()
        return train(denoiser, *arguments, **options)

    monkeypatch.setattr(workflow, "train_denoiser", train_denoiser)
    monkeypatch.setattr(workflow, "train_head", train)
    monkeypatch.setattr(workflow, "make_head", lambda denoiser, kind, seed: SimpleNamespace())
    settings = TrainingSettings(1, batch_size=2)
    x = torch.linspace(-1, 1, 20).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    data = Images("numbers", x, x[:4], 21, NUMBERS % 2, NUMBERS[:4] % 2, 2)
    start = workflow.NewDenoiser(settings, width=8, hold_out=6, class_conditional=True)
    made, record = workflow.train_checkpoint(
        data, start, workflow.NewHeads(settings, ("npr",)), tmp_path, progress=False
    )
    assert len(seen) == 2
    for shown, labels, _ in seen:
        assert torch.equal(shown, x[:14])
        assert torch.equal(labels, NUMBERS[:14] % 2)
    assert seen[0][2] != seen[1][2]
    assert made.num_calibration == 6
    assert record["trained_on"] == 14
    assert torch.equal(held_back(made, data, 20)[0], x[14:])
