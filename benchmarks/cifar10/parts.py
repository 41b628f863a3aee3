"""Finished parts of an evaluation on disk, so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ocm.evaluation.environment import Row


@dataclass(frozen=True)
class Parts:
    """Finished parts of an evaluation, a JSON file each.

    Attributes:
        directory: Where they are.
        prefix: Stands before every name.
        settings: What a part must share to be used again.
    """

    directory: Path
    prefix: str
    settings: Row

    def get(self, name: str, make: Callable[[], Any], **settings: Any) -> Any:
        """Return the part of that name and settings, made now if it is not there.

        Args:
            name: Of the part.
            make: Makes it, as JSON values.
            settings: What it depends on beside those of all parts.
        """
        file = self.file(name)
        key = as_json({**self.settings, **settings})
        if file.exists():
            stored = json.loads(file.read_text())
            if stored["settings"] == key:
                say(f"{self.prefix}{name}: made before, in {stored['seconds']:.0f} s")
                return stored["result"]
            say(f"{self.prefix}{name}: of other settings, made again")
        start = time.perf_counter()
        result = as_json(make())
        seconds = time.perf_counter() - start
        write_json(file, {"settings": key, "seconds": seconds, "result": result})
        say(f"{self.prefix}{name}: {seconds:.0f} s")
        return result

    def file(self, name: str, suffix: str = ".json") -> Path:
        """Return where a part is kept, or what belongs to it."""
        return self.directory / f"{self.prefix}{name}{suffix}"

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all parts of this prefix by name."""
        return {
            file.stem: round(json.loads(file.read_text())["seconds"], 1)
            for file in sorted(self.directory.glob(f"{self.prefix}*.json"))
        }


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value, default=asdict))


def write_json(file: Path, value: Any) -> None:
    """Write JSON under another name first, so that it is never found half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial")
    unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, file)


def digest_of(directory: Path) -> str:
    """Return a digest of all files below a directory."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(directory)).encode() + file.read_bytes())
    return digest.hexdigest()


def say(line: str) -> None:
    """Print a line at once, for whoever follows a run."""
    print(line, flush=True)
