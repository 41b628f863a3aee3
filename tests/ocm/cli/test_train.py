"""``ocm train``: what it refuses before any work, keeps when it is stopped, and replaces."""

import json
import shutil
from unittest import mock

import pytest
import torch
from bad_input import command
from folders import assert_same, contents
from full_disk import files_of_at_most
from killing import attempt_by_two, finished, killings
from typer.testing import CliRunner

from ocm import checkpoints, data
from ocm.cli import app as cli
from ocm.training import workflow

SMALL = ("--batch-size", 4, "--device", "cpu", "--quiet")
# A small denoiser, and a head whose loss costs the least.
NARROW = ("--width", 8, "--head", "npr")


def train(*arguments):
    return CliRunner().invoke(cli.app, ["train", *map(str, (*arguments, *SMALL))])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint with the head npr, whose training has ended."""
    out = tmp_path_factory.mktemp("made") / "checkpoint"
    answer = train("--out", out, "--denoiser-steps", 2, "--head-steps", 2, *NARROW)
    assert answer.exit_code == 0, answer.output
    return out


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def stopped(*arguments):
    """Give the command, and stop it when all heads are trained."""
    with mock.patch.object(checkpoints, "save", side_effect=KeyboardInterrupt):
        answer = train(*arguments)
    assert answer.exit_code == 130, answer.output
    return answer


# Before the work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", "nan"), "--learning-rate must be positive and finite, got nan"),
        (("--learning-rate", "inf"), "--learning-rate must be positive and finite, got inf"),
        (("--head-learning-rate", 0), "--head-learning-rate must be positive and finite, got 0"),
        (("--width", 12), "--width must be a multiple of 8, got 12"),
        (("--tensorboard",), "--tensorboard needs a package that is missing: pip install tensorb"),
        (("--mixed-precision", "fp16"), 'mixed_precision "fp16" needs a GPU'),
        (("--accumulation", 3), "batch_size must be a multiple of 3"),
        (("--denoiser", "nowhere"), "no checkpoint at nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_data_are_loaded(
    tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("ocm.cli.train.find_spec", lambda name: None)  # of TensorBoard
    monkeypatch.setattr(data, "load", None)  # which nobody can call
    answer = train("--out", tmp_path, *options)
    assert isinstance(answer.exception, ValueError)  # status 2
    assert message in str(answer.exception)
    assert not list(tmp_path.iterdir())


def test_a_head_to_start_from_must_be_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    answer = train("--denoiser", made, "--out", tmp_path, "--start-from", "ocm")
    assert f"--start-from must be a head of --denoiser {made}, which has npr, got ocm" in str(
        answer.exception
    )


# In place


def test_a_checkpoint_stays_until_heads_trained_in_place_are_finished(made, copy):
    given = ("--denoiser", copy, "--out", copy, "--head", "sn", "--head-steps", 2)
    answer = train(*given)
    assert "--overwrite replaces this one" in str(answer.exception)
    assert "unfinished" not in str(answer.exception)
    answer = stopped(*given, "--overwrite")
    assert f"kept in {copy / 'training'}: sn at step 2. The same command goes on" in answer.stderr
    kept = contents(copy)
    assert all(
        kept[name] == content for name, content in contents(made).items() if "train" not in name
    )
    answer = train(*given)
    assert "its unfinished training, sn at step 2, goes on with --overwrite too" in str(
        answer.exception
    )
    assert train(*given, "--overwrite").exit_code == 0
    found, before = checkpoints.load(copy), checkpoints.load(made)
    assert list(found.learned) == ["npr", "sn"]
    for name, content in contents(made).items():
        if name.startswith(("denoiser/", "heads/npr")):
            assert (copy / name).read_bytes() == content
    assert found.num_calibration == before.num_calibration


def test_overwrite_goes_on_with_the_training_of_the_same_settings(copy, monkeypatch):
    given = ("--out", copy, "--overwrite", "--denoiser-steps", 2, "--head-steps", 3, *NARROW)
    stopped(*given)
    steps = []
    whole = workflow.train_denoiser

    def counted(*arguments, **options):
        steps.append(len(list((options["directory"]).glob("training-state-00000002"))))
        return whole(*arguments, **options)

    monkeypatch.setattr(workflow, "train_denoiser", counted)
    assert train(*given).exit_code == 0
    assert steps == [1]
    # Finished, it is replaced and not continued.
    assert not list((copy / "training").rglob("training-state*"))
    assert train(*given).exit_code == 0
    assert steps == [1, 0]


def test_overwrite_replaces_the_training_of_other_settings_and_says_so(tmp_path):
    out = tmp_path / "out"
    given = ("--out", out, *NARROW, "--denoiser-steps", 2, "--head-steps", 2)
    stopped(*given)
    other = (*given[:-1], 3)
    answer = train(*other)
    assert "num_steps was 2, now it is 3" in str(answer.exception)
    answer = train(*other, "--overwrite")
    assert answer.exit_code == 0, answer.output
    said = [line for line in answer.stderr.splitlines() if line.startswith("removed")]
    assert len(said) == 1  # the denoiser's is the same, and stays
    assert "removed the unfinished training of the npr head in" in said[0]
    assert json.loads((out / "train.json").read_text())["head"]["num_steps"] == 3


def test_heads_for_another_denoiser_leave_an_unfinished_one_there(made, tmp_path):
    out = tmp_path / "out"
    stopped("--out", out, *NARROW, "--denoiser-steps", 2, "--head-steps", 2)
    answer = train("--out", out, "--denoiser", made, "--head", "sn", "--head-steps", 2)
    assert answer.exit_code == 0, answer.output
    kept = {path.parent.name for path in (out / "training").rglob("training-state-*")}
    assert kept == {"denoiser", "npr"}


def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(made, copy, capfd):
    """A file may hold the state of the small head, and not the weights of the denoiser."""
    arguments = (
        *("train", "--denoiser", copy, "--out", copy, "--head", "npr", "--overwrite"),
        *("--head-kind", "simple", "--head-steps", 2, *SMALL),
    )
    with files_of_at_most(50_000):
        status, _, said = command(capfd, *arguments)
    assert status == 1
    (line,) = said.strip().splitlines()
    assert line.startswith(f"error: {copy} cannot be written")
    assert "File too large" in line
    # What the training was given and found is written first, see `train`.
    before = contents(made).items()
    same = {name: content for name, content in before if not name.startswith("train.")}
    assert {name: contents(copy)[name] for name in same} == same
    status, _, said = command(capfd, *arguments)
    assert (status, said) == (0, "")
    assert type(checkpoints.load(copy).learned["npr"].head).__name__ == "CovarianceHead"


# Killed


def assert_same_model(one, other):
    one, other = checkpoints.load(one), checkpoints.load(other)
    models = [
        {"denoiser": c.denoiser.backbone} | {name: known.head for name, known in c.learned.items()}
        for c in (one, other)
    ]
    assert models[0].keys() == models[1].keys()
    for name, module in models[0].items():
        weights = models[1][name].state_dict()
        assert all(torch.equal(x, weights[key]) for key, x in module.state_dict().items())


def new(out):
    return [
        *("train", "--out", out, "--denoiser-steps", 30, "--head-steps", 20),
        *("--checkpoint-every", 4, *NARROW, *SMALL),
    ]


@pytest.mark.soak
def test_a_training_that_is_killed_ends_with_the_same_bits(tmp_path):
    whole = finished(new, tmp_path / "whole")
    for found in killings(new, whole, kills=8, seed=3):
        if (found.folder / "ocm.json").exists():
            assert_same_model(found.folder, whole.folder)
        if found.status == 0:
            assert_same(found.folder, whole.folder)
        elif not found.killed:  # the kill came when the checkpoint was there already
            assert found.status == 2
            assert "holds a finished checkpoint" in found.said


@pytest.mark.soak
def test_heads_trained_in_place_and_killed_leave_the_checkpoint_whole(made, tmp_path):
    def in_place(folder):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        return [
            *("train", "--denoiser", folder, "--out", folder, "--head", "sn", "--head-steps", 40),
            *("--head", "npr", "--checkpoint-every", 4, "--overwrite", *SMALL),
        ]

    whole = finished(in_place, tmp_path / "whole")
    for found in killings(in_place, whole, kills=7, seed=4):
        is_new = "sn" in checkpoints.load(found.folder).learned
        assert_same_model(found.folder, whole.folder if is_new else made)
        if not found.killed:
            assert found.status == 0, found.said
            assert is_new
            assert_same(found.folder, whole.folder)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_whose_other_is_killed_ends_within_a_minute(tmp_path, victim):
    out = tmp_path / "out"
    endless = [
        *("train", "--out", out, "--denoiser-steps", 100_000, "--checkpoint-every", 2),
        *("--limit", 40, *NARROW, *SMALL),
    ]

    def started():
        return bool(list((out / "training").rglob("training-state-0*/state.json")))

    both = attempt_by_two(endless, tmp_path, killed=victim, after=started)
    killed, left = both[victim], both[1 - victim]
    assert killed.killed
    assert left.status == 1, left.said
    assert left.seconds < killed.seconds + 60
    print(f"it ended {left.seconds - killed.seconds:.1f} s after the other")
    (line,) = left.said.strip().splitlines()
    assert line.startswith("error: another of 2 processes has ended, or cannot be reached, at step")
    assert "of the denoiser; start all of them again" in line
