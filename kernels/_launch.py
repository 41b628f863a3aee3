"""Launches of Triton kernels that cost little time on the host.

``kernel[grid](...)`` finds out at each call how every argument specialises the code, 10 to 20
microseconds for the kernels of this package. Here the caller's arguments tell: numbers are int32
or float32 and specialise nothing, and of tensors count type, alignment and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessdiag.kernels._checks import is_eager
from hessdiag.kernels._triton import has_kernels, on_device_of

Way = TypeVar("Way", bound=Callable[..., Any])

# Compiled kernels by all that they depend on.
_COMPILED: dict[tuple[object, ...], Any] = {}
# Kept, so that no other object gets the identity of one.
_KERNELS: dict[int, Any] = {}


def way(op: Any, kernel: Way, reference: Way, *tensors: Tensor | None) -> Way:
    """Return what computes an op on the tensors: the op itself only where it must be seen.

    The way through PyTorch's dispatcher takes longer than the rest of a small call. A compiler, a
    transform or a mode needs it, and takes the op (:func:`hessdiag.kernels._checks.is_eager`).
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not is_eager(*present):
        chosen: Way = op
        return chosen
    return kernel if has_kernels(present[0]) else reference


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: tuple[object, ...],
    num_warps: int,
) -> None:
    """Launch a kernel whose parameters are tensors, then numbers, then compile-time constants.

    Args:
        kernel: Made by ``triton.jit``, with ``do_not_specialize`` for all of its numbers.
        grid: Numbers of programs, each within CUDA's limits.
        tensors: On one device.
        numbers: Floats, and integers in [-2**31, 2**31).
        constants: Hashable.
        num_warps: Warps of a program.
    """
    first = tensors[0]
    index = first.get_device()  # -1 on a CPU
    aligned = 0
    for tensor in tensors:
        aligned = aligned << 1 | (tensor.data_ptr() & 15 == 0)
    # By its identity, for Triton computes the hash of a kernel from its code.
    key = (id(kernel), index, aligned, num_warps, constants, *[tensor.dtype for tensor in tensors])
    known = _COMPILED.get(key)
    arguments = (*tensors, *numbers, *constants)
    if index < 0 or index == torch.cuda.current_device():
        compiled = _call(known, kernel, grid, arguments, num_warps)
    else:
        with on_device_of(first):
            compiled = _call(known, kernel, grid, arguments, num_warps)
    if known is None:
        _COMPILED[key] = compiled
        _KERNELS[id(kernel)] = kernel


def _call(
    compiled: Any,
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    num_warps: int,
) -> Any:
    if compiled is None:  # for the first time, and at each time under Triton's interpreter
        return kernel[grid](*arguments, num_warps=num_warps)
    compiled[grid](*arguments)
    return compiled
