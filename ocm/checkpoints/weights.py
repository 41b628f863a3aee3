"""Weights from disk, exactly those of their model; nothing is unpickled and nothing downloaded.

What a configuration asks for is first built without memory, on PyTorch's device "meta", and
compared with what the headers of the files name. So nothing is built that the files do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ocm.checkpoints.entries import (
    OBJECT,
    CheckpointError,
    check_entries,
    check_regular,
    naming,
    read_json,
    reason_of,
)

Module = TypeVar("Module", bound=nn.Module)
# Type and shape of each tensor, by its name.
Header = dict[str, tuple[str, tuple[int, ...]]]

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_FLOATS = ("F16", "BF16", "F32", "F64")
_OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}
# Numbers in tables of positions, which are computed and not stored: 1 GiB in float32.
_MOST_COMPUTED = 2**28


def load_model(kind: Any, path: str | Path) -> Any:
    """Return a model of diffusers from its folder, strictly.

    Its own ``from_pretrained`` would warn, and leave weights that it does not find at their random
    start.

    Args:
        kind: The class of the model.
        path: The folder, as ``save_pretrained`` writes it.

    Raises:
        CheckpointError: A ValueError that names the folder, if it cannot be read, lacks a weight
            or has one too many, or holds weights of another type, NaN or infinite ones.
    """
    folder = Path(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"path must be the folder of {kind.__name__}, with config.json and weights, got {path}"
        )
    config = read_json(folder / "config.json")
    try:
        if (name := config.get("_class_name", kind.__name__)) != kind.__name__:
            raise CheckpointError(f"config.json is that of another class, {name!r:.80}")
        return load_built(lambda: kind.from_config(config), weight_files(folder), "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{path} holds no {kind.__name__} that fits: {error}") from error


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of weights in a folder that ``save_pretrained`` of diffusers wrote.

    Raises:
        CheckpointError: If there are none, or the index of several is damaged.
    """
    suffix = "" if variant is None else f".{variant}"
    single = folder / f"diffusion_pytorch_model{suffix}.safetensors"
    index = folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
    if single.exists():
        return [single]
    if index.exists():
        entries = read_json(index)
        with naming(index):
            check_entries(entries, {"weight_map": OBJECT})
            names = sorted(set(entries["weight_map"].values()))
            if not names:
                raise ValueError("weight_map must name a file, got none")
            for name in names:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(
                        f"weight_map must name files .safetensors beside it, got {name[:80]!r}"
                    )
        return [folder / name for name in names]
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLED]
    raise CheckpointError(
        f"there is neither a single model file {single.name} nor an index of several"
        + (f"; {pickled[0]} is never unpickled: convert it to safetensors" if pickled else "")
    )


def load_built(make: Callable[[], Module], files: Sequence[Path], described_by: str) -> Module:
    """Return what ``make`` builds, with the weights of the files, once it is known to have these.

    Args:
        make: Builds the module of its configuration.
        files: Which hold its weights together.
        described_by: The file of the configuration, for errors.

    Raises:
        CheckpointError: If the configuration makes no module, the files cannot be read, are of
            another one, or hold NaN or infinite weights.
    """
    check_built(make, files, described_by)
    module = make()
    _copy(files, module)
    return module


def check_built(make: Callable[[], nn.Module], files: Sequence[Path], described_by: str) -> None:
    """Raise as :func:`load_built` does, but for NaN, and build nothing.

    Raises:
        CheckpointError: As :func:`load_built`.
    """
    found = _header_of(files)
    try:
        with torch.device("meta"), _at_most(len(found)):
            planned = make()
    # What a constructor raises of entries that it does not expect depends on the library.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise CheckpointError(f"{described_by} describes no model: {reason}") from error
    tables = (table for name, table in planned.named_buffers() if name not in found)
    computed = sum(table.numel() for table in tables)
    if computed > _MOST_COMPUTED:
        raise CheckpointError(
            f"{described_by} asks for tables of {computed} numbers, more than {_MOST_COMPUTED}"
        )
    _check_same(found, planned, files)


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into a module, strictly.

    Raises:
        CheckpointError: A ValueError that names the file, if it cannot be read, is that of another
            module, or holds NaN or infinite weights.
    """
    _check_same(_header_of([file]), module, [file])
    _copy([file], module)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: A ValueError that names the file, if it cannot be read, or holds tensors
            of 8 bits, complex numbers, NaN or infinity.
    """
    fitting = (*_FLOATS, *_OTHERS.values())
    for name, (dtype, _) in _header_of([file]).items():
        if dtype not in fitting:
            raise CheckpointError(
                f"{file} must hold {', '.join(fitting)}, got {dtype} in {name[:80]!r}"
            )
    return _finite_tensors(file)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop the building of a module on the device "meta" that has far more weights than these."""
    # Some are registered, and then replaced or shared.
    most, registered = 2 * count + 64, 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal registered
        # Modules that other threads build are elsewhere.
        registered += parameter.is_meta
        if registered > most:
            raise ValueError(f"it has more weights than the {count} of its files")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _header_of(files: Sequence[Path]) -> Header:
    from safetensors import SafetensorError, safe_open

    found: Header = {}
    for file in files:
        try:
            if file.suffix in _PICKLED:
                raise ValueError("it is never unpickled: convert it to safetensors")
            check_regular(file)
            file.open("rb").close()  # safe_open would call one that may not be read missing
            with safe_open(file, "pt") as tensors:
                # A slice is read when it is indexed, and not before.
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {reason_of(error)}") from error
        for name, part in slices.items():
            if name in found:
                raise CheckpointError(f"{file} holds {name[:80]!r}, and so does another file")
            found[name] = part.get_dtype(), tuple(part.get_shape())
    return found


def _check_same(found: Header, module: nn.Module, files: Sequence[Path]) -> None:
    """Raise unless the tensors in the files are those of a module, in shape and kind."""
    wanted: dict[str, Tensor] = module.state_dict()
    place = files[0] if len(files) == 1 else files[0].parent
    for kind, names in (
        ("Missing key", [name for name in wanted if name not in found]),
        ("Unexpected key", [name for name in found if name not in wanted]),
    ):
        if names:
            some = ", ".join(repr(name[:80]) for name in names[:3])
            raise CheckpointError(
                f"{place} is of another model: {kind}(s) {some}, {len(names)} in all"
            )
    for name, tensor in wanted.items():
        dtype, shape = found[name]
        is_float = tensor.is_floating_point()
        fitting = _FLOATS if is_float else (_OTHERS.get(tensor.dtype, str(tensor.dtype)),)
        if shape != tensor.shape or dtype not in fitting:
            raise CheckpointError(
                f"{place} is of another model: {name!r} must be {' or '.join(fitting)} of shape "
                f"{tuple(tensor.shape)}, got {dtype} of shape {shape}"
            )


def _copy(files: Sequence[Path], module: nn.Module) -> None:
    for file in files:
        module.load_state_dict(_finite_tensors(file), strict=False)  # the names are known to fit


def _finite_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(file)
    for name, values in tensors.items():
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{file} holds NaN or infinite values in {name[:80]!r}")
    return tensors
