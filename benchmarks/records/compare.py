"""Compare two records of one suite: ``python benchmarks/records compare OLD.json NEW.json``.

Prints a Markdown table of the measured numbers that differ, the largest change first, and says what
else differs: commit, hardware, versions, settings, rows that only one of them has. It takes any
record of benchmarks/run.py, ``make demo`` or ``ocm evaluate``. What pytest-benchmark wrote
(``make bench-small``) is for its own comparison: ``pytest-benchmark compare OLD.json NEW.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table

# What places a record rather than being measured.
_ORIGIN = ("environment", "command", "date", "seconds")
_HARDWARE = ("device", "gpu", "processor", "threads")
_ENVIRONMENT = (
    *("commit", "uncommitted_changes", *_HARDWARE),
    *("python", "torch", "triton", "platform"),
)


class NotComparableError(ValueError):
    """Two files are not records of one suite."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What comparing two records found.

    Attributes:
        changes: Numbers that differ by more than the threshold, the largest change first, in the
            columns row, field, old, new, ratio and size. The ratio is new over old, NaN if there is
            none: one is zero or not finite, or signs differ. The size is how many times larger
            the larger one is, infinite without a ratio.
        only_old: Rows that the old record alone has.
        only_new: Rows that the new record alone has.
        notes: What else differs.
        num_compared: Numbers that both have.
    """

    changes: pd.DataFrame
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
    tables = _tables(old), _tables(new)
    places = {**tables[0], **tables[1]}
    identities = {place: _identity([t[place] for t in tables if place in t]) for place in places}
    before, after = (_numbers(found, identities) for found in tables)
    common = before.index.intersection(after.index, sort=False)
    if common.empty:
        raise NotComparableError("the records must measure the same, and have no number in common")
    both = pd.DataFrame({"old": before[common], "new": after[common]})
    comparable = np.isfinite(both).all(axis=1) & (both["old"] * both["new"] > 0)
    both["ratio"] = (both["new"] / both["old"]).where(comparable)
    both["size"] = np.maximum(both["ratio"], 1 / both["ratio"]).fillna(math.inf)
    same = (both["old"] == both["new"]) | both[["old", "new"]].isna().all(axis=1)
    changes = both[(both["size"] >= threshold) & ~same]
    return Comparison(
        changes=changes.sort_values("size", ascending=False, kind="stable").reset_index(),
        only_old=_missing(before.index, after.index),
        only_new=_missing(after.index, before.index),
        notes=_notes(old, new),
        num_compared=len(common),
    )


def _missing(these: pd.MultiIndex, those: pd.MultiIndex) -> list[str]:
    """Return the rows of which the others have nothing, and fields that they lack."""
    rows = set(those.get_level_values("row"))
    missing = these[~these.isin(those)]
    return list(dict.fromkeys(f"{row}: {field}" if row in rows else row for row, field in missing))


# Records as tables


def _leaves(record: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every table and every leaf of a record, with its path."""
    for key, value in record.items():
        if isinstance(value, list) and not _is_table(value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}, ")
        else:
            yield f"{path}{key}", value


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _measured(record: Row) -> Iterator[tuple[str, Any]]:
    return _leaves({key: value for key, value in record.items() if key not in _ORIGIN})


def _tables(record: Row) -> dict[str, pd.DataFrame]:
    """Return the tables of a record by their path, with None for what a row lacks.

    Measured numbers outside of tables are one of a single row for each folder.
    """
    tables: dict[str, list[Row]] = {}
    for path, value in _measured(record):
        folder, _, name = path.rpartition(", ")
        if _is_table(value):
            tables[path] = [dict(_leaves(row)) for row in value]
        elif isinstance(value, float):
            tables.setdefault(folder, [{}])[0][name] = value
    return {
        place: pd.DataFrame([dict.fromkeys(chain(*rows)) | row for row in rows], dtype=object)
        for place, rows in tables.items()
    }


