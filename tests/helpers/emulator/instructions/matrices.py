"""Products of matrices by the tensor cores: ``mma.sync``, and ``wgmma`` of sm_90.

The products are exact in float64, and are added up there in the order of k, the accumulator last;
the sum is rounded once. The hardware adds them in an order and a precision of its own.
``wgmma`` is done at once, so that waiting for it too late, or not at all, goes unnoticed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from emulator.instructions.accesses import Execute, items
from emulator.instructions.rules import Rules
from emulator.instructions.warps import WARP, by_warp, whole_warps
from emulator.parsing import EmulationError, Immediate, Instruction, Operand, Vector
from emulator.values import Array, decode, encode

if TYPE_CHECKING:
    from emulator.machine import Strand

rules: Rules[Execute] = Rules()

_GROUP = 4 * WARP  # threads that execute a wgmma together
_SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # bits of an address that are changed, by mode


def numbers(bits: Array, type_: str) -> Array:
    """Return elements of matrices as float64; of tf32 the last 13 bits are not read."""
    if type_ == "tf32":
        bits, type_ = bits & np.uint32(0xFFFFE000), "f32"
    return decode(bits, type_).astype(np.float64)


def multiply(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c, shapes (..., m, k), (..., k, n) and (..., m, n), in float64."""
    total = np.zeros(np.broadcast_shapes(a[..., :1].shape, b[..., :1, :].shape))
    for k in range(a.shape[-1]):
        total = total + a[..., k, None] * b[..., k, None, :]
    return total + c


def elements(registers: list[Array], type_: str) -> Array:
    """Return what registers of 32 bits hold, shape (..., lanes, elements)."""
    if type_ in ("f32", "tf32"):
        parts = [numbers(register, type_) for register in registers]
    else:
        parts = [
            numbers((register >> np.uint32(shift)).astype(np.uint16), type_)
            for register in registers
            for shift in (0, 16)
        ]
    return np.stack(parts, axis=-1)


