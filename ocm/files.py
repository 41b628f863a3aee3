"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL = ".partial-"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file to, which then takes the place of ``path``.

    Whenever the process is killed, or the disk is full, ``path`` is what it was before or what it
    was to become. The path yielded ends as ``path`` does, since some writers go by that. What a
    killed process leaves there is replaced by the next one that writes the same file.

    Raises:
        OSError: If the file cannot be written; it is named, and ``path`` is what it was before.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/scores.txt") as beside:
        ...         _ = beside.write_text("3.2 bits/dim", encoding="utf-8")
        ...     [file.name for file in Path(folder).iterdir()]
        ['scores.txt']
    """
    path = Path(path)
    beside = path.with_name(_PARTIAL + path.name)
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        # The system names no file where it was open already, as on a full disk.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text in UTF-8 by :func:`replacing`."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record by :func:`replacing`, refusing NaN and infinity, which are no JSON.

    Raises:
        ValueError: If the record holds one of them.
    """
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the format of safetensors by :func:`replacing`.

    Raises:
        OSError: If the file cannot be written: a full disk, say; it is named.
    """
    from safetensors.torch import save_file

    with replacing(path) as beside, naming_unwritten(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)


@contextmanager
def naming_unwritten(path: str | Path) -> Iterator[None]:
    """Raise errors of safetensors, on a full disk say, as an OSError that names ``path``."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, without holding the file in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
