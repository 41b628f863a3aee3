"""The random-number contract a second time, in NumPy and element by element.

Written from the text of the contract alone, to check the package's two implementations against.
"""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter, key):
    """Philox 4x32-10 on broadcastable uint64 arrays that hold 32-bit words."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        product_a = np.uint64(0xD2511F53) * c[0]
        product_b = np.uint64(0xCD9E8D57) * c[2]
        high_a, low_a = product_a >> np.uint64(32), product_a & MASK
        high_b, low_b = product_b >> np.uint64(32), product_b & MASK
        c = [high_b ^ c[1] ^ k[0], low_b, high_a ^ c[3] ^ k[1], low_a]
        k = [(k[0] + np.uint64(0x9E3779B9)) & MASK, (k[1] + np.uint64(0xBB67AE85)) & MASK]
    return c


def _key(seed):
    return seed & 0xFFFFFFFF, seed >> 32


def rademacher(
    num_probes, batch, features, seed, probe_offset=0, sample_offset=0, feature_offset=0
):
    m, b, d = np.meshgrid(
        np.arange(probe_offset, probe_offset + num_probes),
        np.arange(sample_offset, sample_offset + batch),
        np.arange(feature_offset, feature_offset + features),
        indexing="ij",
    )
    words = np.stack(philox4x32_10((d // 8, b, m // 16, 0 * d), _key(seed)))
    p = (m % 16) * 8 + d % 8
    word = np.take_along_axis(words, (p // 32)[None], axis=0)[0]
    bit = (word >> (p % 32).astype(np.uint64)) & np.uint64(1)
    return np.where(bit == 1, 1.0, -1.0)


def normal(batch, features, seed, stream, step=0, sample_offset=0, feature_offset=0):
    b, d = np.meshgrid(
        np.arange(sample_offset, sample_offset + batch),
        np.arange(feature_offset, feature_offset + features),
        indexing="ij",
    )
    words = philox4x32_10((d // 4, b, 0 * d + step, 0 * d + stream), _key(seed))
    first = d % 4 < 2
    uniform = [
        np.minimum(
            np.where(first, words[i], words[i + 2]).astype(np.float32).astype(np.float64) * 2.0**-32
            + 2.0**-33,
            1 - 2.0**-24,
        )
        for i in range(2)
    ]
    radius = np.sqrt(-2.0 * np.log(uniform[0]))
    angle = 2.0 * np.pi * uniform[1]
    return np.where(d % 2 == 0, radius * np.cos(angle), radius * np.sin(angle))


def permutation(batch, features, seed, block=0, sample_offset=0):
    b, d = np.meshgrid(
        np.arange(sample_offset, sample_offset + batch), np.arange(features), indexing="ij"
    )
    words = np.stack(philox4x32_10((d // 4, b, 0 * d + block, 0 * d + 3), _key(seed)))
    keys = np.take_along_axis(words, (d % 4)[None], axis=0)[0]
    ranks = np.empty((batch, features), dtype=np.int64)
    for row, key in zip(ranks, keys, strict=True):
        for rank, feature in enumerate(sorted(range(features), key=lambda i: (key[i], i))):
            row[feature] = rank
    return ranks


def moments(products, signs, mean, deviations, count):
    """The recurrence of the moments in the precision of ``products``, one probe after the other."""
    mean, deviations = mean.copy(), deviations.copy()
    for product, sign in zip(products, signs, strict=True):
        count += 1
        y = sign.astype(products.dtype) * product
        delta = y - mean
        mean += delta / products.dtype.type(count)
        deviations += delta * (y - mean)
    return mean, deviations
