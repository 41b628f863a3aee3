"""Compare two records of one suite: ``python benchmarks/records compare OLD.json NEW.json``.

Prints a Markdown table of the measured numbers that differ, the largest change first, and says what
else differs: commit, hardware, versions, settings, rows that only one of them has. It takes any
record of benchmarks/run.py, ``ocm demo`` or ``ocm evaluate``. What pytest-benchmark wrote
(``make bench-small``) is for its own comparison: ``pytest-benchmark compare OLD.json NEW.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.timing import markdown

from ocm.evaluation.environment import Row

# What places a record rather than being measured.
_ORIGIN = ("environment", "command", "date", "seconds")
_ENVIRONMENT = ("commit", "uncommitted_changes", "device", "gpu", "processor", "threads")
_VERSIONS = ("python", "torch", "triton", "platform")
_HARDWARE = ("device", "gpu", "processor", "threads")

Key = tuple[str, ...]
"""Where a number stands: its table or folder, what tells its row apart, and its field."""


class NotComparableError(ValueError):
    """Two files are not records of one suite."""


@dataclass(frozen=True)
class Change:
    """A measured number that differs.

    Attributes:
        place: Table, and the fields that tell its row apart.
        field: Name of the number.
        old: As the old record has it.
        new: As the new one has it.
    """

    place: str
    field: str
    old: float
    new: float

    @property
    def ratio(self) -> float | None:
        """New over old; None if they have no ratio: one is zero or not finite, or signs differ."""
        finite = math.isfinite(self.old) and math.isfinite(self.new)
        return self.new / self.old if finite and self.old * self.new > 0 else None

    @property
    def size(self) -> float:
        """How many times larger the larger one is; infinite if there is no ratio."""
        return math.inf if self.ratio is None else max(self.ratio, 1.0 / self.ratio)


@dataclass(frozen=True)
class Comparison:
    """What comparing two records found.

    Attributes:
        changes: Numbers that differ by more than the threshold, the largest change first.
        only_old: Rows that the old record alone has.
        only_new: Rows that the new record alone has.
        notes: What else differs.
        num_compared: Numbers that both have.
    """

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    notes: list[str]
    num_compared: int


def compare(old: Row, new: Row, threshold: float = 1.05) -> Comparison:
    """Compare two records.

    Rows of a table are told apart by their text and truth values, then by as many of their
    integers, in order, as are needed; every other number is measured. Numbers outside of tables are
    known by their names; text there is a setting.

    Args:
        old: A record.
        new: Another of the same suite.
        threshold: Show numbers whose ratio is this or more, one way or the other; at least 1.

    Raises:
        NotComparableError: If they are of different suites, or have no number in common.
        ValueError: If the threshold is below 1.
    """
    if not threshold >= 1.0:
        raise ValueError(f"threshold must be 1 or more, got {threshold}")
    if old.get("suite") != new.get("suite"):
        raise NotComparableError(
            f"the records must be of one suite, got {old.get('suite')!r} and {new.get('suite')!r}"
        )
    identities = _identities([*_tables(old), *_tables(new)])
    before, after = _numbers(old, identities), _numbers(new, identities)
    common = [key for key in before if key in after]
    if not common:
        raise NotComparableError("the records must measure the same, and have no number in common")
    changes = [Change(key[0], key[1], before[key], after[key]) for key in common]
    shown = [c for c in changes if c.size >= threshold and not _same(c.old, c.new)]
    return Comparison(
        changes=sorted(shown, key=lambda change: -change.size),
        only_old=_places(before, after),
        only_new=_places(after, before),
        notes=_notes(old, new),
        num_compared=len(common),
    )


def _same(old: float, new: float) -> bool:
    return old == new or (math.isnan(old) and math.isnan(new))


def _places(these: Mapping[Key, float], those: Mapping[Key, float]) -> list[str]:
    """Return the rows of which the others have nothing, and fields that they lack."""
    rows = {place for place, _ in those}
    missing = [key for key in these if key not in those]
    named = [place if place not in rows else f"{place}: {field}" for place, field in missing]
    return list(dict.fromkeys(named))


# Flattening


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _parts(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every table and every leaf of a record, with its path."""
    for key, value in record.items():
        place = f"{path}{key}"
        if isinstance(value, dict):
            yield from _parts(value, f"{place}, ")
        elif isinstance(value, list) and not _is_table(value):
            yield from _parts(dict(enumerate(value)), f"{place}, ")
        else:
            yield place, value


def _without_origin(record: Row) -> Row:
    return {key: value for key, value in record.items() if key not in _ORIGIN}


def _tables(record: Row) -> list[tuple[str, list[Row]]]:
    return [
        (place, [dict(_parts(row)) for row in value])
        for place, value in _parts(_without_origin(record))
        if _is_table(value)
    ]


