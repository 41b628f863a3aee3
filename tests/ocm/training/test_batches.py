"""Which images a step takes, and how they are read: alike by any number of workers."""

import dataclasses
import sys

import pytest
import torch
from torch import nn
from training_worker import (
    NUM_TIMESTEPS,
    SETTINGS,
    equal,
    loss,
    make_data,
    make_network,
    stopped_at,
    trained,
)

from ocm.training.batches import MicroBatches, batch_of_step
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings


def test_batches_are_a_function_of_the_seed_and_the_step():
    settings = dataclasses.replace(SETTINGS, batch_size=500)
    batch = batch_of_step(3, settings, 20, NUM_TIMESTEPS)
    again = batch_of_step(3, settings, 20, NUM_TIMESTEPS)
    assert equal(vars(batch), vars(again))
    assert batch.indices.unique().tolist() == list(range(20))
    assert 1 <= batch.timesteps.min() <= 2
    assert 999 <= batch.timesteps.max() <= 1000
    assert batch.timesteps.diff().unique().tolist() == [2]
    assert 200 < batch.flips.sum() < 300
    for other in (
        batch_of_step(4, settings, 20, NUM_TIMESTEPS),
        batch_of_step(3, dataclasses.replace(settings, seed=1), 20, NUM_TIMESTEPS),
        batch_of_step(3, dataclasses.replace(settings, seed=-1), 20, NUM_TIMESTEPS),
    ):
        assert not torch.equal(batch.indices, other.indices)
    plain = dataclasses.replace(settings, horizontal_flip=False)
    assert not batch_of_step(3, plain, 20, NUM_TIMESTEPS).flips.any()


