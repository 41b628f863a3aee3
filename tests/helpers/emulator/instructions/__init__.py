"""What each instruction does, found by its opcode.

| module | has one task |
|---|---|
| ``rules`` | patterns of opcodes, and what they stand for |
| ``integers``, ``floats``, ``conversions`` | what is computed from operands alone |
| ``accesses`` | loads, stores, copies and atomics |
| ``warps`` | what threads of a warp do together |
| ``matrices`` | products of matrices |
"""

from collections.abc import Callable
from typing import Any

from emulator.instructions import accesses, conversions, floats, integers, matrices, warps
from emulator.instructions.rules import Operation


def find(opcode: str) -> Operation | Callable[..., None] | None:
    """Return what an instruction computes, or what executes it on a strand; None if unknown."""
    modules: tuple[Any, ...] = (integers, floats, conversions, accesses, warps, matrices)
    for module in modules:
        found: Operation | Callable[..., None] | None = module.rules.find(opcode)
        if found is not None:
            return found
    return None


__all__ = ["Operation", "find"]
