"""What every op asks of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: object, device: torch.device | None = None) -> None:
    """Raise unless ``tensor`` is one that an op can read.

    Args:
        name: How the op calls it.
        tensor: What was passed.
        device: Where it must lie; None for anywhere.

    Raises:
        TypeError: If it is no tensor, not of a real floating-point type, or carries a tangent of
            forward-mode differentiation, for which the ops have no rule and would return zero.
        ValueError: If it lies elsewhere, or two of its elements share memory.

    Example:
        >>> check_tensor("x_t", torch.ones(3).cfloat())
        Traceback (most recent call last):
        ...
        TypeError: x_t must be a float32, float64, bfloat16 or float16 tensor, got torch.complex64
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {tensor.dtype}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} carries a tangent of forward-mode differentiation, for which this op has no "
            "rule; pass a detached tensor"
        )
    if not tensor.is_contiguous() and _overlaps(tensor):
        raise ValueError(
            f"{name} must not overlap itself in memory, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass {name}.contiguous()"
        )


def is_eager(*tensors: Tensor) -> bool:
    """Say whether nobody but the caller sees what is done to the tensors.

    Only then may an op go without the dispatcher. A compiler, a tracer, a transform of
    ``torch.func``, automatic differentiation or a dispatch mode (fake tensors) would not see it;
    for these there are the custom ops and PyTorch's operators.

    Example:
        >>> is_eager(torch.ones(2)), is_eager(torch.ones(2, requires_grad=True))
        (True, False)
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator would take longer than the checks)
        if type(tensor) is not Tensor or tensor.requires_grad:
            return False
    return True


def is_eager_cpu(*tensors: Tensor) -> bool:
    """Say whether, besides, the tensors lie on a CPU, and may be read and computed in NumPy.

    Example:
        >>> is_eager_cpu(torch.tensor(7)), is_eager_cpu(torch.ones(2, device="meta"))
        (True, False)
    """
    return is_eager(*tensors) and all(t.is_cpu for t in tensors)


def check_shape(shape: Sequence[int]) -> list[int]:
    """Return the sizes of a shape as a list of ints.

    Raises:
        TypeError: If a size is not an integer.

    Example:
        >>> check_shape((2.5, 3))
        Traceback (most recent call last):
        ...
        TypeError: shape must hold integers, got (2.5, 3)
    """
    try:
        return [operator.index(size) for size in shape]
    except TypeError:
        raise TypeError(f"shape must hold integers, got {shape!r}") from None


def rows_per_sample(
    values: Mapping[str, float | Tensor], x: Tensor
) -> tuple[Tensor | None, list[float]]:
    """Return a row of values for each sample, or None and the numbers that hold for all.

    Args:
        values: A number or a tensor of shape (B,) for each name.
        x: Shape (B, ...), which gives device and precision (at least float32).

    Raises:
        ValueError: If a tensor has another number of elements than 1 or B.

    Example:
        >>> rows_per_sample({"scale": 2.0, "shift": 1.0}, torch.zeros(3, 4))
        (None, [2.0, 1.0])
    """
    if not any(isinstance(value, Tensor) for value in values.values()):
        return None, [float(value) for value in values.values()]
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = []
    for name, value in values.items():
        column = torch.as_tensor(value, dtype=dtype, device=x.device).reshape(-1)
        if len(column) not in (1, len(x)):
            raise ValueError(
                f"{name} must be a number or a tensor of shape ({len(x)},), "
                f"got {len(column)} values"
            )
        columns.append(column.expand(len(x)))
    return torch.stack(columns, dim=1), [0.0] * len(columns)


def _overlaps(tensor: Tensor) -> bool:
    """Say whether two elements may share memory, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
