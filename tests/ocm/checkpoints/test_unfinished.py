"""Parts of a computation are kept for the same computation, and for no other."""

import shutil

import pytest
import torch

from ocm.checkpoints.unfinished import NOT_KEPT, Parts, digest, fingerprint, parts_of


def never():
    raise AssertionError("this was computed before")


def test_what_is_kept_is_not_computed_again(tmp_path):
    parts, removed = parts_of(tmp_path / "a", {"seed": 1})
    assert removed is None
    both = torch.arange(4.0)
    assert parts.json("mean", lambda: (1.5, [0.1])) == [1.5, [0.1]]
    found = parts.tensors("rows", lambda: {"a": both, "same": both, "part": both[::2]})
    assert torch.equal(found["part"], torch.tensor([0.0, 2.0]))

    again, removed = parts_of(tmp_path / "a", {"seed": 1})
    assert removed is None
    assert again.names() == ["mean", "rows"]
    assert again.json("mean", never) == [1.5, [0.1]]
    kept = again.tensors("rows", never)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_json_and_float64_come_back_to_the_bit(tmp_path):
    parts, _ = parts_of(tmp_path / "a", {})
    value = (torch.rand(50, dtype=torch.float64) * 1e-300).tolist()
    assert parts.json("a", lambda: value) == value
    double = torch.rand(50, dtype=torch.float64)
    assert torch.equal(parts.tensors("b", lambda: {"x": double})["x"], double)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"steps": [1, 2]}, {"steps": [1, 3]}, "steps was [1, 2], now [1, 3]"),
        ({"eta": None}, {}, "eta was None, now missing"),
    ],
)
def test_other_settings_remove_what_there_is(tmp_path, before, now, said):
    parts, _ = parts_of(tmp_path / "a", {"seed": 1, **before})
    parts.json("mean", lambda: 1)
    parts, removed = parts_of(tmp_path / "a", {"seed": 1, **now})
    assert removed.endswith(f"which has other settings: {said}")
    assert parts.names() == []
    assert parts.json("mean", lambda: 2) == 2


def test_parts_without_settings_are_of_no_computation(tmp_path):
    """As a process leaves them that is killed while it removes them."""
    parts, _ = parts_of(tmp_path / "a", {"seed": 1})
    parts.json("mean", lambda: 1)
    (tmp_path / "a" / "settings.json").unlink()
    assert parts_of(tmp_path / "a", {"seed": 1})[0].names() == []


def test_tuples_in_settings_are_lists_on_disk(tmp_path):
    parts_of(tmp_path / "a", {"steps": (1, 2)})[0].json("mean", lambda: 1)
    assert parts_of(tmp_path / "a", {"steps": (1, 2)})[0].names() == ["mean"]


def test_what_fails_keeps_nothing(tmp_path):
    parts, _ = parts_of(tmp_path / "a", {})
    with pytest.raises(AssertionError):
        parts.json("mean", never)
    with pytest.raises(ValueError, match="not JSON compliant"):
        parts.json("mean", lambda: float("nan"))
    assert parts.names() == []


@pytest.mark.parametrize("text", ["", '{"valu', '{"other": 1}', "3"])
def test_damaged_json_is_named(tmp_path, text):
    parts, _ = parts_of(tmp_path / "a", {})
    file = tmp_path / "a" / "mean.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"mean\.json is damaged: .*remove {tmp_path / 'a'}"):
        parts.json("mean", never)


def test_removing_leaves_what_others_keep_beside(tmp_path):
    first, _ = parts_of(tmp_path / "unfinished" / "a", {})
    second, _ = parts_of(tmp_path / "unfinished" / "b", {})
    first.remove()
    assert second.folder.is_dir()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_unless_asked_for():
    assert [NOT_KEPT.json("a", lambda number=n: number) for n in (1, 2)] == [1, 2]
    assert NOT_KEPT.names() == []
    NOT_KEPT.remove()


def test_the_fingerprint_is_that_of_the_model_alone(tmp_path):
    folder = tmp_path / "model"
    read = ["ocm.json", "tables.json", "denoiser/config.json", "heads/ml.safetensors"]
    for name in read:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("a")
    before = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    for result in ("calibration.json", "unfinished/sample/settings.json", "samples.safetensors"):
        (folder / result).parent.mkdir(parents=True, exist_ok=True)
        (folder / result).write_text("a")
    assert fingerprint(folder) == before
    for name in read:
        (folder / name).write_text("b")
        assert fingerprint(folder) != before
        (folder / name).write_text("a")
    assert fingerprint(folder) == before
    without = fingerprint(folder, without=("tables.json",))
    (folder / "tables.json").write_text("b")
    assert fingerprint(folder, without=("tables.json",)) == without


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([0.0, 1.0])},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"b": torch.zeros(2)},
        {"a": None},
        {},
    ],
)
def test_the_digest_is_that_of_values_types_and_shapes(other):
    assert digest(other) != digest({"a": torch.zeros(2)})
    assert digest({"a": torch.zeros(4)[::2]}) == digest({"a": torch.zeros(2)})


def test_parts_that_are_being_written_are_none(tmp_path):
    (tmp_path / ".partial-mean.json").write_text("{")
    assert Parts(tmp_path).names() == []
