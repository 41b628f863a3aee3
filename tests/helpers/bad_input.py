"""Cases of bad input: each raises one clear error, or works."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Case:
    """One call with bad input.

    Attributes:
        name: What is bad about it, unique in its table.
        call: Takes an empty folder, or what its test gives instead, and makes the call.
        error: What it must raise; None if it must return.
        says: Texts that the message must have: the argument, its value, what would be right.
        check: Of what is returned; raises AssertionError where the result is wrong.
    """

    name: str
    call: Callable[[Path], object]
    error: type[Exception] | None = None
    says: tuple[str, ...] = ()
    check: Callable[[object], None] | None = None


def table(cases):
    """Parametrise a test of ``case`` by a table, whose names are those of the tests."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "the names of cases are unique"
    return pytest.mark.parametrize("case", cases, ids=names)


def run(case, folder):
    """Make the call of a case, and check what comes of it."""
    if case.error is None:
        result = case.call(folder)
        if case.check is not None:
            case.check(result)
        return
    assert case.says, "an error says something"
    with pytest.raises(case.error) as caught:
        case.call(folder)
    said = str(caught.value)
    for text in case.says:
        assert text in said, f"{text!r} is not in {said!r}"
    # One error of ours, and not one from deep inside that happens to be of this type.
    assert re.search(r"[a-z]", said)
    assert len(said) < 1000


def command(capfd, *arguments):
    """Run ``ocm`` as the console script does; return its exit status, output and errors."""
    from ocm.cli.app import run as run_commands

    before, sys.argv = sys.argv, ["ocm", *map(str, arguments)]
    capfd.readouterr()
    try:
        run_commands()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = before
    written = capfd.readouterr()
    return status, written.out, written.err
