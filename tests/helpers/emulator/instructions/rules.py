"""How instructions are found by their opcode."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Operation:
    """What an instruction computes from its operands alone.

    Attributes:
        sources: Type in which each operand is read.
        results: Type of each result.
        compute: From the numbers of the operands to that of the result, or to a tuple of them.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    compute: Callable[..., Any]


class Rules(Generic[Result]):
    """Patterns of whole opcodes, modifiers and all, and what is made of a match.

    A modifier that no pattern has is not ignored: nothing is found.
    """

    def __init__(self) -> None:
        self._rules: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Result | None]]] = []
        self._found: dict[str, Result | None] = {}

    def __call__(self, pattern: str) -> Callable[[Any], Any]:
        """Add the function below as a rule."""

        def add(make: Callable[[re.Match[str]], Result]) -> Callable[[re.Match[str]], Result]:
            self._rules.append((re.compile(pattern), make))
            return make

        return add

    def find(self, opcode: str) -> Result | None:
        """Return what the first rule that fits makes of an opcode, or None."""
        if opcode not in self._found:
            matches = ((pattern.fullmatch(opcode), make) for pattern, make in self._rules)
            made = (make(match) for match, make in matches if match)
            self._found[opcode] = next(made, None)
        return self._found[opcode]
