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
        equivalent: Why no test can notice it, for a change that is none; the tests must pass.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def expected(self) -> str:
        """What must come of it."""
        return "lived" if self.equivalent else "caught"

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


def in_file(path: str, tests: tuple[str, ...], *changes: tuple[str, str, str]) -> list[Fault]:
    """Return a fault for each (name, old, new) of one file, which the same tests must notice."""
    return [Fault(name, path, old, new, tests) for name, old, new in changes]


def nothing(tests: tuple[str, ...]) -> Fault:
    """Return the fault that is none: the tests must pass before others may be noticed by them."""
    first = "[build-system]"
    name = f"none, for {' '.join(tests)}"
    return Fault(name, "pyproject.toml", first, first, tests, equivalent="It changes nothing.")
