"""Files are what they were before, or what they were to become."""

import errno
import json
import math

import pytest
import torch
from full_disk import files_of_at_most
from safetensors.torch import load_file

from ocm.files import replacing, write_json, write_tensors, write_text


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "record.json"
    file.write_text("before")
    with replacing(file) as beside:
        beside.write_text("half")
        assert file.read_text() == "before"
        assert beside.suffix == ".json"  # matplotlib goes by it
        beside.write_text("whole")
    assert file.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_fails_on_the_way_changes_nothing(tmp_path, error):
    file = tmp_path / "record.json"
    file.write_text("before")

    def fail_halfway():
        with replacing(file) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail_halfway()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_was_never_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_replaced(tmp_path):
    with replacing(tmp_path / "a") as beside:
        beside.write_text("left")
        name = beside.name
    (tmp_path / name).write_text("left by a killed process, and longer than what follows")
    write_text(tmp_path / "a", "±")
    assert (tmp_path / "a").read_bytes() == "±".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"loss": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5}


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    file, wanted = tmp_path / "a.safetensors", torch.arange(6.0).view(2, 3)
    write_tensors(file, {"a": wanted.T})
    assert torch.equal(load_file(file)["a"], wanted.T)
    with files_of_at_most(1000), pytest.raises(OSError, match=r"a\.safetensors"):
        write_tensors(file, {"a": torch.zeros(1000)})
    assert torch.equal(load_file(file)["a"], wanted.T)
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_is_full_on_the_way_is_said_with_the_file(tmp_path):
    with files_of_at_most(1000), pytest.raises(OSError, match=r"a\.txt") as caught:
        write_text(tmp_path / "a.txt", "x" * 100_000)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
