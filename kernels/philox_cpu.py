"""The random-number contract on a CPU: in NumPy, and in Python's integers for a few counters.

The numbers are those of :mod:`hessdiag.kernels.philox`, whose docstring is the contract. NumPy
needs about a third of the time of PyTorch's int64 operators. Its calls cost a fixed time, though,
which a round of Philox pays ten times; up to 64 counters are therefore the 64-bit digits of one
Python integer, on which a round is ten operations of less than a tenth of a microsecond.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]

PROBES_PER_SIGN_TILE = 16
FEATURES_PER_SIGN_TILE = 8

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

_KEY_MASK = 0xFFFFFFFFFFFFFFFF
_MOST_IN_AN_INTEGER = 64


def grid_words(
    seed: int,
    num_groups: int,
    first_sample: int,
    batch: int,
    first_step: int,
    num_steps: int,
    stream: int,
) -> Words:
    """Return the words of Philox 4x32-10 for the counters (group, sample, step, stream).

    Args:
        seed: The key, of which the low 64 bits count.
        num_groups: The first counter word goes from 0 to ``num_groups - 1``.
        first_sample: Where the second counter word begins.
        batch: How many values it takes.
        first_step: Where the third counter word begins.
        num_steps: How many values it takes.
        stream: The fourth counter word.

    Returns:
        uint32, little-endian, shape (4, num_steps, batch, num_groups).

    Example:
        The first known answer of the authors' test vectors, for a zero key and counter:

        >>> [f"{word:08x}" for word in grid_words(0, 1, 0, 1, 0, 1, 0).ravel()]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    steps = range(first_step, first_step + num_steps)
    samples = range(first_sample, first_sample + batch)
    few = 0 < num_groups * batch * num_steps <= _MOST_IN_AN_INTEGER
    compute = _words_of_integers if few else _words_of_arrays
    return compute(seed & _KEY_MASK, range(num_groups), samples, steps, stream)


def signs(
    seed: int,
    probe_offset: int,
    num_probes: int,
    sample_offset: int,
    batch: int,
    features: int,
    dtype: torch.dtype,
) -> NDArray[Any]:
    """Return the signs of stream 0, +1 or -1.

    Returns:
        Shape (num_probes, batch, features), contiguous. NumPy has no bfloat16, whose bits come as
        int16: :func:`as_tensor` knows them.

    Example:
        >>> signs(0, 0, 2, 0, 1, 4, torch.float32)
        array([[[ 1., -1.,  1., -1.]],
        <BLANKLINE>
               [[-1., -1., -1.,  1.]]], dtype=float32)
    """
    width = PROBES_PER_SIGN_TILE
    first_tile, last_tile = probe_offset // width, (probe_offset + num_probes - 1) // width
    num_tiles, num_groups = last_tile + 1 - first_tile, -(-features // FEATURES_PER_SIGN_TILE)
    words = grid_words(seed, num_groups, sample_offset, batch, first_tile, num_tiles, 0)
    first = probe_offset - first_tile * width
    if num_tiles == 1:  # of a single tile, only the words that hold the probes
        words = words[first // 4 : (first + num_probes - 1) // 4 + 1]
        first %= 4
    # Byte k % 4 of word k // 4 holds the signs of probe k of the tile for 8 features.
    packed = words.view(np.uint8).reshape(len(words), num_tiles, batch, num_groups, 4)
    packed = packed.transpose(1, 0, 4, 2, 3).reshape(-1, batch, num_groups)
    table, element = _SIGNS_OF_A_BYTE[dtype]
    unpacked = table.take(packed[first : first + num_probes]).view(element)
    return np.ascontiguousarray(unpacked[:, :, :features])


def as_tensor(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Return an array as a tensor that shares its memory, its bits read as ``dtype``.

    Example:
        >>> as_tensor(signs(0, 0, 1, 0, 1, 4, torch.bfloat16), torch.bfloat16)
        tensor([[[ 1., -1.,  1., -1.]]], dtype=torch.bfloat16)
    """
    tensor = torch.from_numpy(values)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _signs_of_a_byte() -> dict[torch.dtype, tuple[NDArray[np.void], np.dtype[Any]]]:
    """Return for each type the 8 signs that each byte stands for, bit 0 first, as one element.

    With the type in which NumPy reads them: it has no bfloat16, the upper half of a float32.
    """
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    values = (2 * bits - 1).astype(np.float32)
    tables: dict[torch.dtype, NDArray[Any]] = {
        torch.float32: values,
        torch.float64: values.astype(np.float64),
        torch.float16: values.astype(np.float16),
        torch.bfloat16: (values.view(np.uint32) >> 16).astype(np.int16),
    }
    return {
        dtype: (table.view(f"V{8 * table.itemsize}").reshape(256), table.dtype)
        for dtype, table in tables.items()
    }


_SIGNS_OF_A_BYTE = _signs_of_a_byte()


def _words_of_integers(
    seed: int, groups: range, samples: range, steps: range, stream: int
) -> Words:
    """Compute :func:`grid_words` with one counter in each 64-bit digit of an integer."""
    shape = (len(steps), len(samples), len(groups))
    size = len(steps) * len(samples) * len(groups)
    ones = _pack([1] * size)
    mask = MASK * ones
    c0 = _pack([group for _ in steps for _ in samples for group in groups])
    c1 = _pack([sample for _ in steps for sample in samples for _ in groups])
    c2 = _pack([step for step in steps for _ in samples for _ in groups])
    c3 = stream * ones
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(ROUNDS):
        # A product of two 32-bit numbers fits its digit; the low halves are masked a round later.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0 * ones) & mask, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1 * ones) & mask, product0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    packed = b"".join(word.to_bytes(8 * size, "little") for word in (c0, c1, c2, c3))
    return np.frombuffer(packed, "<u8").astype("<u4").reshape(4, *shape)


def _pack(values: list[int]) -> int:
    return int.from_bytes(struct.pack(f"<{len(values)}Q", *values), "little")


def _words_of_arrays(seed: int, groups: range, samples: range, steps: range, stream: int) -> Words:
    """Compute :func:`grid_words` in arrays of uint64."""
    c0 = np.arange(len(groups), dtype=np.uint64)
    c1 = np.arange(samples.start, samples.stop, dtype=np.uint64)[:, None]
    c2 = np.arange(steps.start, steps.stop, dtype=np.uint64)[:, None, None]
    c3 = np.array(stream, dtype=np.uint64)
    multiplier0, multiplier1 = (np.array(value, dtype=np.uint64) for value in MULTIPLIERS)
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(ROUNDS):
        # The first rounds are small: what the first two words yield does not yet vary over all.
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0, c1 = _mixed(product1, c1, k0), product1
        c2, c3 = _mixed(product0, c3, k1), product0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    words = np.empty((4, len(steps), len(samples), len(groups)), dtype="<u4")
    for word, value in zip(words, (c0, c1, c2, c3), strict=True):
        np.copyto(word, value, casting="unsafe")  # the low half
    return words


def _mixed(product: NDArray[np.uint64], word: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Return high half of product ^ low half of word ^ key."""
    mixed = product >> _HALF
    if word.ndim > mixed.ndim or word.shape != mixed.shape[mixed.ndim - word.ndim :]:
        mixed = mixed ^ word
    else:
        mixed ^= word
    mixed ^= np.array(key, dtype=np.uint64)
    mixed &= _LOW_HALF
    return mixed


_HALF = np.array(32, dtype=np.uint64)
_LOW_HALF = np.array(MASK, dtype=np.uint64)