def _identities(tables: Sequence[tuple[str, list[Row]]]) -> dict[str, list[str]]:
    """Return the fields that tell the rows of each table apart, in both records alike."""
    found: dict[str, list[str]] = {}
    for place in dict.fromkeys(place for place, _ in tables):
        versions = [rows for name, rows in tables if name == place]
        fields = list(dict.fromkeys(f for rows in versions for row in rows for f in row))
        values = {f: [row.get(f) for rows in versions for row in rows] for f in fields}
        chosen = [f for f in fields if any(isinstance(v, (str, bool)) for v in values[f])]
        integers = [f for f in fields if f not in chosen and _is_integer(values[f])]
        for field in integers:
            if _distinct(versions, [*chosen, field]) > _distinct(versions, chosen):
                chosen.append(field)
        found[place] = chosen
    return found


def _is_integer(values: Sequence[object]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(type(value) is int for value in known)


def _distinct(versions: Sequence[list[Row]], fields: Sequence[str]) -> int:
    """Return how many rows the fields tell apart, within each version."""
    return sum(len({tuple(row.get(f) for f in fields) for row in rows}) for rows in versions)


def _numbers(record: Row, identities: Mapping[str, list[str]]) -> dict[tuple[str, str], float]:
    """Return every measured number of a record by the row it stands in and its field."""
    found: dict[tuple[str, str], float] = {}
    for place, value in _parts(_without_origin(record)):
        if _is_number(value) and isinstance(value, float):
            folder, _, name = place.rpartition(", ")
            found[folder, name] = value
    for place, rows in _tables(record):
        seen: Counter[str] = Counter()
        for row in rows:
            named = [_named(field, row.get(field)) for field in identities[place]]
            where = ": ".join([place, ", ".join(part for part in named if part)])
            seen[where] += 1
            if seen[where] > 1:
                where += f" (number {seen[where]})"
            for field, number in row.items():
                if _is_number(number) and field not in identities[place]:
                    found[where, field] = float(number)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(field: str, value: object) -> str:
    if value is None or value == "":
        return ""
    return value if isinstance(value, str) else f"{field} = {value}"


# What else differs


def _notes(old: Row, new: Row) -> list[str]:
    machines = [record.get("environment", {}) for record in (old, new)]
    notes = [
        f"{name} differs: {machines[0].get(name)} and {machines[1].get(name)}"
        for name in (*_ENVIRONMENT, *_VERSIONS)
        if machines[0].get(name) != machines[1].get(name)
    ]
    if any(machines[0].get(name) != machines[1].get(name) for name in _HARDWARE):
        notes.append("the machines differ: ratios of times between them say nothing about the code")
    notes += [
        f"the {which} record has uncommitted changes: its commit does not name what was measured"
        for which, machine in zip(("old", "new"), machines, strict=True)
        if machine.get("uncommitted_changes")
    ]
    settings = [dict(_settings(record)) for record in (old, new)]
    notes += [
        f"setting {name!r} differs: {settings[0].get(name)} and {settings[1].get(name)}"
        for name in dict.fromkeys([*settings[0], *settings[1]])
        if settings[0].get(name) != settings[1].get(name)
    ]
    return notes


def _settings(record: Row) -> Iterator[tuple[str, Any]]:
    """Yield what stands outside of tables and is not measured."""
    if "command" in record:
        yield "command", record["command"]
    for place, value in _parts(_without_origin(record)):
        if not _is_table(value) and not isinstance(value, float):
            yield place, value


def text(found: Comparison, threshold: float) -> str:
    """Return a comparison in Markdown."""
    heading = (
        f"{len(found.changes)} of {found.num_compared} numbers differ by a factor of "
        f"{threshold:g} or more."
    )
    notes = "\n".join(f"- {note}" for note in found.notes)
    sections = [part for part in (notes, heading) if part]
    if found.changes:
        rows = [
            {"row": c.place, "field": c.field, "old": c.old, "new": c.new, "ratio": c.ratio}
            for c in found.changes
        ]
        columns = {"row": "", "field": "", "old": ".5g", "new": ".5g", "ratio": ".3f"}
        sections.append(markdown(rows, columns))
    for title, places in (("old", found.only_old), ("new", found.only_new)):
        if places:
            lines = "\n".join(f"- {place}" for place in places)
            sections.append(f"In the {title} record alone:\n\n{lines}")
    return "\n\n".join(sections)


def read(file: Path) -> Row:
    """Read a record.

    Raises:
        NotComparableError: If the file is missing, is no JSON object, or is of pytest-benchmark.
    """
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise NotComparableError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise NotComparableError(f"{file} must hold a JSON object, got a {type(record).__name__}")
    if {"benchmarks", "machine_info"} <= set(record):
        raise NotComparableError(
            f"{file} is of pytest-benchmark: `pytest-benchmark compare` compares such files"
        )
    return record


def main() -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.05,
        help="show numbers that differ by this factor or more (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        found = compare(read(arguments.old), read(arguments.new), arguments.threshold)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(text(found, arguments.threshold))
