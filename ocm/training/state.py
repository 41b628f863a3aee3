"""The state of a training on disk, from which it goes on to the same bits after a kill.

It is a folder of::

    training-state-00000200/state.json                           settings, digests
    training-state-00000200/state-00001-of-00002.safetensors     weights, average, optimiser, losses

Nothing is unpickled. The tensors are spread over files small enough to be carried one by one. A
state is written to a folder of another name, flushed to the disk and then renamed, and only then
are older ones removed: whenever the process is killed, the newest folder of the name above is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocm.files import flush, naming_unwritten, sha256, write_text

_VERSION = 3
_NAME = "training-state-"
_DESCRIPTION = "state.json"
# Of the tensors in a file: with its header the file stays below 15 MB.
_MAX_FILE_BYTES = 14_000_000
_PARTIAL = "training-state.partial"
_WAY_OUT = (
    "or give another directory, or resume=False (--overwrite on the command line), which starts "
    "again and replaces the state"
)


class Parts(NamedTuple):
    """What changes from step to step, with the means of the parameters that are trained."""

    module: nn.Module
    average: list[Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class TrainingStateError(ValueError):
    """The state of a training is damaged, or is that of another training."""


def write_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    run: Mapping[str, object],
    *,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> Path:
    """Write :func:`training_tensors` and "losses" to a folder of their own; remove older ones.

    ``run`` holds the settings that a training must share to go on from there, as JSON can hold
    them. A file has at most ``max_file_bytes`` of tensors, or a single one.

    Raises:
        OSError: If a file cannot be written: a full disk, say. Older states are what they were.
    """
    from huggingface_hub import save_torch_state_dict

    partial = directory / _PARTIAL
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    folder = directory / f"{_NAME}{len(tensors['losses']):08d}"
    try:
        with naming_unwritten(folder):
            save_torch_state_dict(
                # Copies, since of tensors that share their memory only one would be written.
                {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()},
                partial,
                filename_pattern="state{suffix}.safetensors",
                max_shard_size=max_file_bytes,
            )
        description = {"version": _VERSION, "run": dict(run), "files": _digests(partial)}
        write_text(partial / _DESCRIPTION, json.dumps(description, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise
    flush(directory)
    for other in _folders(directory):
        if other != folder:
            shutil.rmtree(other)
    return folder


def read_state(directory: Path, run: Mapping[str, object]) -> dict[str, Tensor] | None:
    """Return the tensors of the newest state, if there is one and ``run`` is what it was."""
    from safetensors.torch import load_file

    folders = _folders(directory)
    if not folders:
        return None
    folder = folders[-1]
    file = folder / _DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version, written = description["version"], dict(description["run"])
        expected = dict(description["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingStateError(
            f"{file} is damaged: it must be JSON with the objects run and files, got "
            f"{type(error).__name__}: {error}; restore it, {_WAY_OUT}"
        ) from error
    if version != _VERSION:
        raise TrainingStateError(
            f"{file} has version {version!r}, this ocm reads {_VERSION}; go on with the ocm that "
            f"wrote it, {_WAY_OUT}"
        )
    for name in {**run, **written}:
        if written.get(name) != run.get(name):
            length = "; it cannot be lengthened, since its learning rate ends at zero"
            raise TrainingStateError(
                f"{file} is of another training: {name} was {written.get(name)!r}, now it is "
                f"{run.get(name)!r}{length if name == 'num_steps' else ''}; put it back, {_WAY_OUT}"
            )
    found = _digests(folder)
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise TrainingStateError(
                f"{folder / name} is damaged: its SHA-256 is {found.get(name)}, and {_DESCRIPTION} "
                f"says {expected.get(name)}; restore it, {_WAY_OUT}"
            )
    return {name: x for file in found for name, x in load_file(folder / file).items()}


def newest_step(directory: Path) -> int | None:
    """Return the number of steps of the newest state in ``directory``, or None without one."""
    folders = _folders(directory)
    return int(folders[-1].name.removeprefix(_NAME)) if folders else None


def remove_states(directory: Path) -> None:
    """Remove every state in ``directory``, complete or not, and nothing else."""
    doomed = directory / _PARTIAL
    # The oldest first: killed in between, the newest is whole.
    for folder in [doomed, *_folders(directory)]:
        if folder.exists():
            # A folder half removed must not be taken for a state.
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def training_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return "module/name", "average/name", "optimizer/number/entry" and "scaler/entry"."""
    tensors = _weights(parts)
    for number, entries in parts.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{entry}": value for entry, value in entries.items()}
    for entry, number in parts.scaler.state_dict().items():
        tensors[f"scaler/{entry}"] = torch.tensor(number)
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Raise unless :func:`restore_tensors` can write a state into these parts."""
    targets = _weights(parts)
    weights = [name for name in tensors if name.startswith(("module/", "average/"))]
    for name in [*targets, *weights]:
        there, here = _kind(tensors.get(name)), _kind(targets.get(name))
        if there != here:
            raise TrainingStateError(
                f"the state is of another module: {name} is {there} there, and {here} here; train "
                f"the module that was trained there, {_WAY_OUT}"
            )


def restore_tensors(tensors: Mapping[str, Tensor], parts: Parts) -> None:
    """Write a state that was checked back into what :func:`training_tensors` took it from."""
    targets = _weights(parts)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    scaler = {}
    for name, value in tensors.items():
        match name.split("/"):
            case "optimizer", number, entry:
                state.setdefault(int(number), {})[entry] = value.clone()
            case "scaler", entry:
                scaler[entry] = value.item()
    parts.optimizer.load_state_dict({**parts.optimizer.state_dict(), "state": state})
    if scaler:
        parts.scaler.load_state_dict(scaler)


def _weights(parts: Parts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in parts.module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of a module must be tensors to be written to disk, but {name} of "
                f"{type(parts.module).__name__} is a {type(value).__name__}"
            )
        tensors[f"module/{name}"] = value
    trained = [name for name, p in parts.module.named_parameters() if p.requires_grad]
    return tensors | {f"average/{name}": x for name, x in zip(trained, parts.average, strict=True)}


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _folders(directory: Path) -> list[Path]:
    """Return the folders of complete states, the newest last."""
    found = {path.name.removeprefix(_NAME): path for path in directory.glob(f"{_NAME}*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
