"""Heads on a frozen backbone that several processes share, each of which holds a part of it."""

import multiprocessing

import pytest
import torch
from sharded_worker import make_unet, train_heads, train_sharded
from two_processes import sent_by_both


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The heads of one process with the whole backbone, and the states it left."""
    directory = tmp_path_factory.mktemp("states")
    return directory, train_heads(make_unet(), directory)


@pytest.fixture(scope="module")
def two_processes(one_process):
    """What each of two processes says: its parts of backbones, its heads, and an error."""
    context = multiprocessing.get_context("spawn")
    return sent_by_both(context, train_sharded, str(one_process[0]))


def close(found, expected):
    """Sums over a batch in another order, and six steps of AdamW, are all the difference."""
    for name, (losses, weights) in expected.items():
        assert found[name][0] == pytest.approx(losses, rel=1e-4)
        for key, value in weights.items():
            assert torch.tensor(value).abs().max() > 0.01
            torch.testing.assert_close(
                torch.tensor(found[name][1][key]), torch.tensor(value), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("backbone", ["sharded", "shard", "copied"])
def test_two_processes_train_the_heads_of_one(one_process, two_processes, backbone):
    """With a backbone that fully_shard spread, by hand or by us, or in DistributedDataParallel."""
    one, other = (results[backbone] for results in two_processes)
    assert one == other
    close(one, one_process[1])


def test_each_process_holds_its_part_of_a_sharded_backbone(two_processes):
    for results in two_processes:
        assert all(0.4 < part < 0.6 for part in results["parts"])


def test_the_state_of_a_whole_backbone_is_that_of_a_sharded_one(one_process, two_processes):
    """They restored its heads, which a digest of other weights would have refused."""
    assert [results["restored"] for results in two_processes] == [one_process[1]] * 2


def test_a_sharded_denoiser_is_neither_trained_nor_written(two_processes):
    for results in two_processes:
        assert "denoiser in training must be whole in every process" in results["training"]
        assert "denoiser must be whole to be written" in results["writing"]
        assert "backbone must be whole to be saved" in results["attached"]


def test_conditions_and_accumulation_split_a_batch_alike(one_process):
    """Which samples are without a condition depends on their number alone."""
    parts = train_heads(make_unet(), gradient_accumulation_steps=2)
    close(parts, one_process[1])