def _identity(versions: Sequence[pd.DataFrame]) -> list[str]:
    """Return the fields that tell the rows of a table apart, in all its versions alike."""
    rows = pd.concat(versions)
    kinds = {field: set(map(type, rows[field].dropna())) for field in rows}
    chosen = [field for field, found in kinds.items() if found & {str, bool}]

    def told_apart(fields: list[str]) -> int:
        return sum(len(set(map(tuple, rows.reindex(columns=fields).values))) for rows in versions)

    for field in (field for field, found in kinds.items() if found == {int}):
        if told_apart([*chosen, field]) > told_apart(chosen):
            chosen.append(field)
    return chosen


def _numbers(tables: Mapping[str, pd.DataFrame], identities: Mapping[str, list[str]]) -> pd.Series:
    """Return every measured number of a record by the row it stands in and its field."""
    found: dict[tuple[str, str], float] = {}
    for place, frame in tables.items():
        # In pandas 2 a frame without columns has no records.
        identity = frame.reindex(columns=identities[place]).to_dict("records") or [{}] * len(frame)
        names = pd.Series([": ".join(filter(None, [place, _written(row)])) for row in identity])
        copies = names.groupby(names).cumcount() + 1
        names = names.where(copies == 1, names + " (number " + copies.astype(str) + ")")
        measured = frame.drop(columns=identities[place], errors="ignore").set_axis(names)
        for name, row in measured.to_dict("index").items():
            found |= {(name, f): float(v) for f, v in row.items() if isinstance(v, (int, float))}
    index = pd.MultiIndex.from_tuples(list(found), names=["row", "field"])
    return pd.Series(list(found.values()), index, dtype=float)


def _written(identity: Mapping[str, Any]) -> str:
    return ", ".join(
        value if isinstance(value, str) else f"{field} = {value}"
        for field, value in identity.items()
        if not (pd.isna(value) or value == "")
    )


# What else differs


def _notes(old: Row, new: Row) -> list[str]:
    machines = [record.get("environment", {}) for record in (old, new)]
    settings = [_settings(record) for record in (old, new)]
    notes = _differing(*machines, _ENVIRONMENT)
    if _differing(*machines, _HARDWARE):
        notes.append("the machines differ: ratios of times between them say nothing about the code")
    for which, machine in zip(("old", "new"), machines, strict=True):
        if machine.get("uncommitted_changes"):
            notes.append(
                f"the {which} record has uncommitted changes: its commit does not name what was "
                "measured"
            )
    return [*notes, *_differing(*settings, {**settings[0], **settings[1]}, "setting {!r}")]


def _differing(
    old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str], what: str = "{}"
) -> list[str]:
    return [
        f"{what.format(name)} differs: {old.get(name)} and {new.get(name)}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _settings(record: Row) -> Row:
    """Return what stands outside of tables and is not measured."""
    found = {
        place: value
        for place, value in _measured(record)
        if not (_is_table(value) or isinstance(value, float))
    }
    return {"command": record.get("command"), **found}


def text(found: Comparison, threshold: float) -> str:
    """Return a comparison in Markdown."""
    sections = [_listed(found.notes)] if found.notes else []
    sections.append(
        f"{len(found.changes)} of {found.num_compared} numbers differ by a factor of "
        f"{threshold:g} or more."
    )
    if len(found.changes):
        # Without a ratio its cell is empty.
        ratios = found.changes["ratio"].map("{:.3f}".format, na_action="ignore").astype(object)
        rows = found.changes.assign(ratio=ratios.where(ratios.notna(), None)).to_dict("records")
        columns = {"row": "", "field": "", "old": ".5g", "new": ".5g", "ratio": ">"}
        sections.append(markdown_table(rows, columns))
    for title, places in (("old", found.only_old), ("new", found.only_new)):
        if places:
            sections += [f"In the {title} record alone:", _listed(places)]
    return "\n\n".join(sections)


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


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
