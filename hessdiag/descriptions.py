"""What a network made of PyTorch's own modules computes, as a value.

What was found of one network holds for every other of the same description, and no longer for a
network that has been changed, whatever was changed in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_PLAIN = {type(None), bool, int, float, str, torch.dtype, torch.device}
_COLLECTIONS = {dict, OrderedDict, set}


class _NotPlainError(Exception):
    """A value that is more than what can be seen of it."""


def description_of(network: nn.Module) -> Hashable | None:
    """Return all that the computation of a network depends on, but for the numbers in its tensors.

    These are the types of its modules and their ``forward``, their attributes, training or not, how
    they are put together, and of each parameter and buffer the shape, the type, whether it requires
    a gradient, and which of them are one tensor.

    Returns:
        None where it depends on more: on code that is not PyTorch's own, be it a class, a patched
        ``forward``, a hook or a function among the attributes, which may do something else each
        time.

    Example:
        >>> first, second = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> description_of(first) == description_of(second)
        True
        >>> second.weight.requires_grad_(False)    # doctest: +ELLIPSIS
        Parameter containing:...
        >>> description_of(first) == description_of(second)
        False
    """
    if nn.modules.module._has_any_global_hook():
        return None
    numbers: dict[int, int] = {}

    def number(thing: object) -> int:
        return numbers.setdefault(id(thing), len(numbers))

    def tensor(t: torch.Tensor | None) -> Hashable:
        if t is None:
            return None
        return number(t), type(t), t.shape, t.dtype, t.device, t.requires_grad

    found: list[Hashable] = []
    try:
        for module in network.modules():
            kind = type(module)
            if not kind.__module__.startswith("torch.nn.modules."):
                return None
            held = vars(module)
            found.append((number(module), kind, kind.forward, tuple(held)))
            for name, value in held.items():
                if type(value) in _PLAIN:
                    found.append(value)
                elif type(value) in _COLLECTIONS and not value:  # no hooks, say
                    continue
                elif name == "_modules":
                    found += [(name, child, number(m)) for child, m in value.items()]
                elif name in ("_parameters", "_buffers"):
                    found += [(name, own, tensor(t)) for own, t in value.items()]
                elif name != "_non_persistent_buffers_set":
                    found.append((name, _plain(value)))
    except _NotPlainError:
        return None
    return tuple(found)


def _plain(value: Any) -> Hashable:
    if type(value) in _PLAIN:
        plain: Hashable = value
        return plain
    if type(value) in (tuple, list):
        return tuple(_plain(v) for v in value)
    raise _NotPlainError
