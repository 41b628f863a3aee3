"""The command line of the records: ``report``, ``compare`` and ``quotes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from records import compare, quotes, report


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, and do what it says."""
    arguments = _parser().parse_args(words)
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python benchmarks/records", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(module: ModuleType, run: Callable[[argparse.Namespace], None]) -> Any:
        name = module.__name__.rpartition(".")[2]
        what = str(module.__doc__)
        found = commands.add_parser(
            name,
            help=what.partition(":")[0],
            description=what,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        found.set_defaults(run=run)
        return found

    one = command(report, _report)
    one.add_argument("directory", type=Path, metavar="DIR", help="where the records are")
    one.add_argument("--plots", action="store_true", help="draw the plots again too")
    one = command(compare, _compare)
    one.add_argument("old", type=Path, metavar="OLD.json")
    one.add_argument("new", type=Path, metavar="NEW.json")
    one.add_argument(
        "--threshold",
        type=float,
        default=1.05,
        help="show numbers that differ by this factor or more (default: %(default)s)",
    )
    one = command(quotes, _quotes)
    one.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    return parser


def _report(arguments: argparse.Namespace) -> None:
    if arguments.plots:
        report.plot(arguments.directory)
    print(f"report: {report.write(arguments.directory)}")


def _compare(arguments: argparse.Namespace) -> None:
    old, new = compare.read(arguments.old), compare.read(arguments.new)
    found = compare.compare(old, new, arguments.threshold)
    print(compare.text(found, arguments.threshold))


def _quotes(arguments: argparse.Namespace) -> None:
    differing = quotes.write(check=arguments.check)
    said = "differs" if arguments.check else "written"
    print(f"{said}: {', '.join(differing) or 'nothing'}")
    if arguments.check and differing:
        sys.exit(1)
