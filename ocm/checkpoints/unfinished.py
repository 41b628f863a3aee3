"""What a long computation has finished, on disk until all of it is.

It is a folder of::

    settings.json        what decides the numbers
    NAME.json            a finished part
    NAME.safetensors     another, of tensors

Every file is whole or not there, so that the same computation goes on from the last part whenever
the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints.entries import CheckpointError, read_json
from ocm.checkpoints.layout import DATA_COVARIANCE, DENOISER, DESCRIPTION, HEADS, PARTS, TABLES
from ocm.files import sha256, write_json, write_tensors

_SETTINGS = "settings.json"
# What is read of a checkpoint or of a pipeline; the directory may hold results as well.
_READ = (DESCRIPTION, TABLES, DATA_COVARIANCE, "model_index.json")
_FOLDERS_READ = (DENOISER, HEADS, f"{PARTS}*", "unet", "transformer", "scheduler")


@dataclass(frozen=True)
class Parts:
    """Finished parts of a computation by name.

    Attributes:
        folder: Where they are kept; None keeps nothing, and computes all that is asked for.
    """

    folder: Path | None = None

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of that name, computed if it is not there yet.

        Raises:
            ValueError: If its file is damaged.

        Example:
            >>> Parts().json("bits", lambda: {"mean": 3.5})
            {'mean': 3.5}
        """
        if self.folder is None:
            return compute()
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, {"value": compute()})
        with _naming_damaged(file):
            return json.loads(file.read_text(encoding="utf-8"))["value"]

    def tensors(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of that name on the CPU, computed if they are not there yet.

        Raises:
            ValueError: If their file is damaged.

        Example:
            >>> import torch
            >>> Parts().tensors("images", lambda: {"first": torch.zeros(2)})
            {'first': tensor([0., 0.])}
        """
        from safetensors.torch import load_file

        if self.folder is None:
            return {key: tensor.cpu() for key, tensor in compute().items()}
        # Copies, since of tensors that share their memory none would be written.
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            found = {key: tensor.to("cpu", copy=True) for key, tensor in compute().items()}
            write_tensors(file, found)
        with _naming_damaged(file):
            return dict(load_file(file))

    def names(self) -> list[str]:
        """Return the names of the parts that are kept."""
        if self.folder is None:
            return []
        kept = [*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")]
        return sorted(
            file.name.removesuffix(file.suffix)
            for file in kept
            if file.name != _SETTINGS and not file.name.startswith(".")
        )

    def remove(self) -> None:
        """Remove the parts, and the folder around theirs if nothing else is in it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                self.folder.parent.rmdir()


NOT_KEPT = Parts()


def parts_of(folder: Path, settings: Mapping[str, Any]) -> tuple[Parts, str | None]:
    """Return the parts in a folder, if they were made by these settings, or else an empty folder.

    Args:
        folder: Of this computation alone; made if need be.
        settings: JSON values that decide the numbers; one of other settings is another computation.

    Returns:
        The parts, and a sentence on those that were removed, or None.

    Raises:
        OSError: If the folder cannot be written to.
    """
    file, now = folder / _SETTINGS, json.loads(json.dumps(settings))
    removed = None
    if folder.exists():
        try:
            before = read_json(file)
        except CheckpointError:  # as a process leaves it that is killed while it removes them
            before = {}
        if before == now:
            return Parts(folder), None
        if Parts(folder).names():
            was, is_now = ({k: repr(v) for k, v in said.items()} for said in (before, now))
            name = next(name for name in is_now | was if was.get(name) != is_now.get(name))
            removed = (
                f"removed what is in {folder}, which has other settings: {name} was "
                f"{was.get(name, 'missing')}, now {is_now.get(name, 'missing')}"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(file, now)
    return Parts(folder), removed


def fingerprint(path: Path, *, without: tuple[str, ...] = ()) -> str:
    """Return a SHA-256 of all that is read of a checkpoint or pipeline, for :func:`parts_of`.

    Args:
        path: Its directory.
        without: Files that do not matter.
    """
    names = [name for name in _READ if name not in without]
    files = [path / name for name in names if (path / name).is_file()]
    for folder in (folder for pattern in _FOLDERS_READ for folder in path.glob(pattern)):
        files += [file for file in folder.rglob("*") if file.is_file()]
    said = {str(file.relative_to(path)): sha256(file) for file in files}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digest(tensors: Mapping[str, Tensor | None]) -> str:
    """Return a SHA-256 of tensors by name, for :func:`parts_of`.

    Example:
        >>> import torch
        >>> digest({"a": torch.zeros(2)}) == digest({"b": torch.zeros(2)})
        False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        if tensor is not None:
            plain = tensor.detach().cpu().contiguous()
            total.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextmanager
def _naming_damaged(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{file} is damaged: {error}; remove {file.parent}, and all of it is computed again"
        ) from error
