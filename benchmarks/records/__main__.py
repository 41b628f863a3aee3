"""``python benchmarks/records COMMAND``: report, compare or quotes, each with --help."""

from __future__ import annotations

import sys
from pathlib import Path

# A folder that is run as a script stands on the import path itself; its modules are records.*.
sys.path[0] = str(Path(__file__).parent.parent)

if __name__ == "__main__":
    from records import commands

    commands.main()
