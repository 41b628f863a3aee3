"""Instructions that move data: between registers, and from and to memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emulator.instructions.rules import Rules
from emulator.parsing import (
    Address,
    Both,
    EmulationError,
    Instruction,
    Operand,
    Symbol,
    Vector,
)
from emulator.values import UNSIGNED, Array, add_to_odd, decode, encode, halves, pack, width

if TYPE_CHECKING:
    from emulator.machine import Strand

Execute = Callable[["Strand", Instruction], None]
rules: Rules[Execute] = Rules()

# How strongly an access is ordered, and where its data are cached, change no value here.
_ORDER = r"(?:\.(?:weak|volatile|relaxed|acquire|release|acq_rel|cta|cluster|gpu|sys))*"
_CACHE = r"(?:\.(?:ca|cg|cs|cv|lu|wb|wt|nc|L1::\w+|L2::\w+))*"
_TYPE = r"([busf](?:8|16|32|64)|b128)"


def items(operand: Operand) -> tuple[Operand, ...]:
    """Return the parts of a vector, or the one operand."""
    return operand.items if isinstance(operand, Vector) else (operand,)


@rules(r"mov\.(pred|[busf](?:16|32|64))")
def _move(match: re.Match[str]) -> Execute:
    type_ = match[1]
    bits = width(type_)

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source = instruction.operands
        mask = strand.mask(instruction)
        if isinstance(source, Vector):
            part = bits // len(source.items)
            value = np.zeros((1, 1), UNSIGNED[bits])
            for i, item in enumerate(source.items):
                shift = value.dtype.type(i * part)
                value = value | (strand.bits(item, part).astype(value.dtype) << shift)
            strand.write(target, value, mask)
        elif isinstance(target, Vector):
            value = strand.bits(source, bits)
            part = bits // len(target.items)
            for i, item in enumerate(target.items):
                shift = value.dtype.type(i * part)
                strand.write(item, (value >> shift).astype(UNSIGNED[part]), mask)
        else:
            strand.write(target, strand.bits(source, bits), mask)

    return execute


@rules(r"cvta(?:\.to)?\.(global|shared|local)\.u64")
def _convert_address(match: re.Match[str]) -> Execute | None:
    if match[1] == "local":
        return None

    # Generic addresses are those of global memory; shared memory has its own instructions.
    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source = instruction.operands
        strand.write(target, strand.bits(source, 64), strand.mask(instruction))

    return execute


@rules(rf"ld\.param\.{_TYPE}")
def _load_parameter(match: re.Match[str]) -> Execute:
    type_ = match[1]
    size = width(type_) // 8

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source = instruction.operands
        if not isinstance(source, Address) or not isinstance(source.base, Symbol):
            raise EmulationError("a parameter is read by its name")
        stored = strand.parameters[source.base.name][source.offset : source.offset + size]
        if len(stored) < size:
            raise EmulationError(f"{source.base.name} is read beyond its end")
        bits = np.full((1, 1), int.from_bytes(stored, "little"), dtype=UNSIGNED[8 * size])
        strand.write_number(target, decode(bits, type_), type_, strand.mask(instruction))

    return execute


def chosen_threads(strand: Strand, mask: Array | None) -> Array:
    """Return which threads execute, as an array of the shape of the strand."""
    return np.broadcast_to(True if mask is None else mask, strand.shape)


def gather(
    strand: Strand, address: Operand, mask: Array | None, size: int, count: int, shared: bool
) -> list[Array]:
    """Read integers of ``size`` bytes at an address of each thread that executes."""
    chosen = chosen_threads(strand, mask)
    if not chosen.any():
        return [np.zeros((1, 1), UNSIGNED[8 * size])] * count
    if shared:
        addresses = strand.address(address, 32).astype(np.int64)
        rows = np.broadcast_to(strand.rows[:, None], strand.shape)[chosen]
        addresses = np.broadcast_to(addresses, strand.shape)[chosen]
        values = strand.shared.gather(rows, addresses, size, count)
    else:
        addresses = strand.address(address, 64)
        if addresses.size == 1:
            # The same everywhere: it is read once.
            return [
                value.reshape(1, 1)
                for value in strand.memory.gather(addresses.reshape(1), size, count)
            ]
        values = strand.memory.gather(np.broadcast_to(addresses, strand.shape)[chosen], size, count)
    result = []
    for value in values:
        if value.size == chosen.size:
            result.append(value.reshape(strand.shape))
        else:
            spread = np.zeros(strand.shape, value.dtype)
            spread[chosen] = value
            result.append(spread)
    return result


def scatter(
    strand: Strand, address: Operand, mask: Array | None, values: list[Array], shared: bool
) -> None:
    """Write integers at an address of each thread that executes."""
    chosen = chosen_threads(strand, mask)
    if not chosen.any():
        return
    values = [np.broadcast_to(value, strand.shape)[chosen] for value in values]
    size = values[0].itemsize
    addresses = np.broadcast_to(strand.address(address, 32 if shared else 64), strand.shape)[chosen]
    if shared:
        rows = np.broadcast_to(strand.rows[:, None], strand.shape)[chosen]
        strand.shared.scatter(rows, addresses.astype(np.int64), size, values)
    else:
        strand.memory.scatter(addresses, size, values)


@rules(rf"ld{_ORDER}\.(global|shared)(?:::cta)?{_ORDER}{_CACHE}(?:\.v([248]))?\.{_TYPE}")
def _load(match: re.Match[str]) -> Execute | None:
    space, count, type_ = match[1], int(match[2] or 1), match[3]
    if type_ == "b128":
        return None

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, address, *_ = instruction.operands
        targets = items(target)
        if len(targets) != count:
            raise EmulationError(f"{count} values are read into {len(targets)} registers")
        mask = strand.mask(instruction)
        size = width(type_) // 8
        loaded = gather(strand, address, mask, size, count, space == "shared")
        for register, value in zip(targets, loaded, strict=True):
            strand.write_number(register, decode(value, type_), type_, mask)

    return execute


@rules(rf"st{_ORDER}\.(global|shared)(?:::cta)?{_ORDER}{_CACHE}(?:\.v([248]))?\.{_TYPE}")
def _store(match: re.Match[str]) -> Execute | None:
    space, count, type_ = match[1], int(match[2] or 1), match[3]
    if type_ == "b128":
        return None

    def execute(strand: Strand, instruction: Instruction) -> None:
        address, source, *_ = instruction.operands
        sources = items(source)
        if len(sources) != count:
            raise EmulationError(f"{count} values are written from {len(sources)} registers")
        bits = width(type_)
        values = [strand.bits(item, bits) for item in sources]
        scatter(strand, address, strand.mask(instruction), values, space == "shared")

    return execute


@rules(r"createpolicy\.fractional\.L2::\w+(?:\.L2::\w+)?\.b64")
def _policy(_: re.Match[str]) -> Execute:
    def execute(strand: Strand, instruction: Instruction) -> None:
        strand.write(instruction.operands[0], np.zeros((1, 1), np.uint64), strand.mask(instruction))

    return execute


@rules(r"prefetch(?:u)?\.(?:global\.)?L[12](?:::\w+)?")
def _prefetch(_: re.Match[str]) -> Execute:
    return lambda strand, instruction: None


@rules(r"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
def _copy(_: re.Match[str]) -> Execute:
    """Copy at once, to shared memory; what lies beyond the size of the source becomes zero."""

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source, size, *rest = instruction.operands
        total = int(strand.bits(size, 32)[0, 0])
        mask = strand.mask(instruction)
        chosen = chosen_threads(strand, mask)
        wanted = np.broadcast_to(strand.bits(rest[0], 32), strand.shape) if rest else None
        step = 4
        words = total // step
        if wanted is None:
            values = gather(strand, source, mask, step, words, shared=False)
        else:
            if not np.isin(wanted[chosen], (0, total)).all():
                raise EmulationError(f"a copy must be of 0 or {total} bytes here")
            reads = chosen & (wanted == total)
            values = gather(strand, source, reads, step, words, shared=False)
            values = [np.where(reads, value, np.uint32(0)) for value in values]
        scatter(strand, target, mask, values, shared=True)

    return execute


@rules(r"cp\.async\.(?:commit_group|wait_group|wait_all)")
def _copy_order(_: re.Match[str]) -> Execute:
    return lambda strand, instruction: None


def _exchange(old: Array, value: Array) -> Array:
    return value


_ATOMICS: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": _exchange,
}
_ATOMIC_TYPE = r"(f16x2|bf16x2|[busf](?:16|32|64)|bf16)"


def _combine(name: str, type_: str, old: Array, value: Array) -> Array:
    """Return the bits of old and value combined, as numbers of a type."""
    if type_.endswith("x2"):
        element = type_.removesuffix("x2")
        pairs = zip(halves(old), halves(value), strict=True)
        return pack(*(_combine(name, element, one, other) for one, other in pairs))
    numbers = (decode(old, type_), decode(value, type_))
    if name == "add" and type_ in ("f16", "bf16"):
        return encode(add_to_odd(*(n.astype(np.float64) for n in numbers)), type_)
    return encode(_ATOMICS[name](*numbers), type_)


@rules(
    rf"(atom|red){_ORDER}\.(global|shared)(?:::cta)?{_ORDER}\.(add|min|max|and|or|xor|exch)"
    rf"(?:\.noftz)?{_CACHE}(?:\.v([248]))?\.{_ATOMIC_TYPE}"
)
def _atomic(match: re.Match[str]) -> Execute | None:
    kind, space, name = match[1], match[2], match[3]
    count, type_ = int(match[4] or 1), match[5]
    shared = space == "shared"

    def execute(strand: Strand, instruction: Instruction) -> None:
        operands = list(instruction.operands)
        targets = items(operands.pop(0)) if kind == "atom" else ()
        address, source = operands[:2]
        bits = width(type_)
        values = [np.broadcast_to(strand.bits(v, bits), strand.shape) for v in items(source)]
        mask = strand.mask(instruction)
        olds = [np.zeros(strand.shape, UNSIGNED[bits]) for _ in values]
        if len(values) != count:
            raise EmulationError(f"{count} values are combined, got {len(values)}")
        # One thread after the other.
        for place in np.argwhere(chosen_threads(strand, mask)):
            one = np.zeros(strand.shape, dtype=bool)
            at = tuple(place)
            one[at] = True
            before = gather_each(strand, address, one, bits // 8, count, shared)
            after = []
            for old, value, kept in zip(before, values, olds, strict=True):
                kept[at] = old[at]
                after.append(_combine(name, type_, old, value))
            scatter(strand, address, one, after, shared)
        for target, old in zip(targets, olds, strict=False):
            strand.write_number(target, decode(old, type_), type_, mask)

    return execute


def gather_each(
    strand: Strand, address: Operand, mask: Array, size: int, count: int, shared: bool
) -> list[Array]:
    """Read as :func:`gather`, into arrays of the shape of the strand."""
    read = gather(strand, address, mask, size, count, shared)
    return [np.broadcast_to(value, strand.shape) for value in read]


@rules(rf"atom{_ORDER}\.(global|shared)(?:::cta)?{_ORDER}\.cas{_ORDER}\.b(16|32|64)")
def _compare_and_swap(match: re.Match[str]) -> Execute:
    shared, bits = match[1] == "shared", int(match[2])

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, address, expected, new = instruction.operands
        compare, value = (
            np.broadcast_to(strand.bits(operand, bits), strand.shape) for operand in (expected, new)
        )
        mask = strand.mask(instruction)
        olds = np.zeros(strand.shape, UNSIGNED[bits])
        for place in np.argwhere(chosen_threads(strand, mask)):
            at = tuple(place)
            one = np.zeros(strand.shape, dtype=bool)
            one[at] = True
            (old,) = gather_each(strand, address, one, bits // 8, 1, shared)
            olds[at] = old[at]
            scatter(strand, address, one, [np.where(old == compare, value, old)], shared)
        strand.write(target, olds, mask)

    return execute


__all__ = ["Both", "Execute", "chosen_threads", "gather", "items", "rules", "scatter"]
