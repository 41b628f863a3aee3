"""A checkpoint that is being replaced is the old one or the new one, whole, at every moment."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from full_disk import files_of_at_most

import ocm
from ocm import checkpoints
from ocm.checkpoints import layout
from ocm.diffusion.tables import Table
from ocm.training.small_unet import small_unet


def filled(module, value):
    with torch.no_grad():
        for parameter in module.requires_grad_(False).parameters():
            parameter.fill_(value)
    return module


def make(value, *, heads=("ocm",), denoiser=0.0, data_covariance=None):
    """Return a checkpoint whose heads, tables and number of grey levels all say ``value``."""
    unet = filled(small_unet((1, 2, 2), width=8), denoiser)
    model = ocm.Denoiser(unet, ocm.cosine(), data_covariance=data_covariance).freeze()
    kinds = {"ocm": ocm.OptimalCovarianceMatching, "npr": ocm.NPR}
    learned = {
        name: kinds[name](model, filled(ocm.make_head(model, "simple"), value), ocm.PAPER)
        for name in heads
    }
    return checkpoints.Checkpoint(
        model, (1, 2, 2), int(value), "digits", learned,
        calibrations={"ocm": Table({1: [value, value]})},
    )  # fmt: skip


def said(checkpoint):
    """Return everything by which the checkpoints of ``make`` differ."""
    heads = {
        name: {parameter.flatten()[0].item() for parameter in covariance.head.parameters()}
        for name, covariance in checkpoint.learned.items()
    }
    covariance = checkpoint.denoiser.data_covariance
    return (
        checkpoint.levels,
        heads,
        checkpoint.calibrations["ocm"].to_json()["values"],
        {parameter.flatten()[0].item() for parameter in checkpoint.denoiser.backbone.parameters()},
        None if covariance is None else torch.as_tensor(covariance).flatten()[0].item(),
    )


def files(directory):
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


CALLS = {
    os: ("rename", "replace", "unlink", "rmdir", "mkdir"),
    Path: ("write_text",),
    diffusers.UNet2DModel: ("save_pretrained",),
}


class KilledError(BaseException):
    pass


def cut_short(function, point, monkeypatch):
    """Run ``function`` up to its ``point``-th call of the system, and say if it got that far.

    As after a kill, no call of the system works from there on.
    """
    calls = itertools.count()

    def counted(call):
        def counting(*args, **options):
            if next(calls) >= point:
                raise KilledError
            return call(*args, **options)

        return counting

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # which takes long, and which no kill undoes
        for owner, names in CALLS.items():
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            function()
        except KilledError:
            return True
    return False


OLD = {"heads": ("ocm", "npr"), "data_covariance": torch.full((1, 2, 2), 5.0)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(None, {}, marks=pytest.mark.soak),
        (OLD, {"denoiser": 1.0}),  # everything changes
        # There is more than before.
        pytest.param({}, {"heads": ("ocm", "npr"), "data_covariance": 3.0}, marks=pytest.mark.soak),
        # There is less, and the denoiser stays.
        pytest.param(OLD, {"heads": ("npr",)}, marks=pytest.mark.soak),
    ],
)
def test_a_writer_cut_short_at_any_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, old, new):
    new, found = make(3, **new), []
    before, expected, contents = tmp_path / "before", tmp_path / "expected", {}
    if old is not None:
        checkpoints.save(make(2, **old), before)
        contents[2] = said(checkpoints.load(before))
    checkpoints.save(new, expected)
    contents[3] = said(checkpoints.load(expected))
    for point in itertools.count():
        directory = tmp_path / "cut"
        if old is not None:
            shutil.copytree(before, directory)
        cut = cut_short(lambda d=directory: checkpoints.save(new, d), point, monkeypatch)
        if old is None and not (directory / "ocm.json").exists():
            with pytest.raises(checkpoints.CheckpointError, match=r"ocm\.json is missing"):
                checkpoints.load(directory)
            found.append(0)
        else:
            loaded = checkpoints.load(directory)
            found.append(loaded.levels)
            assert said(loaded) == contents[loaded.levels]
        if point % 5 == 0 or not cut:  # seldom, for time
            checkpoints.save(new, directory)
            assert files(directory) == files(expected)
            for file in files(directory):
                assert (directory / file).read_bytes() == (expected / file).read_bytes()
        if directory.exists():
            shutil.rmtree(directory)
        if not cut:
            break
    assert found == sorted(found)
    assert set(found) == {0 if old is None else 2, 3}
    assert found.count(3) > 2  # parts were on the way to their places


def test_tables_written_after_a_kill_are_not_lost(tmp_path, monkeypatch):
    """The kill comes when the new checkpoint counts, and none of its parts is in its place."""
    checkpoints.save(make(2), tmp_path)
    new = make(3)
    for point in itertools.count():
        assert cut_short(lambda p=point: checkpoints.save(new, tmp_path), point, monkeypatch)
        if checkpoints.load(tmp_path).levels == 3:
            break
    assert list(tmp_path.glob(".parts-*/tables.json"))
    fitted = dataclasses.replace(new, calibrations={"ocm": Table({1: [9.0, 9.0]})})
    checkpoints.save_tables(fitted, tmp_path)
    assert checkpoints.load(tmp_path).calibrations["ocm"].to_json()["values"] == [[9.0, 9.0]]
    assert not list(tmp_path.glob(".*"))


def test_what_does_not_change_is_not_touched(tmp_path):
    checkpoints.save(make(2, heads=("npr", "ocm")), tmp_path)
    before = {file: (tmp_path / file).stat().st_ino for file in files(tmp_path)}
    loaded = checkpoints.load(tmp_path)
    learned = loaded.learned | {"ocm": make(3).learned["ocm"]}
    checkpoints.save(dataclasses.replace(loaded, learned=learned), tmp_path)
    changed = {f for f in files(tmp_path) if (tmp_path / f).stat().st_ino != before[f]}
    assert changed == {"heads/ocm.safetensors", "ocm.json"}


def test_a_checkpoint_of_earlier_versions_is_read_and_replaced(tmp_path):
    """It names no revision, and has a data covariance where there is its file."""
    checkpoints.save(make(2, **OLD), tmp_path)
    description = json.loads((tmp_path / "ocm.json").read_text())
    del description["revision"], description["data_covariance"]
    (tmp_path / "ocm.json").write_text(json.dumps(description))
    assert said(checkpoints.load(tmp_path)) == said(make(2, **OLD))
    checkpoints.save(make(3), tmp_path)
    assert said(checkpoints.load(tmp_path)) == said(make(3))
    assert files(tmp_path) == [
        *("denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"),
        *("heads/ocm.safetensors", "ocm.json", "tables.json"),
    ]


@pytest.mark.parametrize("revision", ["../elsewhere", 7, None, ["a"]])
def test_a_revision_that_is_no_name_is_refused_and_nothing_is_moved_by_it(tmp_path, revision):
    directory = tmp_path / "checkpoint"
    checkpoints.save(make(2), directory)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    description = json.loads((directory / "ocm.json").read_text()) | {"revision": revision}
    (directory / "ocm.json").write_text(json.dumps(description))
    with pytest.raises(checkpoints.CheckpointError, match="revision must be 16 hexadecimal digits"):
        checkpoints.load(directory)
    layout.settle(directory)
    checkpoints.save(make(3), directory)
    assert checkpoints.load(directory).levels == 3
    assert files(tmp_path / "elsewhere") == ["mine"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": "else"}', "[" * 100_000])
def test_a_folder_of_another_description_is_replaced(tmp_path, text):
    (tmp_path / "ocm.json").write_text(text)
    checkpoints.save(make(3), tmp_path)
    assert checkpoints.load(tmp_path).levels == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["head", "denoiser", "buffer", "data"])
def test_weights_that_are_not_finite_are_never_written(tmp_path, where, value):
    checkpoints.save(make(2), tmp_path)
    broken = make(3, data_covariance=torch.ones(1, 2, 2))
    if where == "head":
        broken.learned["ocm"].head.conv.bias.fill_(value)
    elif where == "denoiser":
        broken.denoiser.backbone.conv_in.bias[1] = value
    elif where == "buffer":
        broken.denoiser.backbone.register_buffer("mean", torch.tensor([0.0, value]))
    else:
        broken.denoiser.data_covariance[0, 1, 1] = value
    with pytest.raises(ValueError, match=r"must hold finite weights, and \S+ of the \w+"):
        checkpoints.save(broken, tmp_path)
    assert said(checkpoints.load(tmp_path)) == said(make(2))


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    large = make(3, denoiser=1e6)
    with pytest.raises(ValueError, match=r"NaN or infinity in torch\.float16"):
        checkpoints.save(large, tmp_path, dtype=torch.float16)
    assert files(tmp_path) == []
    checkpoints.save(large, tmp_path, dtype=torch.bfloat16)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_checkpoint(tmp_path):
    checkpoints.save(make(2), tmp_path)
    before = files(tmp_path)
    message = f"{tmp_path}.* cannot be written: .*File too large"
    with files_of_at_most(20_000), pytest.raises(OSError, match=message):
        checkpoints.save(make(3, denoiser=1.0), tmp_path)
    assert files(tmp_path) == before
    assert said(checkpoints.load(tmp_path)) == said(make(2))
    checkpoints.save(make(3, denoiser=1.0), tmp_path)
    assert checkpoints.load(tmp_path).levels == 3
