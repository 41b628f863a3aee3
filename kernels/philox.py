"""The random-number contract, version 1.

Every random number is a pure function of (seed, stream, sample, probe or step, feature), so a
result does not depend on chunk sizes, on how a batch is split over calls or processes, or on the
device. The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: *Parallel random numbers: as
easy as 1, 2, 3*, 2011), the one that ``tl.philox`` computes, with::

    key = (low 32 bits of the seed, high 32 bits of the seed).

Rademacher signs, stream 0
    ``counter = (d // 8, sample, probe // 16, 0)`` with d the feature's flat C-order index within
    its sample. The four output words hold 8 features x 16 probes: with
    ``p = (probe % 16) * 8 + d % 8`` the sign is +1 if bit ``p % 32`` of word ``p // 32`` is set,
    else -1.

Standard normals, streams 1 (probes) and 2 (samplers)
    ``counter = (d // 4, sample, probe or step, stream)``. Words (w0, w1) give features 0 and 1
    of the group and (w2, w3) features 2 and 3, by Box-Muller:
    ``radius = sqrt(-2 ln u_a)``, ``angle = 2 pi u_b``, the cosine first, then the sine, with
    ``u = min(float32(w) * 2**-32 + 2**-33, 1 - 2**-24)``, which lies in (0, 1).

Random permutations of the features, stream 3
    ``counter = (d // 4, sample, block, 3)``, and word ``d % 4`` is the key of feature d; sorting
    the features by (key, d) gives the permutation.

Designs that all samples share, stream 4
    ``counter = (n // 4, purpose, block, 4)``, and word ``n % 4`` is number n for that purpose.

This module holds the PyTorch reference of these maps, and the checks of seeds and offsets. On a CPU
the reference takes the same words from :mod:`hessdiag.kernels.philox_cpu`, in a fraction of the
time; on a GPU the kernels make them by :mod:`hessdiag.kernels.philox_triton`.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hessdiag.kernels import philox_cpu
from hessdiag.kernels._checks import is_eager_cpu
from hessdiag.kernels.philox_cpu import KEY_INCREMENTS, MASK, MULTIPLIERS, ROUNDS

Seed: TypeAlias = int | Tensor | torch.Generator

STREAM_RADEMACHER = 0
STREAM_PROBES = 1
STREAM_SAMPLERS = 2
STREAM_PERMUTATIONS = 3
STREAM_DESIGNS = 4

FEATURES_PER_SIGN_TILE = philox_cpu.FEATURES_PER_SIGN_TILE
PROBES_PER_SIGN_TILE = philox_cpu.PROBES_PER_SIGN_TILE
FEATURES_PER_NORMAL_GROUP = 4


def seed_tensor(seed: Seed, device: torch.device | str) -> Tensor:
    """Return the seed as a 0-dimensional int64 tensor on ``device``.

    Args:
        seed: An integer in [0, 2**64), of Python or NumPy; an int64 tensor with one element (a
            tensor already on ``device`` is used as it is, so that a captured CUDA graph can be
            replayed with a new seed written into it); or a torch.Generator, from which a seed is
            drawn, so that it moves on.
        device: Where the random numbers are needed.

    Raises:
        TypeError: If ``seed`` is none of these.
        ValueError: If it lies outside [0, 2**64), or the tensor has more than one element.

    Example:
        >>> import torch
        >>> from hessdiag.kernels import seed_tensor
        >>> seed_tensor(7, "cpu")
        tensor(7)
        >>> one, other = (torch.Generator().manual_seed(1) for _ in range(2))
        >>> bool(seed_tensor(one, "cpu") == seed_tensor(other, "cpu"))
        True
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a {seed.dtype} tensor")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        if seed.is_meta and torch.device(device).type != "meta":
            raise ValueError("seed must hold a number, got a tensor on the meta device")
        if seed.dim() == 0 and (seed.device == device or device == "cpu" == seed.device.type):
            return seed
        return seed.reshape(()).to(device)
    if isinstance(seed, torch.Generator):
        return torch.randint(2**63 - 1, (), generator=seed, device=seed.device).to(device)
    number = _checked_seed(seed)
    return _number(number - 2**64 if number >= 2**63 else number, device)


