"""Commands that are killed lose nothing: given again, they end as if nobody had killed them."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from killing import (
    assert_whole,
    attempt,
    be_one_of_two,
    killings,
    learn_quickly,
    left_beside,
)
from safetensors.torch import load_file

from ocm import checkpoints

_KILLS = 15
_SMALL = ("--device", "cpu", "--quiet")
# What differs from run to run.
_OF_A_RUN = {
    "seconds",
    "environment",
    "checkpoint",
    "batches_drawn_before",
    "parts_finished_before",
}


def trained(folder):
    """A checkpoint with two heads, none of which has learned much."""
    answer = attempt(
        [
            *("train", "--out", folder, "--denoiser-steps", 2, "--head-steps", 2),
            *("--batch-size", 4, "--head", "ml", "--head", "ocm", *_SMALL),
        ],
        folder,
    )
    assert answer.status == 0, answer.said
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trained") / "checkpoint")


def without_what_differs(file):
    record = json.loads(file.read_text(encoding="utf-8"))
    return {name: value for name, value in record.items() if name not in _OF_A_RUN}


def sample(checkpoint, out, *more):
    return [
        *("sample", checkpoint, "--out", out, "--num-images", 24, "--batch-size", 2),
        *("--steps", 4, "--covariance", "hutchinson", "--num-probes", 2, *_SMALL, *more),
    ]


def evaluate(checkpoint, out, *more):
    return [
        *("evaluate", checkpoint, "--out", out, "--all", "--num-images", 2, "--fit-images", 2),
        *("--num-samples", 8, "--steps", 2, "--steps", 3, "--covariance", "ml"),
        *("--covariance", "analytic", *_SMALL, *more),
    ]


def calibrate(checkpoint, *more):
    return [
        *("calibrate", checkpoint, "--num-images", 8, "--steps", 5, "--covariance", "ml"),
        *("--covariance", "ocm", "--covariance", "analytic_data", "--covariance", "coloring"),
        *("--num-probes", 2, *_SMALL, *more),
    ]


def images(folder):
    return load_file(folder / "samples.safetensors")["images"]


@pytest.mark.soak
def test_a_sampling_that_is_killed_loses_and_repeats_no_sample(checkpoint, tmp_path):
    whole = attempt(sample(checkpoint, tmp_path / "whole"), tmp_path / "whole")
    assert whole.status == 0, whole.said
    wanted = images(whole.folder)

    killed = went_on = 0
    for found in killings(
        lambda out: sample(checkpoint, out), tmp_path, kills=_KILLS, seconds=whole.seconds, seed=0
    ):
        killed += found.killed
        went_on += "going on from" in found.said
        assert_whole(found.folder)
        if not found.killed:
            assert found.status == 0, found.said
            assert torch.equal(images(found.folder), wanted)
            records = [
                without_what_differs(f / "samples.json") for f in (found.folder, whole.folder)
            ]
            assert records[0] == records[1]
            assert not (found.folder / "unfinished").exists()
            assert not left_beside(found.folder)
    assert killed == _KILLS
    assert went_on > 0
    checkpoints.load(checkpoint)


@pytest.mark.soak
def test_an_evaluation_that_is_killed_ends_with_the_same_figures(checkpoint, tmp_path):
    whole = attempt(
        evaluate(checkpoint, tmp_path / "whole"), tmp_path / "whole", first=learn_quickly
    )
    assert whole.status == 0, whole.said

    killed = went_on = 0
    for found in killings(
        lambda out: evaluate(checkpoint, out),
        tmp_path,
        kills=_KILLS,
        seconds=whole.seconds,
        seed=1,
        first=learn_quickly,
    ):
        killed += found.killed
        went_on += "going on from" in found.said
        assert_whole(found.folder)
        if not found.killed:
            assert found.status == 0, found.said
            for name in ("evaluation.json", "classifier/config.json"):
                assert without_what_differs(found.folder / name) == without_what_differs(
                    whole.folder / name
                )
            assert not (found.folder / "unfinished").exists()
            assert not left_beside(found.folder)
    assert killed == _KILLS
    assert went_on > 0
    checkpoints.load(checkpoint)


@pytest.mark.soak
def test_a_calibration_that_is_killed_leaves_a_checkpoint_and_ends_with_the_same_tables(
    checkpoint, tmp_path
):
    def command(folder):
        return calibrate(shutil.copytree(checkpoint, folder, dirs_exist_ok=True))

    (tmp_path / "whole").mkdir()
    whole = attempt(command(tmp_path / "whole"), tmp_path / "whole")
    assert whole.status == 0, whole.said
    wanted = (whole.folder / "tables.json").read_text(encoding="utf-8")

    killed = went_on = 0
    for found in killings(command, tmp_path, kills=_KILLS, seconds=whole.seconds, seed=2):
        killed += found.killed
        went_on += "going on from" in found.said
        assert_whole(found.folder)
        checkpoints.load(found.folder)
        if not found.killed:
            assert found.status == 0, found.said
            assert (found.folder / "tables.json").read_text(encoding="utf-8") == wanted
            records = [
                without_what_differs(f / "calibration.json") for f in (found.folder, whole.folder)
            ]
            assert records[0] == records[1]
            assert not (found.folder / "unfinished").exists()
            assert not left_beside(found.folder)
    assert killed == _KILLS
    assert went_on > 0


def both(checkpoint, out, *, second_until=None):
    """Draw in two processes; the second is killed when the time has come."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(
                attempt, sample(checkpoint, out), out.with_name(f"process-{rank}"),
                after=second_until if rank else None, first=partial(be_one_of_two, rank, port),
                limit=120.0,
            )
            for rank in range(2)
        ]  # fmt: skip
        return [process.result() for process in started]


@pytest.mark.soak
def test_a_process_ends_when_another_was_killed_and_both_go_on(checkpoint, tmp_path):
    whole = both(checkpoint, tmp_path / "whole")
    assert [found.status for found in whole] == [0, 0], whole

    out = tmp_path / "out"
    batches = out / "unfinished" / "sample 2 of 2"
    first, second = both(checkpoint, out, second_until=lambda: [*batches.glob("from *")])
    assert second.killed
    assert first.status == 1
    assert "before all samples were drawn; those that were are kept" in first.said
    assert_whole(out)
    kept = len([*batches.glob("from *")])
    assert 1 <= kept < 6

    again = both(checkpoint, out)
    assert [found.status for found in again] == [0, 0], again
    assert "going on from 12 of 12 images" in again[0].said
    assert f"going on from {2 * kept} of 12 images" in again[1].said
    assert torch.equal(images(out), images(tmp_path / "whole"))
    assert not (out / "unfinished").exists()
