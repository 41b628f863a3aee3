"""What may be done to a function before it is differentiated: compiling it, and lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessdiag.products import Mode


def prepared(
    score_fn: Callable[[Tensor], Any],
    x: Tensor,
    *,
    compile: bool,
    autocast: torch.dtype | None,
    mode: Mode,
) -> tuple[Callable[[Tensor], Any], Mode]:
    """Return ``score_fn`` compiled and under autocast as asked, and the mode that this allows.

    Raises:
        TypeError: If ``autocast`` is no lower-precision type.
        ValueError: If ``compile`` is asked for in forward mode.
    """
    if autocast is not None:
        if autocast not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}"
            )
        score_fn = _under_autocast(score_fn, x, autocast)
    if compile:
        if mode == "jvp":
            raise ValueError(
                "compile=True needs mode='vjp' or 'auto', got 'jvp': torch.compile has no "
                "forward-mode derivative of what it compiled"
            )
        # Graphs of dynamic shapes do not heed hessdiag.compat.reusable_graphs.
        score_fn, mode = torch.compile(score_fn, dynamic=False), "vjp"
    return score_fn, mode


def _under_autocast(
    score_fn: Callable[[Tensor], Any], x: Tensor, dtype: torch.dtype
) -> Callable[[Tensor], Any]:
    device_type, output_dtype = x.device.type, x.dtype

    def lowered(point: Tensor) -> Any:
        with torch.autocast(device_type, dtype=dtype):
            output = score_fn(point)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (output[0].to(output_dtype), *output[1:])  # further tensors stay what they are
        return output.to(output_dtype) if isinstance(output, Tensor) else output

    return lowered
