"""Comparing two records: rows matched by what identifies them, changes sorted, differences said."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from records import commands
from records.compare import NotComparableError, compare, read, text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

RECORD = {
    "suite": "example",
    "rounds": 5,
    "checks": {"to the loop": 1e-7},
    "bits": {"ocm": {"5": 8.0, "10": 4.0}},
    "environment": {"commit": "a" * 40, "processor": "one", "uncommitted_changes": False},
    "rows": [
        {"way": "loop", "M": 4, "passes": 8, "seconds": 2.0, "note": None},
        {"way": "loop", "M": 16, "passes": 32, "seconds": 8.0, "note": None},
        {"way": "ours", "M": 4, "passes": 5, "seconds": 1.0, "note": None},
    ],
}


def changed(change):
    record = copy.deepcopy(RECORD)
    change(record)
    return record


def test_equal_records_have_no_changes():
    found = compare(RECORD, copy.deepcopy(RECORD))
    assert found.changes.empty
    assert (found.only_old, found.only_new, found.notes) == ([], [], [])
    # One check, two bounds, and passes and seconds of three rows: M tells rows apart.
    assert found.num_compared == 9


def test_changes_are_found_and_the_largest_is_first():
    def change(record):
        record["rows"].reverse()
        record["rows"][0]["seconds"] = 1.2
        record["rows"][2]["seconds"] = 1.0
        record["rows"][1]["passes"] = 33
        record["bits"]["ocm"]["10"] = 4.4

    found = compare(RECORD, changed(change))
    assert found.changes[["row", "field", "old", "new"]].to_numpy().tolist() == [
        ["rows: loop, M = 4", "seconds", 2.0, 1.0],
        ["rows: ours, M = 4", "seconds", 1.0, 1.2],
        ["bits, ocm", "10", 4.0, 4.4],
    ]
    assert found.changes["ratio"].tolist() == pytest.approx([0.5, 1.2, 1.1])
    assert found.changes["size"].tolist() == pytest.approx([2.0, 1.2, 1.1])
    assert len(compare(RECORD, changed(change), 1.01).changes) == 4
    assert len(compare(RECORD, changed(change), 1.15).changes) == 2
    table = text(found, 1.05)
    assert "| rows: loop, M = 4 | seconds | 2 | 1 | 0.500 |" in table
    assert "3 of 9 numbers differ" in table


def test_a_change_of_sign_or_to_nan_is_the_largest():
    def change(record):
        record["rows"][0]["seconds"] = -2.0
        record["rows"][1]["seconds"] = float("nan")
        record["rows"][2]["seconds"] = 0.0

    found = compare(RECORD, changed(change), 100.0)
    assert found.changes["ratio"].isna().tolist() == [True] * 3
    assert "| rows: loop, M = 16 | seconds | 8 | nan |  |" in text(found, 100.0)
    assert compare(changed(change), changed(change)).changes.empty


def test_rows_in_one_record_only_are_listed():
    def change(record):
        record["rows"][0]["way"] = "another"
        del record["rows"][1]["seconds"]

    found = compare(RECORD, changed(change))
    assert found.only_old == ["rows: loop, M = 4", "rows: loop, M = 16: seconds"]
    assert found.only_new == ["rows: another, M = 4"]
    assert "In the new record alone:\n\n- rows: another, M = 4" in text(found, 1.05)


def test_other_machines_commits_and_settings_are_said():
    def change(record):
        record["environment"] = {
            "commit": "b" * 40, "processor": "two", "uncommitted_changes": True,
        }  # fmt: skip
        record["rounds"] = 9

    notes = "\n".join(compare(RECORD, changed(change)).notes)
    assert f"commit differs: {'a' * 40} and {'b' * 40}" in notes
    assert "the machines differ" in notes
    assert "the new record has uncommitted changes" in notes
    assert "setting 'rounds' differs: 5 and 9" in notes


def test_what_cannot_be_compared_says_why(tmp_path):
    with pytest.raises(NotComparableError, match="'example' and 'other'"):
        compare(RECORD, RECORD | {"suite": "other"})
    with pytest.raises(NotComparableError, match="no number in common"):
        compare(RECORD, {"suite": "example", "rows": []})
    with pytest.raises(ValueError, match=r"threshold must be 1 or more, got 0\.5"):
        compare(RECORD, RECORD, 0.5)
    with pytest.raises(NotComparableError, match="cannot be read as JSON"):
        read(tmp_path / "nothing.json")
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"benchmarks": [], "machine_info": {}}))
    with pytest.raises(NotComparableError, match="pytest-benchmark compare"):
        read(file)
    file.write_text("[]")
    with pytest.raises(NotComparableError, match="got a list"):
        read(file)


# But that of pytest-benchmark, which has a comparison of its own, and that of no command.
OTHERS = ("small", "cifar10_tried")
RECORDS = [file for file in sorted(RESULTS.glob("*/*.json")) if file.stem not in OTHERS]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_rows_of_recorded_results_are_told_apart_whatever_their_order(file):
    record = read(file)
    tables = {key: value for key, value in record.items() if isinstance(value, list)}
    turned = record | {key: rows[::-1] for key, rows in tables.items() if isinstance(rows[0], dict)}
    found = compare(record, turned)
    assert found.num_compared >= 10
    assert found.changes.empty
    assert (found.only_old, found.only_new) == ([], [])


def test_the_command_compares_and_fails_only_where_it_cannot(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(RECORD))
    new.write_text(json.dumps(changed(lambda record: record["rows"][0].update(seconds=3.0))))
    commands.main(["compare", str(old), str(new)])
    assert "| rows: loop, M = 4 | seconds | 2 | 3 | 1.500 |" in capsys.readouterr().out
    script = [sys.executable, str(ROOT / "benchmarks" / "records"), "compare", old, old.parent]
    answer = subprocess.run(script, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ")
