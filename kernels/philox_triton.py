"""The random-number contract in Triton: the functions that the kernels share.

The numbers are those of :mod:`hessdiag.kernels.philox`, whose docstring is the contract. A program
of a kernel takes a block of groups of features, 8 for signs and 4 for normals. Everything here is
written for few instructions an element, since these bound the kernels in half precision: a product
of 32-bit words is one instruction with a 64-bit result, the sample of a group is found by a product
in place of a division, and signs are set by flipping the sign bit.
"""

from __future__ import annotations

import math

from hessdiag.kernels._triton import tl, triton
from hessdiag.kernels.philox import STREAM_RADEMACHER

# Triton functions may read only such globals as are declared compile-time constants.
_SIGNS: tl.constexpr = tl.constexpr(STREAM_RADEMACHER)
_SCALE: tl.constexpr = tl.constexpr(2.0**-32)
_HALF_STEP: tl.constexpr = tl.constexpr(2.0**-33)
_BELOW_ONE: tl.constexpr = tl.constexpr(1.0 - 2.0**-24)
# -2 ln 2, since an exponent field that grows by one adds 2**23 to the number read as an integer.
_EXPONENT_STEP: tl.constexpr = tl.constexpr(-2.0 * math.log(2.0) * 2.0**-23)
# Of the float32 numbers from 2**23 to 2**24 neighbours are 1 apart.
_ROUNDING: tl.constexpr = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Return the four uint32 words of Philox 4x32-10 for uint32 counters."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        # One instruction each, where the high and the low half by themselves are two.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def locate(
    program,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Return where the groups of a program lie, from the fields of a ``Layout`` (_layout.py).

    Returns:
        The sample and the place in it of each group, uint32 of shape [G]; the offset of its first
        feature, int64 of shape [G, 1], and how many of its features exist, int32 of shape [G, 1].
    """
    batch = batch.to(tl.uint32)
    features = features.to(tl.uint32)
    if WIDE:
        index = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        groups_per_sample = groups_per_sample.to(tl.int64)
        sample = index // groups_per_sample
        group = (index - sample * groups_per_sample).to(tl.uint32)
        exists = index < batch.to(tl.int64) * groups_per_sample
        sample = sample.to(tl.uint32)
    else:
        index = program * GROUPS + tl.arange(0, GROUPS)
        sample = tl.umulhi(index.to(tl.uint32) << 1, multiplier.to(tl.uint32))
        sample = sample >> shift.to(tl.uint32)
        group = index.to(tl.uint32) - sample * groups_per_sample.to(tl.uint32)
        exists = index < batch.to(tl.int32) * groups_per_sample
    if ALIGNED:
        # Contiguous over the groups, which lets a thread read and write 16 bytes at a time.
        offset = index.to(tl.int64)[:, None] * FEATURES
        room = tl.where(exists, FEATURES, 0)[:, None]
    else:
        first = group.to(tl.int64) * FEATURES
        offset = (sample.to(tl.int64) * features.to(tl.int64) + first)[:, None]
        left = tl.minimum(features.to(tl.int64) - first, FEATURES).to(tl.int32)
        room = tl.where(exists, left, 0)[:, None]
    return sample, group, offset, room


@triton.jit
def row_length(batch, groups_per_sample, features, FEATURES: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the number of elements of a whole batch, int64; of a multiple of FEATURES it shows."""
    samples = batch.to(tl.uint32).to(tl.int64)
    if ALIGNED:
        length = samples * groups_per_sample.to(tl.uint32).to(tl.int64) * FEATURES
    else:
        length = samples * features.to(tl.uint32).to(tl.int64)
    return length


@triton.jit
def exists_at(room, feature, ALIGNED: tl.constexpr):
    """Return which features of each group exist, by their places in it."""
    return room > 0 if ALIGNED else feature < room


@triton.jit
def load(
    pointer, offset, room, FEATURES: tl.constexpr, ALIGNED: tl.constexpr, HALVES: tl.constexpr
):
    """Load the features of [G] groups: a block [G, FEATURES], or [G, FEATURES // 2, 2] in HALVES.

    In the latter form the last axis says which half of the group. A thread then holds whole groups
    where 16 bytes are half a group, and makes their random words once.
    """
    if HALVES == 2:
        width: tl.constexpr = FEATURES // 2
        feature = tl.arange(0, width)[None, :]
        place = pointer + offset + feature
        low = tl.load(place, mask=exists_at(room, feature, ALIGNED))
        high = tl.load(place + width, mask=exists_at(room, feature + width, ALIGNED))
        values = tl.join(low, high)
    else:
        feature = tl.arange(0, FEATURES)[None, :]
        place = pointer + offset + feature
        values = tl.load(place, mask=exists_at(room, feature, ALIGNED))
    return values