def seed_number(seed: Seed, device: torch.device | str, *others: Tensor) -> int | None:
    """Return the seed as an integer if an op may compute in NumPy, or None if it may not.

    It may where random numbers are needed on a CPU, and neither the seed nor the other tensors
    that the op reads are seen by anyone else (:func:`hessdiag.kernels._checks.is_eager_cpu`). This
    spares a small call the way through the dispatcher, which takes longer than the numbers.

    Args:
        seed: As for :func:`seed_tensor`.
        device: Where the random numbers are needed.
        others: What else the op reads.

    Raises:
        TypeError: As :func:`seed_tensor`.
        ValueError: As :func:`seed_tensor`.

    Example:
        >>> seed_number(7, "cpu"), seed_number(torch.tensor(7), "cpu"), seed_number(7, "meta")
        (7, 7, None)
    """
    if device not in _CPU or not is_eager_cpu(*others):
        return None
    if isinstance(seed, torch.Generator):
        seed = seed_tensor(seed, device)
    if isinstance(seed, Tensor):
        return int(seed_tensor(seed, device)) if is_eager_cpu(seed) else None
    return _checked_seed(seed)


_CPU = ("cpu", torch.device("cpu"))


def _checked_seed(seed: object) -> int:
    number = integer_of(seed)
    if number is None:
        raise TypeError(
            f"seed must be an int, an int64 tensor or a torch.Generator, got {type(seed).__name__}"
        )
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {number}")
    return number


