"""``python benchmarks/records COMMAND``: report, compare or quotes, each with --help."""

from __future__ import annotations

import sys
from pathlib import Path

# A folder that is run as a script stands on the import path itself; its modules are records.*.
sys.path[0] = str(Path(__file__).parent.parent)


def main() -> None:
    """Hand the words after the command to its own parser."""
    from records import compare, quotes, report

    commands = {"report": report.main, "compare": compare.main, "quotes": quotes.main}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        sys.exit(f"usage: python benchmarks/records {{{','.join(commands)}}} ...")
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    commands[name]()


if __name__ == "__main__":
    main()
