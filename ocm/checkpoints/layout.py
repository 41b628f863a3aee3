"""Where the parts of a checkpoint lie, at rest and while a new one takes the place of another.

ocm.json                    what this is: schedule, data, learned covariances, revision
denoiser/                   the backbone, as diffusers' save_pretrained writes it
heads/NAME.safetensors      the head of each learned covariance
tables.json                 numbers by timestep: analytic variances, calibrations
data_covariance.safetensors for paths without signal at N: the covariance of the data

A new checkpoint is written whole to a folder of its own, ``.parts-REVISION``. The old one is
replaced at a single moment, when ``ocm.json`` comes to name that revision: from then on a part is
looked for in this folder first, and in its place second. Last, the parts are moved to their places.
So a writer that is killed leaves the old checkpoint or the new one, and the next finishes its move.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ocm.checkpoints.entries import OBJECT, Rule, check_entries, read_json
from ocm.files import flush, sha256, write_json

DESCRIPTION = "ocm.json"
DENOISER = "denoiser"
HEADS = "heads"
TABLES = "tables.json"
DATA_COVARIANCE = "data_covariance.safetensors"
PARTS = ".parts-"
FORMAT = {"format": "ocm-checkpoint", "version": 2}

# Of the entries of ``ocm.json`` that say where the parts are.
LAYOUT_RULES = {
    "revision": Rule(
        "16 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None,
    ),
    "data_covariance": Rule("true or false", lambda value: isinstance(value, bool)),
    "learned": OBJECT,
}

_UNFINISHED = ".partial-checkpoint"


def part_of(directory: Path, description: Mapping[str, Any], name: str) -> Path:
    """Return where the part called ``name`` is, by what ``ocm.json`` in the directory says."""
    # Checkpoints of earlier versions name no revision, and have all parts in their places.
    if "revision" not in description:
        return directory / name
    moving = _folder_of(directory, description["revision"]) / name
    return moving if moving.exists() else directory / name


@contextmanager
def replacing_parts(directory: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to write all parts to, which then take the place of those in ``directory``.

    A part that is the same to the bit stays as it is, untouched.

    Args:
        directory: Of the checkpoint; made if need be.
        description: What ``ocm.json`` will say, beside the revision.

    Raises:
        OSError: If a file cannot be written; the checkpoint is what it was before.
    """
    settle(directory)
    beside = directory / _UNFINISHED
    beside.mkdir(parents=True)
    try:
        yield beside
        parts = {name: _digests(beside / name) for name in sorted(_parts_in(beside))}
        # A name that differs, but for chance, wherever a checkpoint does.
        content = json.dumps([description, parts]).encode()
        revision = hashlib.sha256(content).hexdigest()[:16]
        for name, digests in parts.items():
            if _digests(directory / name) == digests:
                _remove(beside / name)
        for path in (*beside.rglob("*"), beside):
            flush(path)
        beside.replace(_folder_of(directory, revision))
        flush(directory)
        write_json(directory / DESCRIPTION, {**description, "revision": revision})
    finally:
        settle(directory)


def settle(directory: Path) -> None:
    """Move the parts that ``ocm.json`` names to their places, and remove those that it does not.

    It does what a writer that was killed had left to do. Whoever writes a part calls this first.
    """
    shutil.rmtree(directory / _UNFINISHED, ignore_errors=True)
    description = _described(directory)
    own = None if description is None else _folder_of(directory, description["revision"])
    for folder in directory.glob(f"{PARTS}*"):
        if folder != own:
            shutil.rmtree(folder)
    if description is None or own is None:
        return
    if own.exists():
        for name in _parts_in(own):
            place = directory / name
            place.parent.mkdir(exist_ok=True)
            _remove(place)  # which nobody reads while the new one lies beside
            (own / name).rename(place)
            flush(place.parent)
        shutil.rmtree(own)
    if not description["data_covariance"]:
        (directory / DATA_COVARIANCE).unlink(missing_ok=True)
    for head in (directory / HEADS).glob("*.safetensors"):
        if head.stem not in description["learned"]:
            head.unlink()


def _folder_of(directory: Path, revision: str) -> Path:
    """Return the folder of the parts that may not be in their places yet."""
    return directory / f"{PARTS}{revision}"


def _described(directory: Path) -> dict[str, Any] | None:
    """Return what ``ocm.json`` says, or None if there is none that was written by this version."""
    try:
        description = read_json(directory / DESCRIPTION)
        check_entries(description, LAYOUT_RULES)
    except ValueError:
        return None
    return description if {name: description.get(name) for name in FORMAT} == FORMAT else None


def _parts_in(folder: Path) -> list[str]:
    heads = [f"{HEADS}/{head.name}" for head in (folder / HEADS).glob("*")]
    return [*heads, *(path.name for path in folder.iterdir() if path.name != HEADS)]


def _digests(part: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file in a folder, by the path below the part."""
    files = sorted(path for path in (part, *part.rglob("*")) if path.is_file())
    return {file.relative_to(part).as_posix(): sha256(file) for file in files}


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)