def integer_of(value: object) -> int | None:
    """Return an integer of Python or NumPy as an int; None for what is none."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a boolean of NumPy
        return None


def _number(value: int, device: torch.device | str) -> Tensor:
    """Return a number on a device; ``torch.tensor`` would copy it there, and wait for that."""
    return torch.full((), value, dtype=torch.int64, device=device)


def check_counter(name: str, first: int, count: int = 1) -> int:
    """Return ``first`` as an int, if the counter values ``first .. first + count - 1`` fit 32 bits.

    Raises:
        TypeError: If ``first`` is not an int.
        ValueError: If a value lies outside [0, 2**32).

    Example:
        >>> check_counter("sample_offset", 2**32 - 1, 2)
        Traceback (most recent call last):
        ...
        ValueError: sample_offset + 2 must be at most 2**32, got sample_offset = 4294967295
    """
    number = integer_of(first)
    if number is None:
        raise TypeError(f"{name} must be an int, got {type(first).__name__}")
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    if number + count > 2**32:
        raise ValueError(f"{name} + {count} must be at most 2**32, got {name} = {number}")
    return number


class SignTiles(NamedTuple):
    """The tiles of 16 probes that a run of probes touches.

    Attributes:
        first: Number of the first tile, below 2**28.
        first_probe: Which of its probes is the first of the run.
        num_tiles: How many tiles.
        whole: Whether the run is all of their probes.
    """

    first: int
    first_probe: int
    num_tiles: int
    whole: bool

    @classmethod
    def of(cls, probe_offset: int, num_probes: int) -> SignTiles:
        """Return the tiles of probes probe_offset .. probe_offset + num_probes - 1.

        Example:
            >>> SignTiles.of(probe_offset=30, num_probes=5)
            SignTiles(first=1, first_probe=14, num_tiles=2, whole=False)
        """
        first, first_probe = divmod(probe_offset, PROBES_PER_SIGN_TILE)
        num_tiles = -(-(first_probe + num_probes) // PROBES_PER_SIGN_TILE)
        whole = first_probe == 0 and num_probes % PROBES_PER_SIGN_TILE == 0
        return cls(first, first_probe, num_tiles, whole)


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of Philox 4x32-10, as int64 tensors with values in [0, 2**32).

    Args:
        seed: 0-dimensional int64 tensor, the key.
        c0: First counter word, an int64 tensor with values in [0, 2**32).
        c1: Second counter word; the four broadcast against one another.
        c2: Third counter word.
        c3: Fourth counter word.

    Example:
        The first known answer of the authors' test vectors, for a zero key and counter:

        >>> zero = torch.tensor(0)
        >>> [f"{word.item():08x}" for word in philox(zero, zero, zero, zero, zero)]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which keeps both halves of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK) ^ c1 ^ k0,
            product1 & MASK,
            ((product0 >> 32) & MASK) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def signs(
    seed: Tensor,
    probe_offset: int,
    num_probes: int,
    sample_offset: int,
    batch: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the signs of stream 0, +1 or -1.

    Returns:
        Shape (num_probes, batch, features), contiguous, on the device of ``seed``.

    Example:
        >>> signs(torch.tensor(0), 0, 2, 0, 1, 4, torch.float32)
        tensor([[[ 1., -1.,  1., -1.]],
        <BLANKLINE>
                [[-1., -1., -1.,  1.]]])
    """
    if is_eager_cpu(seed):
        made = philox_cpu.signs(
            int(seed), probe_offset, num_probes, sample_offset, batch, features, dtype
        )
        return philox_cpu.as_tensor(made, dtype)
    device = seed.device
    first_tile = probe_offset // PROBES_PER_SIGN_TILE
    last_tile = (probe_offset + num_probes - 1) // PROBES_PER_SIGN_TILE
    tiles = torch.arange(first_tile, last_tile + 1, device=device)[:, None, None]
    samples = torch.arange(sample_offset, sample_offset + batch, device=device)[:, None]
    groups = torch.arange(-(-features // FEATURES_PER_SIGN_TILE), device=device)
    stream = _number(STREAM_RADEMACHER, device)
    words = torch.stack(philox(seed, groups, samples, tiles, stream), dim=1)
    # A word is 4 probes x 8 features; only the bytes of the probes asked for are unpacked.
    probes = torch.arange(probe_offset, probe_offset + num_probes, device=device)
    tile_width = PROBES_PER_SIGN_TILE
    chosen = words[probes // tile_width - first_tile, probes % tile_width // 4]
    shifts = 8 * (probes % 4)[:, None] + torch.arange(FEATURES_PER_SIGN_TILE, device=device)
    bits = (chosen[..., None] >> shifts[:, None, None, :]) & 1
    return (2 * bits - 1).to(dtype).flatten(2)[:, :, :features].contiguous()


def uniforms(words: Tensor) -> Tensor:
    """Map 32-bit words to float32 in (0, 1): min(float32(w) * 2**-32 + 2**-33, 1 - 2**-24).

    Example:
        >>> (uniforms(torch.tensor([0, 2**32 - 1])) * 2.0**33).tolist()
        [1.0, 8589934080.0]
    """
    scaled = words.to(torch.float32) * 2.0**-32
    return scaled.add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)


def standard_normals(
    seed: Tensor,
    stream: int,
    first_step: int,
    num_steps: int,
    sample_offset: int,
    batch: int,
    features: int,
) -> Tensor:
    """Return the standard normals of stream 1 or 2 in float32.

    Returns:
        Shape (num_steps, batch, features).

    Example:
        >>> standard_normals(torch.tensor(0), 2, 0, 1, 0, 1, 3).shape
        torch.Size([1, 1, 3])
    """
    groups = -(-features // FEATURES_PER_NORMAL_GROUP)
    words = _grid_words(seed, groups, sample_offset, batch, first_step, num_steps, stream)
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = uniforms(radius_word).log_().mul_(-2.0).sqrt_()
        angle = uniforms(angle_word).mul_(2.0 * math.pi)
        normals += [radius * torch.cos(angle), angle.sin_().mul_(radius)]
    return torch.stack(normals, dim=-1).flatten(2)[:, :, :features]


def permutation_ranks(
    seed: Tensor, first_block: int, num_blocks: int, sample_offset: int, batch: int, features: int
) -> Tensor:
    """Return the rank of each feature in the random permutations of stream 3.

    Returns:
        int64, shape (num_blocks, batch, features): each row is a permutation of 0 .. features - 1.

    Example:
        >>> permutation_ranks(torch.tensor(0), 0, 1, 0, 1, 5)
        tensor([[[1, 4, 0, 3, 2]]])
    """
    groups = -(-features // 4)
    words = _grid_words(
        seed, groups, sample_offset, batch, first_block, num_blocks, STREAM_PERMUTATIONS
    )
    keys = torch.stack(words, dim=-1).flatten(2)[:, :, :features]
    order = keys.argsort(dim=-1, stable=True)
    places = torch.arange(features, device=seed.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _grid_words(
    seed: Tensor,
    num_groups: int,
    first_sample: int,
    batch: int,
    first_step: int,
    num_steps: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the words of the counters (group, sample, step, stream), groups counted from 0.

    Returns:
        Four int64 tensors of shape (num_steps, batch, num_groups), on the device of ``seed``.
    """
    if is_eager_cpu(seed):
        words = philox_cpu.grid_words(
            int(seed), num_groups, first_sample, batch, first_step, num_steps, stream
        )
        w0, w1, w2, w3 = (torch.from_numpy(word) for word in words.astype(np.int64))
        return w0, w1, w2, w3
    device = seed.device
    steps = torch.arange(first_step, first_step + num_steps, device=device)[:, None, None]
    samples = torch.arange(first_sample, first_sample + batch, device=device)[:, None]
    groups = torch.arange(num_groups, device=device)
    return philox(seed, groups, samples, steps, _number(stream, device))
