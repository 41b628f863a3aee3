"""The state of a training on disk, from which it goes on to the same bits after a kill.

    training-state-00000200/state.json                           step, settings, digests
    training-state-00000200/state-00001-of-00002.safetensors     weights, average, optimiser, losses

Nothing is unpickled. The tensors are spread over files small enough to be carried one by one. A
state is written to a folder of another name, flushed to the disk and then renamed, and only then
are older ones removed: whenever the process is killed, the newest folder of the name above is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FORMAT = "ocm-training-state"
_VERSION = 2
_DESCRIPTION = "state.json"
_FILE = re.compile(r"state(-\d{5}-of-\d{5})?\.safetensors")
# Of the tensors in a file: with its header the file stays below 15 MB.
_MAX_FILE_BYTES = 14_000_000
_ENTRIES: dict[str, tuple[type, ...]] = {
    "run": (dict,),
    "step": (int,),
    "num_processes": (int,),
    "scaler": (dict, type(None)),
    "files": (dict,),
}
_FOLDER = re.compile(r"training-state-(\d{8,})")
_PARTIAL = "training-state.partial"
_WAY_OUT = (
    "or give another directory, or resume=False (--overwrite on the command line), which starts "
    "again and replaces the state"
)


class TrainingStateError(ValueError):
    """The state of a training is damaged, or is that of another training."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A training after ``step`` optimiser steps.

    Attributes:
        step: Steps taken.
        tensors: "losses", float64 of shape (step,), and the tensors of
            :func:`training_tensors`, on the CPU.
        scaler: State of the gradient scaler of fp16, or None.
        num_processes: Processes that trained it.
        path: Folder it was read from, for errors; None if it was not.
    """

    step: int
    tensors: Mapping[str, Tensor]
    scaler: Mapping[str, float] | None
    num_processes: int
    path: Path | None = None

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [float(loss) for loss in self.tensors["losses"].tolist()]


def write_state(
    directory: Path,
    state: TrainingState,
    run: Mapping[str, object],
    *,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> Path:
    """Write a state, then remove older ones.

    Args:
        directory: Made if need be.
        state: What to write.
        run: The settings that a training must share to go on from it, as JSON can hold them.
        max_file_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        The folder of the state.
    """
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / _PARTIAL
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    save_torch_state_dict(
        {name: _own(tensor) for name, tensor in state.tensors.items()},
        partial,
        filename_pattern="state{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    files = sorted(path.name for path in partial.glob("*.safetensors"))
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": state.step,
        "num_processes": state.num_processes,
        "run": dict(run),
        "scaler": None if state.scaler is None else dict(state.scaler),
        "files": {name: _sha256(partial / name) for name in files},
    }
    (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    folder = directory / f"training-state-{state.step:08d}"
    os.rename(partial, folder)
    _flush(directory)
    for other in _folders(directory):
        if other != folder:
            shutil.rmtree(other)
    return folder


def read_state(directory: Path, run: Mapping[str, object]) -> TrainingState | None:
    """Read the newest state in ``directory``, or return None if there is none.

    Args:
        directory: As given to :func:`write_state`.
        run: The settings of the training that wants to go on.

    Raises:
        TrainingStateError: A ValueError that names the file and the entry, if the state is
            damaged or was written with other settings.
    """
    folders = _folders(directory)
    if not folders:
        return None
    folder = folders[-1]
    file = folder / _DESCRIPTION
    description = _read_description(file)
    written, step = description["run"], description["step"]
    for name in [*run, *(name for name in written if name not in run)]:
        if written.get(name) != run.get(name):
            raise TrainingStateError(
                f"{file} is of another training: {name} was {written.get(name)!r}, now it is "
                f"{run.get(name)!r}; put it back, {_WAY_OUT}"
            )
    tensors: dict[str, Tensor] = {}
    for name, sha256 in description["files"].items():
        if not _FILE.fullmatch(name):
            raise _damaged(file, f"its entry files must name files of tensors, got {name!r}")
        tensors |= _read_tensors(folder / name, sha256)
    losses = tensors.get("losses")
    if losses is None or losses.shape != (step,):
        shape = None if losses is None else tuple(losses.shape)
        raise _damaged(file, f"its step is {step}, but its files have losses of shape {shape}")
    scaler, num_processes = description["scaler"], description["num_processes"]
    return TrainingState(step, tensors, scaler, num_processes, folder)


def remove_states(directory: Path) -> None:
    """Remove every state in ``directory``, complete or not, and nothing else."""
    # The oldest first: killed in between, the newest is whole.
    for folder in [directory / _PARTIAL, *_folders(directory)]:
        if folder.exists():
            # Renamed first, since a folder half removed must not be taken for a state.
            doomed = directory / _PARTIAL
            if folder != doomed:
                os.rename(folder, doomed)
            shutil.rmtree(doomed)


def training_tensors(
    module: nn.Module, average: Iterable[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return, by name, all tensors that the next step of a training depends on.

    Args:
        module: The module in training.
        average: Moving average of those of its parameters that require gradients, in order.
        optimizer: The optimiser of the same parameters.

    Returns:
        "module/name", "average/name" and "optimizer/entry/name" for the names of the module.

    Raises:
        TypeError: If the module keeps state that is not a tensor.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(training_tensors(layer, [layer.weight], optimizer))
        ['average/weight', 'module/weight', 'optimizer/exp_avg/weight',
         'optimizer/exp_avg_sq/weight', 'optimizer/step/weight']
    """
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of a module must be tensors to be written to disk, but {name} of "
                f"{type(module).__name__} is a {type(value).__name__}"
            )
        tensors[f"module/{name}"] = value
    for (name, parameter), mean in zip(_trained(module).items(), average, strict=True):
        tensors[f"average/{name}"] = mean
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{entry}/{name}"] = value
    return tensors


