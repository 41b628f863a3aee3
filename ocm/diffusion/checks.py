"""Checks of arguments: every error names the argument, its value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

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


def floating(name: str, x: object) -> Tensor:
    """Return ``x``, a real floating-point tensor.

    Raises:
        TypeError: If it is no tensor, or of an integer, boolean or complex type.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
    return x


def check_finite(name: str, x: object) -> None:
    """Raise unless ``x`` is a floating-point tensor of finite values.

    Raises:
        TypeError: If it is no tensor, or of an integer, boolean or complex type.
        ValueError: If it holds NaN or infinity, or no numbers at all, on the meta device.

    Example:
        >>> check_finite("x0", torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        ...
        ValueError: x0 must be finite, got 1 NaN or infinite of 2 values
    """
    x = floating(name, x)
    if x.is_meta:
        raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    infinite = int((~torch.isfinite(x)).sum())
    if infinite:
        raise ValueError(
            f"{name} must be finite, got {infinite} NaN or infinite of {x.numel()} values"
        )


def is_number(value: object) -> bool:
    """Return whether a value is a finite number.

    Example:
        >>> is_number(3), is_number(1e300), is_number(float("nan")), is_number("3")
        (True, True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= 1e308 and math.isfinite(value)


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite real number; booleans are none.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN or infinite.

    Example:
        >>> check_number("guidance_scale", float("nan"))
        Traceback (most recent call last):
        ...
        ValueError: guidance_scale must be finite, got nan
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_batch(name: str, x: object) -> None:
    """Raise unless ``x`` is a floating-point tensor of shape (B, channels, ...).

    Its values are not looked at, which on a GPU would have to be waited for.

    Raises:
        TypeError: If it is no tensor, or of an integer, boolean or complex type.
        ValueError: If it has fewer than two dimensions.

    Example:
        >>> check_batch("x_t", torch.zeros(3))
        Traceback (most recent call last):
        ...
        ValueError: x_t must have shape (B, channels, ...), got (3,)
    """
    x = floating(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (B, channels, ...), got {tuple(x.shape)}")


def check_range(name: str, bounds: object) -> None:
    """Raise unless ``bounds`` are None, or (low, high) in order; either may be infinite.

    Raises:
        TypeError: If they are no pair.
        ValueError: If they are not in order, or one is NaN.

    Example:
        >>> check_range("x0_range", (1.0, -1.0))
        Traceback (most recent call last):
        ...
        ValueError: x0_range must be (low, high) with low <= high, got (1.0, -1.0)
    """
    if bounds is None:
        return
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or isinstance(bounds, str):
        raise TypeError(f"{name} must be (low, high) or None, got {bounds!r}")
    low, high = bounds
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {bounds}")


def check_samples(x0: object, labels: object, batch_size: object) -> None:
    """Raise unless x0 are samples that something may be fitted to, a batch at a time.

    Raises:
        TypeError: If x0 is no floating-point tensor, or ``batch_size`` no int.
        ValueError: If there are no samples, one is not finite, or there is not one label for each.

    Example:
        >>> check_samples(torch.zeros(3, 1, 2, 2), torch.tensor([0]), 256)
        Traceback (most recent call last):
        ...
        ValueError: labels must be a tensor of one for each of 3 samples, got (1,)
    """
    check_positive_int("batch_size", batch_size)
    x0 = floating("x0", x0)
    check_batch("x0", x0)
    check_finite("x0", x0)
    if len(x0) == 0:
        raise ValueError(f"x0 must hold at least one sample, got shape {tuple(x0.shape)}")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != x0.shape[:1]):
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a tensor of one for each of {len(x0)} samples, got {got}")


def check_timesteps(timesteps: object) -> list[Any]:
    """Return timesteps, or steps (s, t), where something is fitted, as a list.

    Raises:
        TypeError: If they are no sequence.
        ValueError: If there are none.

    Example:
        >>> check_timesteps(500)
        Traceback (most recent call last):
        ...
        TypeError: timesteps must be a sequence of numbers, got 500
    """
    if not isinstance(timesteps, Iterable) or isinstance(timesteps, str):
        raise TypeError(f"timesteps must be a sequence of numbers, got {timesteps!r}")
    listed = list(timesteps)
    if not listed:
        raise ValueError("timesteps must hold at least one, got none")
    return listed
