"""A device for Triton whose kernels the machine runs, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from emulator.machine import Executable, prepare, run
from emulator.memory import GlobalMemory, extent
from emulator.parsing import EmulationError, parse

# Bytes of shared memory that a block may have.
_SHARED_LIMITS = {80: 166_912, 90: 232_448}

Programs = Callable[[tuple[int, int, int]], Sequence[int]]


@dataclass(frozen=True)
class Launch:
    """A launch that was emulated: of what, and how large.

    Attributes:
        kernel: Name of the Triton function.
        key: Names one compiled specialisation.
        grid: Number of programs in x, y and z.
    """

    kernel: str
    key: str
    grid: tuple[int, int, int]


@dataclass
class _State:
    capability: int = 90
    execute: bool = True
    only: Programs | None = None
    launches: list[Launch] = field(default_factory=list)


_state = _State()


def launches() -> list[Launch]:
    """Return all launches so far that were executed."""
    return list(_state.launches)


@contextmanager
def without_execution() -> Iterator[None]:
    """Let launches do nothing, as to time what the host does for one."""
    before, _state.execute = _state.execute, False
    try:
        yield
    finally:
        _state.execute = before


@contextmanager
def only_programs(choose: Programs) -> Iterator[None]:
    """Execute some programs of each grid: those whose linear numbers ``choose(grid)`` returns."""
    before, _state.only = _state.only, choose
    try:
        yield
    finally:
        _state.only = before


@contextmanager
def capability(number: int) -> Iterator[None]:
    """Compile for another device than sm_90: 80 for an A100."""
    if number not in _SHARED_LIMITS:
        raise ValueError(f"number must be one of {sorted(_SHARED_LIMITS)}, got {number}")
    before, _state.capability = _state.capability, number
    try:
        yield
    finally:
        _state.capability = before


@cache
def _executable(path: str) -> Executable:
    return prepare(parse(Path(path).read_text()))


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.metadata = metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise EmulationError(f"clusters are not emulated, got num_ctas={metadata.num_ctas}")
        if getattr(metadata, "tensordesc_meta", None):
            raise EmulationError("tensor descriptors are not emulated")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        packed_metadata: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        if not _state.execute or x * y * z == 0:
            return
        metadata = self.metadata
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name[:150]}.ptx")
        if path is None:
            raise EmulationError(f"Triton's cache holds no PTX of {metadata.name}")
        values, extents = [], []
        for kind, argument in zip(self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(argument, torch.Tensor):
                if argument.device.type != "cpu":
                    raise EmulationError(f"a tensor must be on the CPU, got {argument.device}")
                extents.append(extent(argument))
                values.append(argument.data_ptr())
            else:
                values.append(argument)
        for name in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, name, 0):
                raise EmulationError(f"scratch memory is not emulated, got {name}")
        grid = (x, y, z)
        run(
            _executable(path),
            grid,
            values,
            GlobalMemory(extents),
            shared_bytes=metadata.shared,
            only=None if _state.only is None else _state.only(grid),
        )
        _state.launches.append(Launch(metadata.name, metadata.hash, grid))


class _Driver:
    """The parts of a driver of Triton that compiling and launching need.

    Triton keeps what it compiled for each device: here the capability is the device's number.
    """

    def __init__(self) -> None:
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": _SHARED_LIMITS[device],
                "multiprocessor_count": 132,
                "warpSize": 32,
            },
            # Module, function, registers, spills, and the most threads of a block.
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _state.capability, 32)

    def get_current_device(self) -> int:
        return _state.capability

    def set_current_device(self, device: int) -> None:
        if device != _state.capability:
            raise EmulationError(f"the device must be {_state.capability}, got {device}")

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


def install() -> None:
    """Let Triton compile for, and launch on, the emulated device.

    Raises:
        RuntimeError: If Triton's interpreter is on, which would compile nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    triton_driver.set_active(_Driver())
