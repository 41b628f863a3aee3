"""The state on disk: complete after any kill, and refused where it is damaged or of another."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from training_worker import (
    NUM_TIMESTEPS,
    PARTIAL,
    SETTINGS,
    equal,
    files,
    loss,
    make_data,
    make_network,
    stopped_at,
    trained,
)

from ocm.training.loop import train
from ocm.training.settings import TrainingSettings
from ocm.training.state import TrainingStateError, read_state, remove_states, write_state

TENSORS = "state.safetensors"
MUST_BE_JSON = "is damaged: it must be JSON with the objects run and files, got .*"


def a_state(step):
    tensors = {f"module/{i}": torch.full((2,), float(i)) for i in range(3)}
    return tensors | {"losses": torch.arange(step).double()}


def step_of(state):
    return len(state["losses"])


def cut_short(function, point, monkeypatch):
    """Run ``function`` up to its ``point``-th call of the system, and say if it got that far."""
    calls = itertools.count()

    class Killed(BaseException):
        pass

    def counted(call):
        def counting(*args, **options):
            if next(calls) == point:
                raise Killed
            return call(*args, **options)

        return counting

    with monkeypatch.context() as patch:
        for name in ("rename", "open", "fsync", "close", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(safetensors.torch, "save_file", counted(safetensors.torch.save_file))
        patch.setattr(Path, "write_text", counted(Path.write_text))
        try:
            function()
        except Killed:
            return True
    return False


def test_a_state_cut_short_at_any_call_leaves_a_complete_one(tmp_path, monkeypatch):
    found = []
    for point in itertools.count():
        directory = tmp_path / str(point)
        write_state(directory, a_state(1), {})
        # Over several files.
        cut = cut_short(
            lambda d=directory: write_state(d, a_state(2), {}, max_file_bytes=20),
            point,
            monkeypatch,
        )
        found.append(step_of(read_state(directory, {})))
        write_state(directory, a_state(3), {})
        assert files(directory) == ["training-state-00000003"]
        if not cut:
            break
    assert len(found) > 12
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_state_is_spread_over_files_of_at_most_so_many_bytes(tmp_path):
    sizes = {"a": 3, "b": 4, "c": 30, "d": 1, "losses": 5}
    tensors = {name: torch.arange(size).double() for name, size in sizes.items()}
    folder = write_state(tmp_path, tensors, {}, max_file_bytes=60)
    found = [safetensors.torch.load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert [set(part) for part in found] == [{"c"}, {"a", "b"}, {"d", "losses"}]
    assert files(folder) == [
        *(f"state-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "state.json",
        "state.safetensors.index.json",
    ]
    assert equal(read_state(tmp_path, {}), tensors)
    flip_a_bit(folder / "state-00003-of-00003.safetensors")
    with pytest.raises(TrainingStateError, match=r"state-00003-of-00003\.safetensors is damaged"):
        read_state(tmp_path, {})


def test_removing_states_cut_short_at_any_call_leaves_a_complete_one_or_none(tmp_path, monkeypatch):
    for point in itertools.count():
        directory = tmp_path / str(point)
        folder = write_state(directory, a_state(1), {})
        # As a kill between the rename of one and the removal of the other leaves them.
        os.rename(folder, tmp_path / "aside")
        write_state(directory, a_state(2), {})
        os.rename(tmp_path / "aside", folder)
        for name in ("mine", "training-state-of-mine-1"):
            (directory / name).touch()
        cut = cut_short(lambda d=directory: remove_states(d), point, monkeypatch)
        state = read_state(directory, {})
        assert state is None or step_of(state) == 2
        if not cut:
            break
    assert state is None
    assert point > 4
    assert files(directory) == ["mine", "training-state-of-mine-1"]


def test_a_folder_that_a_kill_left_is_ignored(tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=5)
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "state.json").write_text("{")
    assert trained(settings, directory=tmp_path)[0] == trained(settings)[0]
    assert files(tmp_path) == ["training-state-00000040"]


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def files_of(file):
    return json.loads((file.parent / "state.json").read_text())["files"]


def edit(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TENSORS, flip_a_bit, "its SHA-256 is"),
        (TENSORS, lambda f: f.write_bytes(f.read_bytes()[:-9]), "its SHA-256 is"),
        (TENSORS, Path.unlink, "its SHA-256 is None"),
        ("state.json", Path.unlink, MUST_BE_JSON),
        ("state.json", lambda f: f.write_text(f.read_text()[:50]), MUST_BE_JSON),
        ("state.json", lambda f: f.write_text("[]"), MUST_BE_JSON),
        ("state.json", edit(version=9), "version 9, this ocm reads 3"),
        ("state.json", edit(run=3), MUST_BE_JSON),
        ("state.json", edit(files=None), MUST_BE_JSON),
        (TENSORS, lambda f: edit(files={})(f.parent / "state.json"), "says None"),
        (TENSORS, lambda f: edit(files={TENSORS: None})(f.parent / "state.json"), "says None"),
        (TENSORS, lambda f: shutil.move(f, f.with_name("b.safetensors")), "its SHA-256 is None"),
        ("x", lambda f: edit(files=files_of(f) | {"../x": ""})(f.parent / "state.json"), "is None"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, name, damage, message):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    with pytest.raises(TrainingStateError, match=rf"{name}.*{message}.*resume=False"):
        trained(directory=tmp_path)


def test_a_module_with_state_that_is_no_tensor_is_refused(tmp_path):
    class Counting(nn.Conv2d):
        def get_extra_state(self):
            return {"calls": 1}

    with pytest.raises(TypeError, match="_extra_state of Counting is a dict"):
        train(
            "network", Counting(1, 1, 1), lambda m, x, *_: m(x).mean(), make_data()[0], {}, 10,
            TrainingSettings(num_steps=1), device="cpu", directory=tmp_path, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("learning_rate", 0.001, 0.002),
        ("num_steps", 40, 41),
        ("seed", 0, 1),
        ("batch_size", 8, 4),
        ("mixed_precision", "'no'", "bf16"),
    ],
)
def test_a_state_of_other_settings_is_refused(tmp_path, name, old, new):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    message = rf"state\.json is of another training: {name} was {old}, now it is .*{new}.*; put it"
    with pytest.raises(TrainingStateError, match=message) as raised:
        trained(dataclasses.replace(SETTINGS, **{name: new}), directory=tmp_path)
    assert ("cannot be lengthened" in str(raised.value)) == (name == "num_steps")


def test_a_state_of_another_module_or_other_data_is_refused(tmp_path):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    options = {"device": "cpu", "progress": False, "directory": tmp_path}
    images, conditions = make_data()
    module = make_network(noisy=False, width=17)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    message = (
        r"the state is of another module: module/first\.weight is torch\.float32 of "
        r"shape \(16, 8\) there, and torch\.float32 of shape \(17, 8\) here"
    )
    with pytest.raises(TrainingStateError, match=message):
        train("network", module, loss, images, conditions, NUM_TIMESTEPS, SETTINGS, **options)
    assert equal(module.state_dict(), before)
    module = make_network(noisy=False)
    module.first.requires_grad_(False)
    with pytest.raises(TrainingStateError, match=r"average/first\.bias is .* absent here"):
        train("network", module, loss, images, conditions, NUM_TIMESTEPS, SETTINGS, **options)
    module.first.requires_grad_(True)
    fewer = {"labels": conditions["labels"][1:]}
    with pytest.raises(TrainingStateError, match="num_images was 20, now it is 19"):
        train("network", module, loss, images[1:], fewer, NUM_TIMESTEPS, SETTINGS, **options)
    with pytest.raises(TrainingStateError, match="name was 'network', now it is 'head'"):
        train("head", module, loss, images, conditions, NUM_TIMESTEPS, SETTINGS, **options)
    with pytest.raises(TrainingStateError, match="num_probes was None, now it is 2"):
        trained(directory=tmp_path, details={"num_probes": 2})
    with pytest.raises(TrainingStateError, match=r"module/middle\.mean is absent there"):
        trained(directory=tmp_path, noisy=True)
