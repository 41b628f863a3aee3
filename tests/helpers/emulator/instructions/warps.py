"""Instructions in which threads of a warp, or of a block, work together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from emulator.instructions.accesses import Execute, chosen_threads, items
from emulator.instructions.rules import Rules
from emulator.parsing import Both, EmulationError, Instruction
from emulator.values import SIGNED, Array, encode

if TYPE_CHECKING:
    from emulator.machine import Strand

rules: Rules[Execute] = Rules()

WARP = 32


@rules(
    r"bar\.sync|barrier\.sync(?:\.aligned)?|bar\.warp\.sync|membar\.(?:cta|gl|sys)"
    r"|fence(?:\.\w+|::\w+)*|griddepcontrol\.(?:wait|launch_dependents)"
)
def _barrier(match: re.Match[str]) -> Execute:
    whole = match[0].startswith("bar") and "warp" not in match[0]

    def execute(strand: Strand, instruction: Instruction) -> None:
        if whole and strand.waiting:
            raise EmulationError("a barrier is reached by a part of the threads")

    return execute


@rules(r"trap")
def _trap(_: re.Match[str]) -> Execute:
    def execute(strand: Strand, instruction: Instruction) -> None:
        if chosen_threads(strand, strand.mask(instruction)).any():
            raise EmulationError("the program stops by trap")

    return execute


def by_warp(array: Array, strand: Strand) -> Array:
    """Return an array of shape (blocks, warps, 32)."""
    blocks, threads = strand.shape
    if threads % WARP:
        raise EmulationError(f"a block must have whole warps, got {threads} threads")
    return np.broadcast_to(array, strand.shape).reshape(blocks, threads // WARP, WARP)


def whole_warps(strand: Strand, instruction: Instruction) -> Array:
    """Return which warps execute, shape (blocks, warps); raise where only a part of one does."""
    chosen = by_warp(chosen_threads(strand, strand.mask(instruction)), strand)
    some = chosen.any(axis=-1)
    if (some != chosen.all(axis=-1)).any():
        raise EmulationError("only a part of a warp executes it")
    return some


def _members(strand: Strand, operand: object) -> Array:
    """Return which lanes a mask names, shape (blocks or 1, warps, 32)."""
    masks = by_warp(strand.bits(operand, 32), strand)
    lanes = np.arange(WARP, dtype=np.uint32)
    return (masks >> lanes) & np.uint32(1) == 1


@rules(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shuffle(match: re.Match[str]) -> Execute:
    mode = match[1]

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source, offset, clamp, members = instruction.operands
        mask = strand.mask(instruction)
        chosen = by_warp(chosen_threads(strand, mask), strand)
        if (chosen & ~_members(strand, members)).any():
            raise EmulationError("a thread executes it that the mask of members leaves out")
        value = by_warp(strand.bits(source, 32), strand)
        b = by_warp(strand.bits(offset, 32), strand).astype(np.int64) & 31
        c = by_warp(strand.bits(clamp, 32), strand).astype(np.int64)
        lane = np.arange(WARP)
        limit, segment = c & 31, (c >> 8) & 31
        last = (lane & segment) | (limit & ~segment)
        if mode == "up":
            other = lane - b
            inside = other >= last
        else:
            first = lane & segment
            other = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
            inside = other <= last
        other = np.where(inside, other, lane)
        # What a thread gives that does not execute it is undefined.
        if not np.take_along_axis(chosen, other, axis=-1)[chosen].all():
            raise EmulationError("a thread reads from one that does not execute it")
        moved = np.take_along_axis(value, other, axis=-1).reshape(strand.shape)
        if isinstance(target, Both):
            strand.write(target.second, inside.reshape(strand.shape), mask)
            target = target.first
        strand.write(target, moved, mask)

    return execute


@rules(r"vote\.sync\.(all|any|uni)\.pred|vote\.sync\.(ballot)\.b32")
def _vote(match: re.Match[str]) -> Execute:
    mode = match[1] or match[2]

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, predicate, _ = instruction.operands
        mask = strand.mask(instruction)
        chosen = by_warp(chosen_threads(strand, mask), strand)
        values = by_warp(strand.bits(predicate, 1), strand)
        yes, no = (values & chosen).any(axis=-1), (~values & chosen).any(axis=-1)
        if mode == "ballot":
            bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
            result = np.where(values & chosen, bit, np.uint32(0)).sum(axis=-1, dtype=np.uint32)
        else:
            result = {"all": ~no, "any": yes, "uni": ~(yes & no)}[mode]
        spread = np.repeat(result, WARP, axis=-1)
        strand.write(target, spread, mask)

    return execute


@rules(r"redux\.sync\.(add|min|max|and|or|xor)\.([bsu])32")
def _reduce(match: re.Match[str]) -> Execute:
    name, kind = match[1], match[2]
    reduce = {
        "add": np.add.reduce,
        "min": np.minimum.reduce,
        "max": np.maximum.reduce,
        "and": np.bitwise_and.reduce,
        "or": np.bitwise_or.reduce,
        "xor": np.bitwise_xor.reduce,
    }[name]

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, source, _ = instruction.operands
        whole_warps(strand, instruction)
        value = by_warp(strand.bits(source, 32), strand)
        value = value.view(SIGNED[32]) if kind == "s" else value
        result = reduce(value, axis=-1).astype(value.dtype)
        spread = np.repeat(encode(result, "b32"), WARP, axis=-1)
        strand.write(target, spread, strand.mask(instruction))

    return execute


@rules(r"elect\.sync")
def _elect(_: re.Match[str]) -> Execute:
    def execute(strand: Strand, instruction: Instruction) -> None:
        target, _members = instruction.operands
        whole_warps(strand, instruction)
        if not isinstance(target, Both):
            raise EmulationError("it has two results")
        mask = strand.mask(instruction)
        lanes = np.arange(strand.program.threads)[None] % WARP
        strand.write(target.first, np.zeros((1, 1), np.uint32), mask)
        strand.write(target.second, lanes == 0, mask)

    return execute


def _rows(strand: Strand, address: object, count: int) -> Array:
    """Return the addresses of the rows of ``count`` matrices, shape (blocks, warps, count, 8)."""
    lanes = by_warp(strand.address(address, 32).astype(np.int64), strand)
    return lanes[..., : 8 * count].reshape(*lanes.shape[:2], count, 8)


def _place(rows: Array, number: int, transposed: bool) -> tuple[Array, Array]:
    """Return for each lane the addresses of its two elements of a matrix of 8 x 8."""
    lane = np.arange(WARP)
    quotient, pair = lane // 4, 2 * (lane % 4)
    matrix = rows[:, :, number]
    if transposed:
        return matrix[..., pair] + 2 * quotient, matrix[..., pair + 1] + 2 * quotient
    return matrix[..., quotient] + 2 * pair, matrix[..., quotient] + 2 * (pair + 1)


@rules(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _matrix(match: re.Match[str]) -> Execute:
    load, count, transposed = match[1] == "ld", int(match[2]), bool(match[3])

    def execute(strand: Strand, instruction: Instruction) -> None:
        data, address = instruction.operands if load else instruction.operands[::-1]
        registers = items(data)
        if len(registers) != count:
            raise EmulationError(f"{count} matrices, got {len(registers)} registers")
        chosen = whole_warps(strand, instruction)
        rows = _rows(strand, address, count)
        if (rows[chosen] % 16).any():
            raise EmulationError("a row of a matrix is not aligned to 16 bytes")
        blocks = np.broadcast_to(strand.rows[:, None, None], (*rows.shape[:2], WARP))[chosen]
        mask = strand.mask(instruction)
        for number, register in enumerate(registers):
            places = [place[chosen] for place in _place(rows, number, transposed)]
            if load:
                low, high = (
                    strand.shared.gather(blocks, place, 2, 1)[0].astype(np.uint32)
                    for place in places
                )
                full = np.zeros((*rows.shape[:2], WARP), np.uint32)
                full[chosen] = low | (high << np.uint32(16))
                strand.write(register, full.reshape(strand.shape), mask)
            else:
                value = by_warp(strand.bits(register, 32), strand)[chosen]
                for place, part in zip(places, (value, value >> np.uint32(16)), strict=True):
                    strand.shared.scatter(blocks, place, 2, [part.astype(np.uint16)])

    return execute
