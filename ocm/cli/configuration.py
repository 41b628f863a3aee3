"""Configuration files: ``--config FILE`` gives a command its options, and every run writes one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ocm.cli.options import RUN
from ocm.files import write_text

# What does not decide the results.
_OF_ONE_RUN = ("out", "overwrite", "quiet")


def _names(context: typer.Context) -> dict[str, Any]:
    """Return the parameters that a file may hold: options without their dashes, and arguments."""
    return {
        max(parameter.opts, key=len).removeprefix("--"): parameter
        for parameter in context.command.params
        if parameter.name not in ("config", "help")
    }


def _table(path: Path, command: str) -> Mapping[str, Any]:
    """Return the table of a command in a file.

    Raises:
        ValueError: If the file is no TOML, or holds nothing for this command.
        FileNotFoundError: If there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"--config {path} does not exist")
    if not path.is_file():
        raise ValueError(f"--config {path} must be a regular file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--config {path} must be a file of TOML: {error}") from error
    table: Any = tables.get(command)
    if not isinstance(table, dict):
        found = ", ".join(f"[{name}]" for name in tables) or "nothing"
        raise ValueError(f"--config {path} must have a table [{command}], and has {found}")
    return table


def _as_given(value: Any, parameter: Any, where: str) -> Any:
    """Return a value as the command line would give it, so that it is checked as strictly.

    Raises:
        ValueError: If it is a list, a table or a truth value where the option takes none, or none
            where it takes one.
    """
    if getattr(parameter, "multiple", False):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return [_text(item, where) for item in value]
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return value
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} must be a text or a number, got {value!r}")
    return str(value)


def read(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a file says as the defaults of a command, so that the command line wins."""
    if path is None or context.resilient_parsing:
        return path
    names = _names(context)
    defaults = {}
    for name, value in _table(path, context.info_name or "").items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
            raise ValueError(
                f"--config {path}: {name!r} is no option of ocm {context.info_name}; {advice}"
            )
        where = f"--config {path}: {name}"
        defaults[names[name].name] = _as_given(value, names[name], where)
    context.default_map = defaults
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read,
        is_eager=True,
        rich_help_panel=RUN,
        help="TOML file with a table of options for this command, as every run writes one beside "
        "its results. Options on the command line win.",
    ),
]


def record(context: typer.Context, folder: Path, without: Collection[str] = ()) -> None:
    """Write what a command was given into ``folder``/COMMAND.toml, defaults included.

    ``ocm COMMAND --config FILE`` then runs it again; where it writes to, and how much it says, is
    left to the new run.

    Args:
        context: Of the command.
        folder: Of the results.
        without: Parameters that do not apply to this run.
    """
    import tomli_w

    given = {
        name: _plain(context.params[parameter.name])
        for name, parameter in _names(context).items()
        if parameter.name not in {*_OF_ONE_RUN, *without}
        and context.params[parameter.name] is not None
    }
    command = context.info_name or ""
    said = f"# What `ocm {command}` was given. To run it again: ocm {command} --config FILE\n\n"
    write_text(folder / f"{command}.toml", said + tomli_w.dumps({command: given}))


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
