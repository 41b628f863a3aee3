"""Triton, or a stand-in where Triton has no wheels (macOS, Windows).

The stand-in lets the kernels' modules be imported, so that the PyTorch references work
everywhere; launching a kernel through it raises.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _UnavailableKernel:
        def __init__(self, function: Any) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                f"the Triton kernel {self.name!r} cannot run: triton is not installed on this "
                "machine; use CPU tensors, which take the PyTorch reference"
            )

    def _jit(function: Any = None, **options: Any) -> Any:
        return _UnavailableKernel if function is None else _UnavailableKernel(function)

    triton = SimpleNamespace(jit=_jit, cdiv=lambda a, b: -(-a // b))
    tl = SimpleNamespace(constexpr=lambda value: value)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the GPU that holds ``tensor`` the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def has_kernels(tensor: torch.Tensor) -> bool:
    """Say whether ops on ``tensor`` are done by the Triton kernels, and not by the references."""
    return tensor.is_cuda


__all__ = ["has_kernels", "on_device_of", "tl", "triton"]
