"""The runner and its report: what runs, what a failure leaves, and what the report shows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import run
import suites
from harness.timing import write
from records import commands, report

BENCHMARKS = Path(run.__file__).parent
ENVIRONMENT = {
    "commit": "0123456789" * 4, "uncommitted_changes": False, "python": "3.11", "torch": "2.13",
    "triton": "3.7", "processor": "1 x abacus", "threads": 1, "device": "cpu",
}  # fmt: skip


def suite(value=1.5, error=None):
    """A suite of one number, or one that raises."""
    module = ModuleType("a suite")

    def run_it(setting):
        if error is not None:
            raise error
        record = {"seeds": {"noise": 3}, "environment": ENVIRONMENT, "value": value}
        return record, module.report(record)

    module.run = run_it
    module.report = lambda record: f"The value is {record['value']}."
    module.plot = lambda record, path: path.write_bytes(b"\x89PNG")
    return module


@pytest.fixture
def three_suites(monkeypatch):
    """Stand-ins for the suites: the second fails, the third does not import."""
    modules = {"one": suite(), "two": suite(error=RuntimeError("it broke"))}
    monkeypatch.setattr(suites, "SUITES", {"one": "the first", "two": "the second", "three": "?"})

    def load(name):
        if name not in modules:
            raise ImportError("no module three")
        return modules[name]

    monkeypatch.setattr(suites, "load", load)
    return modules


def invoke(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    run.main()


def test_a_suite_that_fails_stops_no_other_and_is_named(three_suites, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        invoke(monkeypatch, "--quick", "--out", tmp_path)
    assert stopped.value.code == 1
    text = (tmp_path / "report.md").read_text()
    assert "**FAILED: two.** RuntimeError: it broke" in text
    assert "**FAILED: three.** ImportError: no module three" in text
    assert "The value is 1.5." in text
    assert not (tmp_path / "two.json").exists()
    three_suites["two"] = suite(2.5)
    invoke(monkeypatch, "--suite", "two", "--out", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "FAILED" not in text
    assert text.index("The value is 1.5.") < text.index("The value is 2.5.")


def test_a_record_of_an_earlier_run_is_said_to_be_that(three_suites, monkeypatch, tmp_path):
    invoke(monkeypatch, "--suite", "one", "--out", tmp_path)
    three_suites["one"] = suite(error=RuntimeError("it broke"))
    with pytest.raises(SystemExit):
        invoke(monkeypatch, "--suite", "one", "--out", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "it broke What is shown below is from an earlier run." in text


def test_records_say_what_makes_them_again(three_suites, monkeypatch, tmp_path):
    invoke(monkeypatch, "--quick", "--out", tmp_path, "--suite", "one")
    record = json.loads((tmp_path / "one.json").read_text())
    assert record["suite"] == "one"
    assert record["command"] == "python benchmarks/run.py --suite one --quick"
    assert record["date"].endswith("+00:00")
    assert record["seconds"] >= 0
    text = (tmp_path / "report.md").read_text()
    section = text.split("## one\n\n")[1]
    assert section.startswith(
        "The first: `python benchmarks/run.py --suite one --quick` at 0123456, seeds noise: 3; "
        "rows in [one.json](one.json)."
    )
    assert "![one](one.png)" in section
    (row,) = [line for line in text.splitlines() if line.startswith("| [one]")]
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["0123456", "no"]
    assert "1 x abacus" in row


def test_seeds_are_listed(three_suites, monkeypatch, tmp_path):
    invoke(monkeypatch, "--suite", "one", "--out", tmp_path)
    record = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps(record | {"seeds": [0, 1, 2]}))
    assert ", seeds 0, 1, 2; rows in" in report.text(tmp_path)


def test_the_report_is_made_again_from_records_alone(three_suites, monkeypatch, tmp_path):
    invoke(monkeypatch, "--suite", "one", "--out", tmp_path)
    before = (tmp_path / "report.md").read_text()
    for name in ("report.md", "one.md", "one.png"):
        (tmp_path / name).unlink()
    commands.main(["report", str(tmp_path), "--plots"])
    assert (tmp_path / "report.md").read_text() == before
    assert (tmp_path / "one.png").exists()


def test_a_report_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold a record"):
        report.text(tmp_path)


def test_every_suite_is_run_by_default_but_cifar10_without_data(tmp_path):
    names, left_out = run.chosen(["all"], tmp_path)
    assert names == [name for name in suites.SUITES if name != "cifar10"]
    assert "no train.parquet" in left_out["cifar10"]
    with pytest.raises(SystemExit, match=r"--suite cifar10: no train\.parquet"):
        run.chosen(["mixtures", "cifar10"], tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").touch()
    assert run.chosen(["all"], tmp_path) == (list(suites.SUITES), {})
    asked = ["mixtures", "kernels", "mixtures"]
    assert run.chosen(asked, tmp_path) == (["kernels", "mixtures"], {})


def test_what_is_left_out_is_said(three_suites, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suites, "SUITES", {"one": "the first", "cifar10": "images"})
    invoke(monkeypatch, "--out", tmp_path, "--data", tmp_path)
    assert "LEFT OUT cifar10: no train.parquet" in capsys.readouterr().out
    assert "**LEFT OUT: cifar10.** no train.parquet" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_suite_has_what_the_runner_calls(name):
    module = suites.load(name)
    assert callable(module.run)
    assert module.__doc__


def test_the_recorded_tables_are_those_of_the_records():
    """What a suite prints from a committed record is what was committed beside it."""
    checked = []
    for file in sorted((BENCHMARKS / "results").glob("*/*.json")):
        if file.stem in suites.SUITES and hasattr(suites.load(file.stem), "report"):
            made = suites.load(file.stem).report(json.loads(file.read_text()))
            assert made + "\n" == file.with_suffix(".md").read_text(), file
            checked.append(file.stem)
    assert {"products", "kernels", "estimators", "sampling", "machine_code"} <= set(checked)


def test_the_committed_report_is_that_of_the_records():
    """If this fails, `python benchmarks/records report benchmarks/results/cpu` writes it again."""
    directory = BENCHMARKS / "results" / "cpu"
    assert (directory / report.NAME).read_text() == report.text(directory)


@pytest.mark.soak
def test_small_cases_pass_and_are_shown(tmp_path):
    """What `make bench-small` does, with as few rounds as there can be."""
    # pytest-benchmark writes nothing inside of a worker of xdist, which this process may be.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    answer = subprocess.run(
        [
            # Not `python -m pytest`, which would put kernels/ on the import path.
            *(str(Path(sys.executable).parent / "pytest"), "--quiet", "--benchmark-min-rounds=1"),
            *("--benchmark-max-time=0.001", "--benchmark-warmup=off"),
            *(f"--benchmark-json={tmp_path / 'small.json'}", "benchmarks"),
        ],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
        env=outside,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    text = report.text(tmp_path)
    record = json.loads((tmp_path / "small.json").read_text())
    assert f"`make bench-small` at {record['commit_info']['id'][:7]}" in text
    assert len(record["benchmarks"]) >= 13
    for case in record["benchmarks"]:
        assert f"| {case['name']} | {1e3 * case['stats']['median']:.3f} |" in text


def test_writing_keeps_the_origin_in_front(tmp_path):
    record = write(
        tmp_path, "one", {"suite": "one", "seconds": 5, "value": 1}, "a table", command="c",
        seconds=1.23,
    )  # fmt: skip
    assert list(record) == ["suite", "command", "date", "seconds", "value"]
    assert record["seconds"] == 1.2
    assert json.loads((tmp_path / "one.json").read_text()) == record
    assert (tmp_path / "one.md").read_text() == "a table\n"
