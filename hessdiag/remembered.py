"""What functions turned out to be able to do, for functions that are made anew at each call too.

A lambda or a closure is another object at every call. It is known again by its code and by the
modules and functions that it holds. What it could not do is remembered by these alone, since that
costs time at most; what was found right, by the numbers it holds as well.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Of one code with other modules, and of those with other numbers.
_MOST_VARIANTS = 64


@dataclass
class Abilities:
    """What is known of a function.

    Attributes:
        refused: By mode and batching: why that way cannot be taken.
        checked: What was found right, and need not be looked at again.
    """

    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    checked: set[Hashable] = field(default_factory=set)


@dataclass
class _Known:
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    checked: dict[Hashable, set[Hashable]] = field(default_factory=dict)


# By what holds the code, then by what goes with it.
_KNOWN: weakref.WeakKeyDictionary[Any, dict[Hashable, _Known]] = weakref.WeakKeyDictionary()


def abilities_of(function: object) -> Abilities:
    """Return what is known of a function, to be added to.

    Example:
        >>> def made():
        ...     return lambda x: x + 1
        >>> abilities_of(made()).checked.add("batched products")
        >>> abilities_of(made()).checked
        {'batched products'}
    """
    anchor, *rest = _parts(function, depth=4)
    numbers = tuple(part for part in rest if _is_plain(part))
    others = [part for part in rest if not _is_plain(part)]
    try:
        variants = _KNOWN.setdefault(anchor, {})
        known = _entry(variants, tuple(weakref.ref(part) for part in others), _Known)
        return Abilities(known.refused, _entry(known.checked, numbers, set))
    except TypeError:  # it cannot be hashed or weakly referenced, and so not be remembered
        return Abilities()


def _entry(entries: dict[Hashable, Any], key: Hashable, make: type) -> Any:
    if key not in entries:
        if len(entries) >= _MOST_VARIANTS:
            entries.clear()
        entries[key] = make()
    return entries[key]


def _parts(function: object, depth: int) -> Iterator[Any]:
    """Yield what tells a function from others: first its code, then what that calls."""
    if isinstance(function, types.MethodType):
        yield from _parts(function.__func__, depth)
        yield function.__self__
    elif isinstance(function, functools.partial):
        yield from _parts(function.func, depth)
        for value in (*function.args, *function.keywords.values()):
            yield from _held(value, depth)
    elif isinstance(function, types.FunctionType):
        code = function.__code__
        yield code
        for value in function.__defaults__ or ():
            yield from _held(value, depth)
        for cell in function.__closure__ or ():
            try:
                yield from _held(cell.cell_contents, depth)
            except ValueError:  # a name that is not bound yet
                yield None
        for name in code.co_names:
            yield from _held(function.__globals__.get(name), depth)
    else:
        yield function


def _held(value: object, depth: int) -> Iterator[Any]:
    if _is_plain(value):
        yield value
    elif callable(value) and not isinstance(value, type) and depth > 0:
        yield from _parts(value, depth - 1)


def _is_plain(part: object) -> bool:
    return part is None or isinstance(part, (str, int, float))
