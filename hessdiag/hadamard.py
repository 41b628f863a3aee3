"""Hadamard matrices: signs with orthogonal rows, for probes that share one sign vector."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix H: entries +1 and -1, H H^T = order * I, first column +1.

    Paley's first construction, of order p + 1 for a prime p = 3 modulo 4, doubled by Sylvester's.

    Args:
        order: 1, 2, or a number that :func:`next_order` returns.

    Returns:
        int8, shape (order, order).

    Raises:
        ValueError: If the construction gives no matrix of that order.

    Example:
        >>> H = hadamard(12).int()
        >>> torch.equal(H @ H.T, 12 * torch.eye(12, dtype=torch.int32))
        True
    """
    doublings, prime = _construction(order)
    H = torch.ones(1, 1, dtype=torch.int8) if prime is None else _paley(prime)
    sylvester = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    for _ in range(doublings):
        H = torch.kron(sylvester, H)
    return H


def next_order(least: int) -> int:
    """Return the smallest order of at least ``least`` that :func:`hadamard` can make.

    Example:
        >>> [next_order(n) for n in (3, 12, 27, 48, 75, 192)]
        [4, 12, 32, 48, 80, 192]
    """
    order = max(1, least)
    while True:
        try:
            _construction(order)
        except ValueError:
            order += 1
        else:
            return order


@lru_cache(maxsize=256)
def _construction(order: int) -> tuple[int, int | None]:
    """Return how often to double, and the prime of Paley's matrix to start from, if any."""
    doublings, odd = 0, order
    while odd > 0:
        if odd == 1:
            return doublings, None
        if odd % 4 == 0 and _is_prime(odd - 1):
            return doublings, odd - 1
        if odd % 2:
            break
        doublings, odd = doublings + 1, odd // 2
    raise ValueError(f"order must be 1, 2 or one that next_order returns, got {order}")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _paley(p: int) -> Tensor:
    """Paley's matrix of order p + 1: [[1, 1], [1, -Q - I]] with Q the quadratic characters."""
    entries = torch.ones(p, dtype=torch.int8)
    entries[[k * k % p for k in range(p)]] = -1
    index = torch.arange(p)
    H = torch.ones(p + 1, p + 1, dtype=torch.int8)
    H[1:, 1:] = entries[(index[:, None] - index) % p]
    return H
