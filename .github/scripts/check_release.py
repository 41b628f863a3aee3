"""Whether a tag may be released: ``python .github/scripts/check_release.py v0.2.0``.

The tag must be the version of pyproject.toml, of ``hessdiag.__version__`` and of CITATION.cff, and
CHANGELOG.md must have an entry for it that no longer says "Unreleased".
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {
    "pyproject.toml": r'^version = "(.*)"$',
    "hessdiag/__init__.py": r'^__version__ = "(.*)"$',
    "CITATION.cff": r"^version: (.*)$",
}


def problems(tag: str) -> list[str]:
    """What must be mended before the tag can be released."""
    found = []
    for file, pattern in VERSIONS.items():
        version = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        if version is None or f"v{version[1]}" != tag:
            said = "names no version" if version is None else f"has version {version[1]}"
            found.append(f"{file} {said}, and the tag is {tag}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = rf"^## \[?{re.escape(tag.removeprefix('v'))}\]?(?: - .*)?$"
    if re.search(entry, changelog, re.MULTILINE) is None:
        found.append(f"CHANGELOG.md has no heading '## {tag.removeprefix('v')}'")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .github/scripts/check_release.py TAG")
    sys.exit("\n".join(problems(sys.argv[1])) or None)
