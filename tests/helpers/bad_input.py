"""Cases of bad input: each raises one clear error, or works."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


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


def case(name, call, error=None, *says, check=None):
    """Return a case that needs no folder."""
    return Case(name, lambda folder: call(), error, says, check)


def cases_of(function, prefix="", **usual):
    """Return what makes a case of a call of ``function``, where some arguments are not as usual."""

    def row(name, error=None, /, *says, check=None, **changed):
        return case(
            prefix + name, lambda: function(**{**usual, **changed}), error, *says, check=check
        )

    return row


def cases_of_each(functions, **usual):
    """Return what makes the same case of several functions, by what each is called."""
    rows = [cases_of(function, f"{name}: ", **usual) for name, function in functions.items()]
    return lambda *given, **changed: [row(*given, **changed) for row in rows]


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
    assert len(said) < 1000, "one error of ours, and not one from deep inside"


def holds(condition):
    """Say in a lambda what must be true."""
    assert condition


def close(expected, **tolerance):
    """The result must be a number or a tensor like this one."""
    return lambda found: torch.testing.assert_close(found, expected, **tolerance)


def shaped(*sizes):
    """The result must be a tensor of this shape."""
    return lambda found: holds(tuple(found.shape) == sizes)


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
