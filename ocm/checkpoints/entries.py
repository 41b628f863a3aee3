"""JSON from disk that may be damaged or hostile: read with bounds, and checked entry by entry."""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# The betas of a million timesteps take 28 MB.
MOST_BYTES = 32 * 2**20


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the model it is asked for."""


class Rule(NamedTuple):
    """What an entry must be, in words and as a test of its value."""

    must_be: str
    holds: Callable[[Any], bool]


TEXT = Rule("a text", lambda value: isinstance(value, str))
OBJECT = Rule("an object", lambda value: isinstance(value, Mapping))


def whole(least: int, most: int) -> Rule:
    """Return the rule of an int between two.

    Example:
        >>> whole(1, 9).holds(3), whole(1, 9).holds(True), whole(1, 9).holds(3.0)
        (True, False, False)
    """
    return Rule(
        f"an int in [{least}, {most}]",
        lambda value: type(value) is int and least <= value <= most,
    )


def one_of(names: Collection[str]) -> Rule:
    """Return the rule of one of some texts."""
    return Rule(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def check_entries(
    record: Mapping[str, Any], rules: Mapping[str, Rule], optional: Collection[str] = ()
) -> None:
    """Raise unless a record has the entries of a table, each as its rule says.

    Entries without a rule are not looked at.

    Raises:
        ValueError: That names the entry, what it must be, and its value.

    Example:
        >>> check_entries({"levels": 1}, {"levels": whole(2, 65536)})
        Traceback (most recent call last):
        ...
        ValueError: levels must be an int in [2, 65536], got 1
    """
    for name, rule in rules.items():
        if name not in record:
            if name in optional:
                continue
            raise ValueError(f"{name} must be {rule.must_be}, and is missing")
        if not rule.holds(record[name]):
            raise ValueError(f"{name} must be {rule.must_be}, got {reprlib.repr(record[name])}")


def check_names(what: str, found: Collection[str], known: Collection[str]) -> None:
    """Raise unless all names are known.

    Raises:
        ValueError: That shows the first one which is not.
    """
    for name in found:
        if name not in known:
            raise ValueError(f"{what} must be named {', '.join(known)}, got {reprlib.repr(name)}")


def check_regular(file: str | Path) -> None:
    """Raise unless there is a regular file, or a link to one: to open a pipe would wait for ever.

    Raises:
        OSError: If it is missing, a folder, a pipe or a device.
    """
    if not stat.S_ISREG(Path(file).stat().st_mode):
        raise OSError("it must be a regular file")


def reason_of(error: Exception) -> str:
    """Return what an error says, without the name of the file that stands beside it."""
    return getattr(error, "strerror", None) or str(error)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, of at most 32 MiB, whose entries are named once each.

    Raises:
        CheckpointError: That names the file.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it must have at most {MOST_BYTES} bytes")
        record = json.loads(content.decode("utf-8"), object_pairs_hook=_named_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {reason_of(error)}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(record).__name__}")
    return record


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"an object must have each entry once, got {reprlib.repr(name)} twice")
        record[name] = value
    return record


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Let what goes wrong with the entries of a file end in an error that names it.

    Raises:
        CheckpointError: In place of what is raised inside.
    """
    try:
        yield
    except CheckpointError:
        raise
    # Entries of wrong types may fail anywhere, in constructors of other libraries too.
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file} lacks or misstates an entry: {reason[:500]}") from error
