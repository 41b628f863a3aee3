"""Commands that are killed lose nothing: given again, they end as if nobody had killed them."""

import shutil
from functools import partial

import pytest
from folders import assert_same, assert_whole
from killing import attempt_by_two, finished, killings, learn_quickly

from ocm import checkpoints

_SMALL = ("--device", "cpu", "--quiet")


def train(out):
    return [
        *("train", "--out", out, "--denoiser-steps", 2, "--head-steps", 2, "--batch-size", 4),
        *("--head", "ml", "--head", "ocm", *_SMALL),
    ]


def sample(checkpoint, out):
    return [
        *("sample", checkpoint, "--out", out, "--num-images", 24, "--batch-size", 2),
        *("--steps", 4, "--covariance", "hutchinson", "--num-probes", 2, *_SMALL),
    ]


def evaluate(checkpoint, out):
    return [
        *("evaluate", checkpoint, "--out", out, "--all", "--num-images", 2, "--fit-images", 2),
        *("--num-samples", 8, "--steps", 2, "--steps", 3, "--covariance", "ml"),
        *("--covariance", "analytic", *_SMALL),
    ]


def calibrate(checkpoint, folder):
    """The command for a copy of the checkpoint."""
    return [
        *("calibrate", shutil.copytree(checkpoint, folder, dirs_exist_ok=True)),
        *("--num-images", 8, "--steps", 5, "--covariance", "ml", "--covariance", "ocm"),
        *("--covariance", "analytic_data", "--covariance", "coloring", "--num-probes", 2, *_SMALL),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with two heads, none of which has learned much."""
    return finished(train, tmp_path_factory.mktemp("trained") / "checkpoint").folder


@pytest.mark.soak
@pytest.mark.parametrize(
    ("command", "seed", "first"),
    [(sample, 0, None), (evaluate, 1, learn_quickly), (calibrate, 2, None)],
)
def test_a_command_that_is_killed_ends_with_what_it_would_have_made(
    checkpoint, tmp_path, command, seed, first
):
    """Samples are neither lost nor repeated, and the checkpoint can be read after every kill."""
    in_place, command = command is calibrate, partial(command, checkpoint)
    whole = finished(command, tmp_path / "whole", first=first)
    went_on = 0
    for found in killings(command, whole, kills=15, seed=seed, first=first):
        went_on += "going on from" in found.said
        checkpoints.load(found.folder if in_place else checkpoint)
        if not found.killed:
            assert found.status == 0, found.said
            assert_same(found.folder, whole.folder)
    assert went_on > 0


@pytest.mark.soak
def test_a_process_ends_when_another_was_killed_and_both_go_on(checkpoint, tmp_path):
    whole = attempt_by_two(sample(checkpoint, tmp_path / "whole"), tmp_path)
    assert [found.status for found in whole] == [0, 0], whole

    out = tmp_path / "out"
    batches = out / "unfinished" / "sample 2 of 2"
    command = sample(checkpoint, out)
    first, second = attempt_by_two(
        command, tmp_path, killed=1, after=lambda: [*batches.glob("from *")]
    )
    assert second.killed
    assert first.status == 1
    assert "before all samples were drawn; those that were are kept" in first.said
    assert_whole(out)
    kept = len([*batches.glob("from *")])
    assert 1 <= kept < 6

    again = attempt_by_two(command, tmp_path)
    assert [found.status for found in again] == [0, 0], again
    assert "going on from 12 of 12 images" in again[0].said
    assert f"going on from {2 * kept} of 12 images" in again[1].said
    assert_same(out, tmp_path / "whole")
