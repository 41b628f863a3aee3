"""Memory that may be accessed where something lives, and nowhere else."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from emulator.parsing import EmulationError
from emulator.values import UNSIGNED, Array

# Linux reserves no memory for such a mapping, of which only what is touched comes to exist.
_NO_RESERVE = 0x4000
_GRAIN = 16


@dataclass(frozen=True)
class _Block:
    """The bytes of one allocation, from the multiple of 16 at or before its first one."""

    start: int
    end: int
    bytes: Array

    def elements(self, size: int) -> Array:
        """Return all of its memory as integers of ``size`` bytes."""
        whole = len(self.bytes) // size * size
        return self.bytes[:whole].view(UNSIGNED[8 * size])


class GlobalMemory:
    """Live allocations of this process, by their addresses.

    Args:
        extents: First address and number of bytes of each. Those that overlap become one.
    """

    def __init__(self, extents: Iterable[tuple[int, int]]) -> None:
        self._blocks: list[_Block] = []
        for start, end in _merged(extents):
            base = start // _GRAIN * _GRAIN
            # Up to a multiple of 16 again, so that each whole element can be viewed; what is
            # outside of the allocation is never read, since addresses are checked before.
            size = -(-(end - base) // _GRAIN) * _GRAIN
            buffer = (ctypes.c_uint8 * size).from_address(base)
            self._blocks.append(_Block(start, end, np.frombuffer(buffer, np.uint8)))
        self._starts = np.array([block.start for block in self._blocks], dtype=np.uint64)

    def gather(self, addresses: Array, size: int, count: int) -> list[Array]:
        """Return ``count`` integers of ``size`` bytes at each address (1-d, uint64)."""
        result = [np.empty(addresses.shape, UNSIGNED[8 * size]) for _ in range(count)]
        for block, chosen, first in self._located(addresses, size, count):
            elements = block.elements(size)
            for i in range(count):
                result[i][chosen] = elements[first + i]
        return result

    def scatter(self, addresses: Array, size: int, values: list[Array]) -> None:
        """Write integers of ``size`` bytes, one after the other, at each address."""
        for block, chosen, first in self._located(addresses, size, len(values)):
            elements = block.elements(size)
            for i, value in enumerate(values):
                elements[first + i] = value[chosen]

    def _located(
        self, addresses: Array, size: int, count: int
    ) -> Iterable[tuple[_Block, Array | slice, Array]]:
        """Yield the blocks that are accessed, by which threads, and the numbers of elements."""
        if addresses.size == 0:
            return
        check_alignment(addresses, size * count)
        numbers = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        found = np.unique(numbers)
        for number in found:
            chosen = slice(None) if len(found) == 1 else numbers == number
            inside = addresses[chosen]
            if number < 0:
                raise self._out_of_bounds(inside, size * count)
            block = self._blocks[number]
            outside = inside > np.uint64(block.end - size * count)
            if block.end - block.start < size * count:
                outside[:] = True
            if outside.any():
                raise self._out_of_bounds(inside[outside], size * count)
            base = block.start // _GRAIN * _GRAIN
            yield block, chosen, ((inside - np.uint64(base)) // np.uint64(size)).astype(np.int64)

    def _out_of_bounds(self, addresses: Array, size: int) -> EmulationError:
        address = int(addresses[0])
        distances = [
            (max(block.start - address, address + size - block.end), block)
            for block in self._blocks
        ]
        near = "nothing is allocated"
        if distances:
            _, block = min(distances, key=lambda pair: pair[0])
            near = (
                f"at byte {address - block.start} of the nearest allocation, which has "
                f"{block.end - block.start} bytes"
            )
        return EmulationError(
            f"{size}-byte access out of bounds at {address:#x} ({len(addresses)} threads), {near}"
        )


def check_alignment(addresses: Array, size: int) -> None:
    """Raise unless all addresses are multiples of the size of an access."""
    wrong = addresses % addresses.dtype.type(size) != 0
    if wrong.any():
        raise EmulationError(
            f"{size}-byte access at {int(addresses[wrong][0]):#x}, which is not aligned "
            f"({np.count_nonzero(wrong)} threads)"
        )


class SharedMemory:
    """The shared memory of every block (CTA), filled with a pattern that no one expects."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        padded = -(-size // _GRAIN) * _GRAIN
        self._bytes = np.full((blocks, padded), 0xFF, dtype=np.uint8)

    def gather(self, blocks: Array, addresses: Array, size: int, count: int) -> list[Array]:
        """Return ``count`` integers of ``size`` bytes at each address of a block."""
        self._check(addresses, size * count)
        elements = self._bytes.view(UNSIGNED[8 * size])
        first = addresses // size
        return [elements[blocks, first + i] for i in range(count)]

    def scatter(self, blocks: Array, addresses: Array, size: int, values: list[Array]) -> None:
        """Write integers of ``size`` bytes, one after the other, at each address of a block."""
        self._check(addresses, size * len(values))
        elements = self._bytes.view(UNSIGNED[8 * size])
        for i, value in enumerate(values):
            elements[blocks, addresses // size + i] = value

    def _check(self, addresses: Array, size: int) -> None:
        check_alignment(addresses, size)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            raise EmulationError(
                f"{size}-byte access out of bounds at byte {int(addresses[outside][0])} of "
                f"{self.size} bytes of shared memory"
            )


def _merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return starts and ends in order, with those that overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted(extents):
        if size == 0:
            continue
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], start + size))
        else:
            merged.append((start, start + size))
    return merged


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address and the number of bytes that the elements of a tensor span."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (reach + 1) * tensor.element_size()


def extent_of_array(array: Array) -> tuple[int, int]:
    """Return the first address and the number of bytes of a contiguous array."""
    return array.ctypes.data, array.nbytes


def sparse_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of any size, of which only the pages that are touched take memory."""
    count = int(np.prod(shape, dtype=object))
    size = max(count * dtype.itemsize, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype, count=count).reshape(
        shape
    )
