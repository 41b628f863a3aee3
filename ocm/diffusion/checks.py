"""Checks of arguments: every error names the argument, its value and what would be right."""

from __future__ import annotations

import torch
from torch import Tensor


def check_positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an int of at least 1.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.

    Example:
        >>> check_positive_int("steps", 0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be at least 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_finite(name: str, x: object) -> None:
    """Raise unless ``x`` is a floating-point tensor of finite values.

    Raises:
        TypeError: If it is no tensor, or of an integer, boolean or complex type.
        ValueError: If it holds NaN or infinity.

    Example:
        >>> check_finite("x0", torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        ...
        ValueError: x0 must be finite, got 1 NaN or infinite of 2 values
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
    infinite = int((~torch.isfinite(x)).sum())
    if infinite:
        raise ValueError(
            f"{name} must be finite, got {infinite} NaN or infinite of {x.numel()} values"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a part of a tensor, as ``fully_shard`` leaves it.

    Example:
        >>> is_sharded(torch.zeros(1))
        False
    """
    # A DTensor, whose module takes a second to import.
    return hasattr(tensor, "full_tensor")
