"""The state of a training on disk, from which it goes on to the same bits after a kill.

    training-state-00000200/state.json                           settings, digests
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
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_VERSION = 3
_DESCRIPTION = "state.json"
# Of the tensors in a file: with its header the file stays below 15 MB.
_MAX_FILE_BYTES = 14_000_000
_PARTIAL = "training-state.partial"
_WAY_OUT = (
    "or give another directory, or resume=False (--overwrite on the command line), which starts "
    "again and replaces the state"
)


class TrainingStateError(ValueError):
    """The state of a training is damaged, or is that of another training."""


def write_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    run: Mapping[str, object],
    *,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> Path:
    """Write a state, then remove older ones.

    Args:
        directory: Made if need be.
        tensors: Those of :func:`training_tensors`, and "losses", one for every step taken.
        run: The settings that a training must share to go on from it, as JSON can hold them.
        max_file_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        The folder of the state.
    """
    from huggingface_hub import save_torch_state_dict

    partial = directory / _PARTIAL
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    save_torch_state_dict(
        # Copies, since of tensors that share their memory only one would be written.
        {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()},
        partial,
        filename_pattern="state{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    description = {"version": _VERSION, "run": dict(run), "files": _digests(partial)}
    (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    folder = directory / f"training-state-{len(tensors['losses']):08d}"
    os.rename(partial, folder)
    _flush(directory)
    for other in _folders(directory):
        if other != folder:
            shutil.rmtree(other)
    return folder


def read_state(directory: Path, run: Mapping[str, object]) -> dict[str, Tensor] | None:
    """Return the tensors of the newest state in ``directory``, or None if there is none.

    Args:
        directory: As given to :func:`write_state`.
        run: The settings of the training that wants to go on.

    Raises:
        TrainingStateError: A ValueError that names the file and the entry, if the state is
            damaged or was written with other settings.
    """
    from safetensors.torch import load_file

    folders = _folders(directory)
    if not folders:
        return None
    folder = folders[-1]
    file = folder / _DESCRIPTION
    try:
        description = json.loads(file.read_text())
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
            raise TrainingStateError(
                f"{file} is of another training: {name} was {written.get(name)!r}, now it is "
                f"{run.get(name)!r}; put it back, {_WAY_OUT}"
            )
    found = _digests(folder)
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise TrainingStateError(
                f"{folder / name} is damaged: its SHA-256 is {found.get(name)}, and {_DESCRIPTION} "
                f"says {expected.get(name)}; restore it, {_WAY_OUT}"
            )
    return {name: x for file in found for name, x in load_file(folder / file).items()}


def remove_states(directory: Path) -> None:
    """Remove every state in ``directory``, complete or not, and nothing else."""
    doomed = directory / _PARTIAL
    # The oldest first: killed in between, the newest is whole.
    for folder in [doomed, *_folders(directory)]:
        if folder.exists():
            # A folder half removed must not be taken for a state.
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def training_tensors(
    module: nn.Module,
    average: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """Return, by name, all tensors that the next step of a training depends on.

    Args:
        module: The module in training.
        average: Moving average of those of its parameters that require gradients, in order.
        optimizer: The optimiser of the same parameters.
        scaler: The scaler of their gradients.

    Returns:
        "module/name" and "average/name" for the names of the module, "optimizer/number/entry" for
        the numbers of its parameters, and "scaler/entry", if it is enabled.

    Raises:
        TypeError: If the module keeps state that is not a tensor.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> scaler = torch.amp.GradScaler("cpu", enabled=False)
        >>> sorted(training_tensors(layer, [layer.weight], optimizer, scaler))
        ['average/weight', 'module/weight', 'optimizer/0/exp_avg', 'optimizer/0/exp_avg_sq',
         'optimizer/0/step']
    """
    tensors = _weights(module, average)
    for number, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{entry}": value for entry, value in entries.items()}
    for entry, number in scaler.state_dict().items():
        tensors[f"scaler/{entry}"] = torch.tensor(number)
    return tensors


def restore_tensors(
    tensors: Mapping[str, Tensor],
    module: nn.Module,
    average: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write the tensors of a state back into what :func:`training_tensors` took them from.

    Raises:
        TrainingStateError: If the state is that of a module of other names, shapes or types; it
            names the first. Nothing is changed then.
    """
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "scaler": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    targets = _weights(module, average)
    for name in targets | {f"module/{name}": x for name, x in parts["module"].items()}:
        there, here = _kind(tensors.get(name)), _kind(targets.get(name))
        if there != here:
            raise TrainingStateError(
                f"the state is of another module: {name} is {there} there, and {here} here; train "
                f"the module that was trained there, {_WAY_OUT}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        number, entry = name.split("/")
        state.setdefault(int(number), {})[entry] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if parts["scaler"]:
        scaler.load_state_dict({entry: number.item() for entry, number in parts["scaler"].items()})


def _weights(module: nn.Module, average: Iterable[Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of a module must be tensors to be written to disk, but {name} of "
                f"{type(module).__name__} is a {type(value).__name__}"
            )
        tensors[f"module/{name}"] = value
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    return tensors | {f"average/{name}": x for name, x in zip(trained, average, strict=True)}


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _folders(directory: Path) -> list[Path]:
    """Return the folders of complete states, the newest last."""
    return sorted(directory.glob("training-state-*[0-9]"), key=lambda path: (len(str(path)), path))


def _digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