@triton.jit
def store(
    pointer,
    values,
    offset,
    room,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Store the features of [G] groups, in the form that :func:`load` returns."""
    values = values.to(pointer.dtype.element_ty)
    if HALVES == 2:
        width: tl.constexpr = FEATURES // 2
        feature = tl.arange(0, width)[None, :]
        low, high = tl.split(values)
        place = pointer + offset + feature
        tl.store(place, low, mask=exists_at(room, feature, ALIGNED))
        tl.store(place + width, high, mask=exists_at(room, feature + width, ALIGNED))
    else:
        feature = tl.arange(0, FEATURES)[None, :]
        place = pointer + offset + feature
        tl.store(place, values, mask=exists_at(room, feature, ALIGNED))


@triton.jit
def sign_words(seed, group, sample, tile):
    """Return four words whose bits are set where the signs of 8 features x 16 probes are -1."""
    zero = group * 0
    w0, w1, w2, w3 = philox(seed, group, sample, zero + tile.to(tl.uint32), zero + _SIGNS)
    return w0 ^ 0xFFFFFFFF, w1 ^ 0xFFFFFFFF, w2 ^ 0xFFFFFFFF, w3 ^ 0xFFFFFFFF


@triton.jit
def byte_of_probe(words, probe):
    """Return a word whose low byte is that of a probe of the tile, 0 .. 15."""
    probe = tl.cast(probe, tl.int32)
    w0, w1, w2, w3 = words
    word = tl.where(probe < 8, tl.where(probe < 4, w0, w1), tl.where(probe < 12, w2, w3))
    return word >> (8 * (probe % 4)).to(tl.uint32)


@triton.jit
def sign_bits(word, HALVES: tl.constexpr):
    """Return the low byte of each word as the sign bits of float32, in the form of :func:`load`."""
    if HALVES == 2:
        feature = tl.arange(0, 4)[None, :, None] + 4 * tl.arange(0, 2)[None, None, :]
        shifted = word[:, None, None] << (31 - feature).to(tl.uint32)
    else:
        feature = tl.arange(0, 8)[None, :]
        shifted = word[:, None] << (31 - feature).to(tl.uint32)
    return shifted & 0x80000000


@triton.jit
def flip(values, signs):
    """Return float32 or float64 values, negated where their sign bit (of :func:`sign_bits`) is 1.

    Every bit but the sign's is kept, those of NaN among them.
    """
    if values.dtype == tl.float64:
        bits = values.to(tl.uint64, bitcast=True) ^ (signs.to(tl.uint64) << 32)
    else:
        bits = values.to(tl.uint32, bitcast=True) ^ signs
    return bits.to(values.dtype, bitcast=True)


@triton.jit
def uniform_from_word(word):
    """Map a uint32 word to float32 in (0, 1)."""
    return tl.minimum(word.to(tl.float32) * _SCALE + _HALF_STEP, _BELOW_ONE)


@triton.jit
def minus_two_logarithms(u):
    """Return -2 ln(u) of a positive normal float32, to about one unit in the last place.

    u = m 2^e with m in [2/3, 4/3), and -2 ln(m) = g + g^2 Q(g), g = -2 (m - 1), with Q a minimax
    polynomial of degree 8. Half the instructions of the library's, which also handles what a
    uniform number in (0, 1) never is.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    g = 2.0 - 2.0 * (bits - exponent).to(tl.float32, bitcast=True)
    q = 0.0005454117199406028 + g * 0.00025764413294382393
    q = 0.0009464983595535159 + g * q
    q = 0.002189203165471554 + g * q
    q = 0.005214207340031862 + g * q
    q = 0.012506278231739998 + g * q
    q = 0.03124961070716381 + g * q
    q = 0.08333306014537811 + g * q
    q = 0.25 + g * q
    return exponent.to(tl.float32) * _EXPONENT_STEP + (g + g * g * q)


@triton.jit
def cos_sin_of_turns(u):
    """Return cos(2 pi u) and sin(2 pi u) for u in [0, 1], to about one unit in the last place.

    u = quarters / 4 + r is exact with |r| <= 1/8, where minimax polynomials of degree 8 and 7
    do; the quarter turns swap and negate them. No slow path, and so no memory for one.
    """
    # The sum has no bits for a fraction: its last bits are the number of quarters, rounded.
    sum_ = u * 4.0 + _ROUNDING
    quarters = sum_.to(tl.uint32, bitcast=True)
    r = u - (sum_ - _ROUNDING) * 0.25
    s = r * r
    sin_r = 81.5925521850586 + s * -75.40206909179688
    sin_r = r * (6.2831854820251465 + s * (-41.3416633605957 + s * sin_r))
    cos_r = -85.44374084472656 + s * 59.24595642089844
    cos_r = 1.0 + s * (-19.739208221435547 + s * (64.93932342529297 + s * cos_r))
    odd = (quarters & 1) != 0
    cosine = tl.where(odd, sin_r, cos_r).to(tl.uint32, bitcast=True)
    sine = tl.where(odd, cos_r, sin_r).to(tl.uint32, bitcast=True)
    # The second-last bit negates the sine, and the sum of both the cosine.
    negative = quarters << 30
    cosine = cosine ^ ((negative + 0x40000000) & 0x80000000)
    sine = sine ^ (negative & 0x80000000)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(radius_word, angle_word):
    """Map two uint32 words to two standard normals."""
    radius = tl.sqrt(minus_two_logarithms(uniform_from_word(radius_word)))
    cosine, sine = cos_sin_of_turns(uniform_from_word(angle_word))
    return radius * cosine, radius * sine


@triton.jit
def normal_groups(seed, group, sample, step, stream):
    """Return the normals of [G] groups of 4 features as a [G, 4] block."""
    zero = group * 0
    w0, w1, w2, w3 = philox(seed, group, sample, zero + step.to(tl.uint32), zero + stream)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [group.shape[0], 4])
