"""How a batch is dealt out to the programs of a kernel: by groups of features.

A kernel takes its numbers as int32, whatever their size, so that it is compiled once for all
sizes: those from 2**31 on are passed as what int32 reads from their bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Layout(NamedTuple):
    """What :func:`hessdiag.kernels.philox_triton.locate` needs to know of a batch.

    Attributes:
        numbers: The arguments batch, groups_per_sample, multiplier, shift and features.
        num_programs: How many programs take all groups.
        aligned: Whether each sample is a whole number of groups.
        wide: Whether the groups' numbers, those of the last program included, overflow int32.
    """

    numbers: tuple[int, int, int, int, int]
    num_programs: int
    aligned: bool
    wide: bool


@lru_cache(maxsize=1024)
def layout(batch: int, features: int, features_per_group: int, groups_per_program: int) -> Layout:
    """Return the layout of ``batch`` samples of ``features`` features each, both at least 1.

    Example:
        >>> layout(batch=3, features=20, features_per_group=8, groups_per_program=4)
        Layout(numbers=(3, 3, -1431655765, 2, 20), num_programs=3, aligned=False, wide=False)
    """
    groups_per_sample = -(-features // features_per_group)
    num_groups = batch * groups_per_sample
    numbers = (batch, groups_per_sample, *reciprocal(groups_per_sample), features)
    b, g, m, s, f = (as_int32(number) for number in numbers)
    return Layout(
        (b, g, m, s, f),
        -(-num_groups // groups_per_program),
        features % features_per_group == 0,
        num_groups + groups_per_program > 2**31,
    )


def reciprocal(divisor: int) -> tuple[int, int]:
    """Return m and s such that ``n // divisor == (2 * n * m >> 32) >> s`` for all n in [0, 2**31).

    m is 2**(31 + s) / divisor, rounded up, with 2**s the next power of two. What rounding adds,
    less than n / 2**31 * 2**s / divisor / 2**s < 1 / divisor, reaches no next integer (Granlund
    and Montgomery, *Division by invariant integers using multiplication*, 1994).

    Example:
        >>> m, s = reciprocal(7)
        >>> all(n // 7 == (2 * n * m >> 32) >> s for n in (0, 6, 7, 2**31 - 1))
        True
    """
    shift = (divisor - 1).bit_length()
    return -(-(2 ** (31 + shift)) // divisor), shift


def as_int32(number: int) -> int:
    """Return the integer that int32 reads from the low 32 bits of a number.

    Example:
        >>> as_int32(5), as_int32(2**32 - 1)
        (5, -1)
    """
    return (number + 2**31) % 2**32 - 2**31