def restore_tensors(
    state: TrainingState,
    module: nn.Module,
    average: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the tensors of a state back into a module, its average and its optimiser, in place.

    Raises:
        TrainingStateError: If the state is that of a module of other names, shapes or types; it
            names the first. Nothing is changed then.
    """
    parameters = _trained(module)
    targets = {f"module/{name}": value for name, value in module.state_dict().items()}
    for (name, parameter), mean in zip(parameters.items(), average, strict=True):
        targets[f"average/{name}"] = mean
        for entry in ("exp_avg", "exp_avg_sq"):
            # Absent for a parameter that has had no gradient yet.
            if f"optimizer/{entry}/{name}" in state.tensors:
                targets[f"optimizer/{entry}/{name}"] = torch.empty_like(parameter)
                targets[f"optimizer/step/{name}"] = torch.empty(())
    for name in [*targets, *state.tensors]:
        if name == "losses":
            continue
        got, expected = _kind(state.tensors.get(name)), _kind(targets.get(name))
        if got != expected:
            raise TrainingStateError(
                f"{state.path} is of another module: {name} is {got} there, and {expected} here; "
                f"train the module that was trained there, {_WAY_OUT}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state.tensors[name])
    entries: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parameters):
        found = {
            entry: targets[f"optimizer/{entry}/{name}"]
            for entry in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer/{entry}/{name}" in targets
        }
        if found:
            entries[index] = found
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _own(tensor: Tensor) -> Tensor:
    """Return a copy of its own memory: of tensors that share theirs only one would be written."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _folders(directory: Path) -> list[Path]:
    """Return the folders of complete states, the newest last."""
    if not directory.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in directory.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(file: Path, reason: str) -> TrainingStateError:
    return TrainingStateError(f"{file} is damaged: {reason}; restore it, {_WAY_OUT}")


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(file, f"it cannot be read as JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise _damaged(file, f'its entry format must be "{_FORMAT}"')
    if description.get("version") != _VERSION:
        raise TrainingStateError(
            f"{file} has version {description.get('version')!r}, this ocm reads {_VERSION}; go on "
            f"with the ocm that wrote it, {_WAY_OUT}"
        )
    for name, kinds in _ENTRIES.items():
        value = description.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise _damaged(file, f"its entry {name} must be of type {wanted}, got {value!r}")
    return description


def _read_tensors(file: Path, sha256: object) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = _sha256(file)
        if found != sha256:
            raise _damaged(file, f"its SHA-256 is {found}, and {_DESCRIPTION} says {sha256}")
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, f"it cannot be read ({error})") from error
    return tensors
