"""Mends for operators that some versions of PyTorch cannot differentiate in forward mode.

Each says which versions it is for; ``tests/test_compat.py`` fails when one can go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

TORCH_VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


class ContiguousGroupNorm(TorchFunctionMode):
    """Hand ``group_norm`` a contiguous input, and so a contiguous tangent.

    For torch below 2.15, where the forward-mode rule of ``native_group_norm`` calls ``view`` on a
    tangent that takes the layout of the input, channels_last for example.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, with a contiguous copy of the input where it is a group norm."""
        if func in (functional.group_norm, torch.group_norm):
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def forward_mode_operators() -> Iterator[None]:
    """Make attention and group normalisation differentiable in forward mode.

    ``scaled_dot_product_attention`` has no forward-mode rule in its flash and memory-efficient
    backends in any version so far, and one in the mathematical backend.

    Example:
        >>> with forward_mode_operators():
        ...     pass
    """
    group_norm = ContiguousGroupNorm() if TORCH_VERSION < (2, 15) else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), group_norm:
        yield
