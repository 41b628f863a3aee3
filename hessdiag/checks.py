"""Checks of arguments: every error names the argument, its value and what would be right."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from hessdiag.compat import has_tangent
from hessdiag.kernels.philox import integer_of


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` as an int, unless it is no integer or below 1.

    Integers of NumPy are integers; booleans are not.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.

    Example:
        >>> check_positive_int("M", 0)
        Traceback (most recent call last):
        ...
        ValueError: M must be at least 1, got 0
    """
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def as_int(name: str, value: object) -> int:
    """Return an integer of Python or NumPy as an int.

    Raises:
        TypeError: If ``value`` is none.

    Example:
        >>> import numpy as np
        >>> as_int("seed", np.int64(3))
        3
    """
    number = integer_of(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    return number


def check_batch(name: str, x: object, *, differentiable: bool = False) -> None:
    """Raise unless ``x`` is a finite real floating-point tensor with a batch dimension.

    Args:
        name: Name of the argument.
        x: The argument.
        differentiable: Whether x may take part in torch.func.grad and jvp.

    Raises:
        TypeError: If it is no dense tensor, of an integer, boolean, complex or 8-bit type, or
            inside of a transform of torch.func.
        ValueError: If it has no dimension, holds NaN or infinity, or is on the meta device.

    Example:
        >>> check_batch("x", torch.zeros(2, 3, dtype=torch.int64))
        Traceback (most recent call last):
        ...
        TypeError: x must be a real floating-point tensor, got torch.int64
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {x.dtype}")
    if x.itemsize < 2:
        raise TypeError(f"{name} must be of a type of at least 16 bits, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}; pass {name}.to_dense()")
    if x.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape (B, ...), got a 0-dimensional tensor")
    wrapped = _is_wrapped(x)
    batched = wrapped and _is_batched(x)
    if batched or (not differentiable and (wrapped or has_tangent(x))):
        raise TypeError(
            f"{name} must not take part in torch.func.grad, jvp or vmap: the result carries no "
            "derivative; call this outside of the transform, on a batch"
            + ("" if batched else ", or pass differentiable=True")
        )
    # A sum is finite only if all values are, and costs one operator; of large ones it may not be.
    if not math.isfinite(x.detach().sum()) and not bool((finite := torch.isfinite(x)).all()):
        count = int((~finite).sum())
        raise ValueError(
            f"{name} must be finite, got {count} NaN or infinite of {x.numel()} values"
        )


def check_real(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number; booleans are none.

    Raises:
        TypeError: If it is none.

    Example:
        >>> check_real("rtol", "0.1")
        Traceback (most recent call last):
        ...
        TypeError: rtol must be a number, got '0.1' of type str
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_output(output: object, x: Tensor, *, rectangular: bool = False) -> None:
    """Raise unless ``output``, which ``score_fn(x)`` returned, is a tensor like ``x``.

    Args:
        output: What was returned.
        x: What was given.
        rectangular: Whether it need share the first dimension alone, that of the batch.

    Raises:
        TypeError: If it is no tensor, or of another dtype.
        ValueError: If it is of another shape or on another device.

    Example:
        >>> check_output(torch.zeros(2), torch.zeros(2, 3))
        Traceback (most recent call last):
        ...
        ValueError: score_fn must return the shape of x, (2, 3), got (2,)
    """
    if not isinstance(output, Tensor):
        hint = ""
        if hasattr(output, "sample") or isinstance(output, (tuple, list, dict)):
            hint = "; take the tensor out of it, as in lambda x: model(x, t).sample"
        raise TypeError(f"score_fn must return a torch.Tensor, got {type(output).__name__}{hint}")
    if rectangular:
        if output.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"score_fn must return shape ({len(x)}, ...), a row for each sample of x, got "
                f"{tuple(output.shape)}"
            )
    elif output.shape != x.shape:
        raise ValueError(
            f"score_fn must return the shape of x, {tuple(x.shape)}, got {tuple(output.shape)}"
        )
    if output.dtype != x.dtype:
        raise TypeError(
            f"score_fn must return the dtype of x, {x.dtype}, got {output.dtype}; "
            "convert inside score_fn"
        )
    if output.device != x.device:
        raise ValueError(
            f"score_fn must return a tensor on the device of x, {x.device}, got {output.device}"
        )


def _is_wrapped(x: Tensor) -> bool:
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped


def _is_batched(x: Tensor) -> bool:
    while _is_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False