@pytest.mark.parametrize("parts", [1, 2])
def test_workers_read_the_same_batches_in_the_same_order(parts):
    """Of which a training of more than 0 workers that starts late takes the rest."""
    images, conditions = make_data()

    def taken(workers, step):
        settings = dataclasses.replace(
            SETTINGS, num_workers=workers, gradient_accumulation_steps=parts
        )
        return list(MicroBatches(images, conditions, NUM_TIMESTEPS, settings).from_step(step))

    alone, late = taken(0, 0), taken(2, 37)
    assert len(alone) == 40 * parts
    assert len(late) == 3 * parts
    for one, other in zip(alone[37 * parts :], late, strict=True):
        assert one.sample_offset == other.sample_offset
        assert equal(one.conditions, other.conditions)
        for mine, theirs in zip(one[:2], other[:2], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing can be forked safely")
def test_workers_end_with_the_process_that_they_read_for():
    """They ask who their parent is, which a fork server would hide from them."""
    batches = MicroBatches(
        *make_data(), NUM_TIMESTEPS, dataclasses.replace(SETTINGS, num_workers=1)
    )
    assert batches.from_step(0).multiprocessing_context.get_start_method() == "fork"


def test_workers_change_no_bit_of_a_training(tmp_path):
    settings = dataclasses.replace(SETTINGS, num_workers=2, checkpoint_every=5)
    losses, module = trained(noisy=True)
    stopped_at(12, settings, tmp_path, noisy=True)
    again, other = trained(
        dataclasses.replace(settings, num_workers=0), noisy=True, directory=tmp_path
    )
    assert again == losses
    assert equal(other.state_dict(), module.state_dict())


def test_timesteps_are_uniform_in_every_place():
    settings = TrainingSettings(num_steps=1, batch_size=4)
    drawn = torch.stack([batch_of_step(step, settings, 1, 8).timesteps for step in range(400)])
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert counts[0] == 0
    assert counts[1:].min() > 150


def test_an_exponent_of_two_spends_half_of_the_time_on_a_quarter_of_the_timesteps():
    settings = TrainingSettings(num_steps=1, batch_size=100, timestep_exponent=2.0)
    drawn = torch.cat([batch_of_step(step, settings, 1, 1000).timesteps for step in range(200)])
    assert (drawn.min(), drawn.max()) == (1, 1000)
    for t, share in ((10, 0.1), (250, 0.5), (640, 0.8)):  # sqrt(t / N)
        assert abs((drawn <= t).double().mean() - share) < 0.01


def test_flips_reverse_the_images_that_were_drawn_for_it():
    images = torch.arange(40.0).view(10, 1, 2, 2) / 40
    settings = dataclasses.replace(SETTINGS, num_steps=1)
    seen = []

    def watch(module, x0, t, conditions, sample_offset):
        seen.append(x0)
        return module(x0).mean()

    module = nn.Conv2d(1, 1, 1)
    train("network", module, watch, images, {}, 10, settings, device="cpu", progress=False)
    batch = batch_of_step(0, settings, 10, 10)
    assert 0 < batch.flips.sum() < len(batch.flips)
    for x, index, flip in zip(seen[0], batch.indices, batch.flips, strict=True):
        rows = [row[::-1] if flip else row for row in images[index, 0].tolist()]
        assert x[0].tolist() == rows


def test_a_source_of_images_trains_as_a_tensor_does():
    images, conditions = make_data()

    class Source:
        def __len__(self):
            return len(images)

        def __getitem__(self, indices):
            return images[indices]

    module = make_network(noisy=False)
    losses = train(
        "network", module, loss, Source(), conditions, NUM_TIMESTEPS, SETTINGS, device="cpu",
        progress=False,
    )  # fmt: skip
    assert losses == trained()[0]


@pytest.mark.parametrize(
    ("images", "conditions", "changes", "message"),
    [
        (torch.zeros(0, 1, 2, 2), {}, {}, "images must hold at least one image"),
        (torch.zeros(3, 1).long(), {}, {}, "must be floating-point .* torch.int64"),
        (torch.zeros(3, 1), {"labels": torch.zeros(3)}, {}, "must be int64 .* got torch.float"),
        (torch.zeros(3, 1), {"labels": torch.zeros(2).long()}, {}, r"shape \(3,\), .* \(2,\)"),
        (torch.zeros(3, 1), {"text": torch.zeros(1, 5)}, {}, "each of 3 images, got 1 of 'text'"),
        (torch.zeros(3, 4), {}, {"horizontal_flip": True}, r"got \(8, 4\)"),
    ],
)
def test_data_and_settings_that_do_not_fit(images, conditions, changes, message):
    settings = TrainingSettings(num_steps=1, batch_size=8, **changes)
    with pytest.raises(ValueError, match=message):
        train(
            "network", nn.Linear(4, 4), loss, images, conditions, 10, settings, device="cpu",
            progress=False,
        )  # fmt: skip


def test_videos_are_flipped_as_wholes():
    """As many as they have channels, which broadcasting would take for one another."""
    videos = torch.randn(4, 4, 2, 3, 5)
    settings = TrainingSettings(num_steps=1, batch_size=4, horizontal_flip=True, seed=0)
    batch = batch_of_step(0, settings, 4, 1000)
    assert 0 < batch.flips.sum() < 4
    shown = MicroBatches(videos, {}, 1000, settings)[0].x0
    for i, (picked, flip) in enumerate(zip(batch.indices, batch.flips, strict=True)):
        expected = videos[picked].flip(-1) if flip else videos[picked]
        assert torch.equal(shown[i], expected)


@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (2, 3)])
def test_micro_batches_are_the_parts_of_a_batch_in_order(processes, parts):
    """Images, their flips, timesteps and conditions alike, and the number of the first sample."""
    images = torch.rand(20, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    conditions = {"labels": torch.arange(20)}
    settings = TrainingSettings(5, batch_size=12, horizontal_flip=True)
    whole = MicroBatches(images, conditions, 1000, settings)[4]
    accumulated = dataclasses.replace(settings, gradient_accumulation_steps=parts)
    split = [
        MicroBatches(images, conditions, 1000, accumulated, rank, processes)[4 * parts + part]
        for rank in range(processes)
        for part in range(parts)
    ]
    assert torch.equal(torch.cat([part.x0 for part in split]), whole.x0)
    assert torch.equal(torch.cat([part.t for part in split]), whole.t)
    labels = torch.cat([part.conditions["labels"] for part in split])
    assert torch.equal(labels, whole.conditions["labels"])
    size = 12 // (processes * parts)
    assert [part.sample_offset for part in split] == list(range(48, 60, size))