def places(rows: int, columns: int, type_: str, transposed: bool = False) -> tuple[Array, Array]:
    """Return the row and the column of each element of each lane, shape (32, elements).

    A register holds two 16-bit elements of a row, or one of 32 bits of every fourth column. The
    registers go over the rows in steps of 8, then over the columns. Right factors are transposed.
    """
    per_register = 1 if type_ == "tf32" else 2
    lane = np.arange(WARP)
    row, column = [], []
    for j in range(0, columns, 4 * per_register):
        for i in range(0, rows, 8):
            for e in range(per_register):
                row.append(i + lane // 4)
                column.append(j + per_register * (lane % 4) + e)
    pair = np.stack(row, axis=-1), np.stack(column, axis=-1)
    return pair[::-1] if transposed else pair


def matrix(fragment: Array, place: tuple[Array, Array], shape: tuple[int, int]) -> Array:
    """Return the matrices that lanes hold together, from (..., 32, elements) to (..., m, n)."""
    whole = np.zeros((*fragment.shape[:-2], *shape))
    whole[(..., *place)] = fragment
    return whole


def _registers(strand: Strand, operand: Operand, count: int) -> list[Array]:
    found = items(operand)
    if len(found) != count:
        raise EmulationError(f"a fragment must have {count} registers, got {len(found)}")
    return [by_warp(strand.bits(register, 32), strand) for register in found]


@rules(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)\.f32")
def _warp_product(match: re.Match[str]) -> Execute | None:
    k, type_ = int(match[1]), match[2]
    if match[3] != type_ or (type_ == "tf32" and k != 8):
        return None
    per_register = 1 if type_ == "tf32" else 2
    place_a, place_b = places(16, k, type_), places(8, k, type_, transposed=True)
    place_c = places(16, 8, "f16")

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, *sources = instruction.operands
        whole_warps(strand, instruction)
        a, b = (
            elements(_registers(strand, operand, size * k // (WARP * per_register)), type_)
            for operand, size in zip(sources[:2], (16, 8), strict=True)
        )
        c = elements(_registers(strand, sources[2], 4), "f32")
        made = multiply(
            matrix(a, place_a, (16, k)), matrix(b, place_b, (k, 8)), matrix(c, place_c, (16, 8))
        )
        _write(strand, instruction, items(target), made[(..., *place_c)])

    return execute


def _write(
    strand: Strand, instruction: Instruction, registers: tuple[Operand, ...], values: Array
) -> None:
    """Write accumulators, shape (blocks, warps, 32, registers)."""
    mask = strand.mask(instruction)
    bits = encode(values, "f32")
    for i, register in enumerate(registers):
        strand.write(register, bits[..., i].reshape(strand.shape), mask)


def _flag(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise EmulationError("a sign or a transposition must be a constant")
    return int(operand.number)


def addresses_of(descriptor: Array, rows: int, columns: int, size: int, transposed: bool) -> Array:
    """Return where the elements of a matrix lie in shared memory, by its descriptor.

    The matrix is made of rows of 16 bytes, eight of which lie one after the other, with a distance
    of as many rows as the swizzle has chunks of 16 bytes. Two strides lead from there.

    Args:
        descriptor: uint64, any shape.
        rows: Of the left factor; columns of the right one, which lies as its transpose.
        columns: k.
        size: Bytes of an element.
        transposed: Whether rows, and not k, run fastest.

    Returns:
        int64, shape (*descriptor.shape, rows, columns).
    """
    if np.any((descriptor >> np.uint64(49)) & np.uint64(7)):
        raise EmulationError("a base offset in a descriptor of a matrix is not emulated")

    def field(first: int) -> Array:
        part = (descriptor >> np.uint64(first)) & np.uint64(0x3FFF)
        return (part.astype(np.int64) * 16)[..., None, None]

    start, leading, stride = field(0), field(16), field(32)
    modes = np.unique(descriptor >> np.uint64(62))
    if len(modes) != 1:
        raise EmulationError("blocks swizzle a matrix in different ways")
    bits = _SWIZZLES[int(modes[0])]
    chunk = 16 // size
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if transposed:
        width = chunk << bits
        if bits == 0:
            leading, stride = stride, leading
        place = (
            row % width * size
            + row // width * leading
            + column % 8 * (16 << bits)
            + column // 8 * stride
        )
    else:
        along = leading if bits == 0 else 16
        place = (
            column % chunk * size
            + column // chunk * along
            + row % 8 * (16 << bits)
            + row // 8 * stride
        )
    linear = start + place
    return linear ^ (((linear >> 7) & ((1 << bits) - 1)) << 4)


def _shared_matrix(
    strand: Strand, operand: Operand, rows: int, columns: int, type_: str, transposed: bool
) -> Array:
    """Return matrices in shared memory, shape (blocks, groups, rows, columns)."""
    blocks, threads = strand.shape
    size = 4 if type_ == "tf32" else 2
    descriptors = np.broadcast_to(strand.bits(operand, 64), strand.shape)
    descriptors = descriptors.reshape(blocks, threads // _GROUP, _GROUP)
    if (descriptors != descriptors[..., :1]).any():
        raise EmulationError("the threads of a group give different descriptors of a matrix")
    addresses = addresses_of(descriptors[..., 0], rows, columns, size, transposed)
    places_ = np.broadcast_to(strand.rows[:, None, None, None], addresses.shape)
    (bits,) = strand.shared.gather(places_, addresses, size, 1)
    return numbers(bits, type_)


@rules(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(f16|bf16|tf32)\.(f16|bf16|tf32)")
def _group_product(match: re.Match[str]) -> Execute | None:
    n, k, type_ = int(match[1]), int(match[2]), match[3]
    if match[4] != type_ or k != (8 if type_ == "tf32" else 16) or n % 8 or not 8 <= n <= 256:
        return None
    place_a, place_c = places(16, k, type_), places(16, n, "f16")

    def execute(strand: Strand, instruction: Instruction) -> None:
        target, left, right, keep, *flags = instruction.operands
        blocks, threads = strand.shape
        if threads % _GROUP or not whole_warps(strand, instruction).all():
            raise EmulationError("whole groups of 128 threads must execute it")
        signs, transposed = [_flag(flag) for flag in flags[:2]], [_flag(f) for f in flags[2:]]
        if transposed and type_ == "tf32":
            raise EmulationError("matrices of tf32 cannot be transposed")
        groups = (blocks, threads // _GROUP)
        if isinstance(left, Vector):
            a = matrix(elements(_registers(strand, left, 4), type_), place_a, (16, k))
            a = a.reshape(*groups, 64, k)
        else:
            first = bool(transposed[0]) if transposed else False
            a = _shared_matrix(strand, left, 64, k, type_, first)
        last = bool(transposed[-1]) if transposed else False
        b = _shared_matrix(strand, right, n, k, type_, last)
        registers = items(target)
        c = np.zeros((*groups, 64, n))
        kept = np.broadcast_to(strand.bits(keep, 1), strand.shape)
        if kept.any():
            held = elements(_registers(strand, target, n // 2), "f32")
            c = matrix(held, place_c, (16, n)).reshape(c.shape)
            c = np.where(kept.reshape(*groups, _GROUP)[..., :1, None], c, 0.0)
        made = multiply(signs[0] * a, signs[1] * np.swapaxes(b, -1, -2), c)
        by_warps = made.reshape(blocks, threads // WARP, 16, n)
        _write(strand, instruction, registers, by_warps[(..., *place_c)])

    return execute


@rules(r"wgmma\.(?:fence|commit_group|wait_group)\.sync\.aligned")
def _group_order(_: re.Match[str]) -> Execute:
    return lambda strand, instruction: None
