"""A fault: one change of a line that some test must notice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One change of the code.

    Attributes:
        name: What is wrong with it, unique.
        path: The file, from the root of the project.
        old: Text that occurs in it once.
        new: What stands there instead.
        tests: Arguments of pytest; one of the tests chosen must fail.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """Return the text of the file with the fault in it.

        Raises:
            ValueError: If what it replaces does not occur once.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {count} times in {self.path}, where it must "
                "occur once"
            )
        return text.replace(self.old, self.new)

    def fingerprint(self, root: Path) -> str:
        """Return a hash of all that decides on the outcome: the fault, its file, its tests."""
        digest = hashlib.sha256(repr(self).encode())
        named = [argument.split("::")[0] for argument in self.tests]
        for path in (self.path, *(name for name in named if (root / name).exists())):
            files = (
                [root / path] if (root / path).is_file() else sorted((root / path).rglob("*.py"))
            )
            for file in files:
                digest.update(file.read_bytes())
        return digest.hexdigest()
