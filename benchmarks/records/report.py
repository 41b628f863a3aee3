"""Write report.md from the records in a directory: ``python benchmarks/records report DIR``.

It needs nothing but the JSON files that ``benchmarks/run.py`` left there, and those of
``make bench-small`` if there are some; with ``--plots`` it draws the plots again too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import suites

from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table

NAME = "report.md"
# What the latest run of run.py came to.
RUN = "run.json"
# What pytest-benchmark wrote.
SMALL = "small.json"

_VERSIONS = ("python", "torch", "triton")
_COLUMNS = {
    **dict.fromkeys(("suite", "command", "commit", "uncommitted_changes", "date"), ""),
    **{"device": "", "processor": "", "threads": "d", "seconds": ".0f"},
    **dict.fromkeys(_VERSIONS, ""),
}


def write_run(
    directory: Path, command: str, failed: Mapping[str, str], left_out: Mapping[str, str]
) -> None:
    """Write run.json: the command of the latest run, and which suites failed or were left out."""
    directory.mkdir(parents=True, exist_ok=True)
    entry: Row = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failed": dict(failed),
        "left_out": dict(left_out),
    }
    (directory / RUN).write_text(json.dumps(entry, indent=2) + "\n")


def records(directory: Path) -> dict[str, Row]:
    """Return the records of a directory by suite, in the order of the suites."""
    files = {name: directory / f"{name}.json" for name in suites.SUITES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def write(directory: Path) -> Path:
    """Write report.md from the records in ``directory``, and return its path.

    Raises:
        ValueError: If there is no record and no failure to show.
    """
    file = directory / NAME
    file.write_text(text(directory))
    return file


def text(directory: Path) -> str:
    """Return the report in Markdown: how it was run, what ran, and a section for each suite.

    Raises:
        ValueError: If there is no record and no failure to show.
    """
    found, run, small = records(directory), directory / RUN, directory / SMALL
    if not (found or run.exists() or small.exists()):
        raise ValueError(
            f"{directory} must hold a record of benchmarks/run.py, <suite>.json, and holds none"
        )
    sections = ["# Benchmarks"]
    if run.exists():
        sections += _run_section(json.loads(run.read_text()), found)
    if found:
        rows = [_origin(name, record) for name, record in found.items()]
        sections.append(markdown_table(rows, _COLUMNS))
    sections += [_section(name, record, directory) for name, record in found.items()]
    if small.exists():
        sections.append(_small_section(json.loads(small.read_text())))
    return "\n\n".join(sections) + "\n"


def plot(directory: Path) -> None:
    """Draw the plots of every record in ``directory`` again."""
    for name, record in records(directory).items():
        suite = suites.load(name)
        if hasattr(suite, "plot"):
            suite.plot(record, directory / f"{name}.png")


def _run_section(latest: Row, found: Mapping[str, Row]) -> list[str]:
    sections = [f"The latest run: `{latest['command']}`, {latest['date']}."]
    for key, heading in (("failed", "FAILED"), ("left_out", "LEFT OUT")):
        for name, reason in latest[key].items():
            earlier = " What is shown below is from an earlier run." if name in found else ""
            sections.append(f"**{heading}: {name}.** {reason}{earlier}")
    return sections


def _origin(name: str, record: Row) -> Row:
    """Return the row of a record in the table of what ran."""
    machine = record["environment"]
    return {
        "suite": f"[{name}](#{name})",
        "command": f"`{record['command']}`",
        "commit": (machine["commit"] or "not in a checkout")[:7],
        "uncommitted_changes": "yes" if machine["uncommitted_changes"] else "no",
        "date": record.get("date"),
        "device": machine["device"],
        "processor": machine.get("gpu") or machine["processor"],
        "threads": machine["threads"],
        "seconds": record.get("seconds"),
        **{version: machine[version] for version in _VERSIONS},
    }


def _section(name: str, record: Row, directory: Path) -> str:
    commit = (record["environment"]["commit"] or "no commit")[:7]
    what = suites.SUITES[name]
    parts = [
        f"## {name}",
        f"{what[0].upper()}{what[1:]}: `{record['command']}` at {commit}"
        f"{_seeds(record)}; rows in [{name}.json]({name}.json).",
        _tables(name, record, directory),
        *(
            f"![{file.stem}]({file.name})"
            for file in sorted(directory.glob(f"{name}*.png"))
            if re.fullmatch(rf"{name}(_.*)?", file.stem)
        ),
    ]
    return "\n\n".join(parts)


def _tables(name: str, record: Row, directory: Path) -> str:
    """Return the tables of a record, by its suite; or say why there are none."""
    try:
        suite = suites.load(name)
    except Exception as error:
        # It may be the very suite that failed: the others are still to be shown.
        return f"**No tables:** the suite does not import: {type(error).__name__}: {error}"
    if hasattr(suite, "report"):
        return str(suite.report(record))
    return (directory / f"{name}.md").read_text().strip()


def _seeds(record: Row) -> str:
    seeds = record.get("seeds") or []
    if isinstance(seeds, dict):
        seeds = [f"{what}: {seed}" for what, seed in seeds.items()]
    return f", seeds {', '.join(map(str, seeds))}" if seeds else ""


def _small_section(record: Row) -> str:
    """Return the section of what pytest-benchmark measured."""
    commit = record["commit_info"]
    changes = ", with uncommitted changes" if commit["dirty"] else ""
    rows = [
        {
            "case": case["name"],
            "median_milliseconds": 1e3 * case["stats"]["median"],
            "interquartile_range": 1e3 * case["stats"]["iqr"],
            "rounds": case["stats"]["rounds"],
        }
        for case in record["benchmarks"]
    ]
    columns = dict.fromkeys(("median_milliseconds", "interquartile_range"), ".3f")
    return (
        f"## small\n\nCases small enough for every machine: `make bench-small` at "
        f"{commit['id'][:7]}{changes}, {record['datetime'][:19]}; rows in [{SMALL}]({SMALL}).\n\n"
        f"{markdown_table(rows, {'case': '', **columns, 'rounds': 'd'})}"
    )
