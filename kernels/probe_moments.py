"""Running moments of v * (J v) over probes, with the signs v made again inside the kernel.

For y_m = v_m * (J v_m) the running mean and sum of squared deviations follow Welford's recurrence
(Chan, Golub and LeVeque, 1983), one probe after the other::

    delta = y_m - mean,    mean += delta / m,    deviations += delta (y_m - mean).

So the products are read once, the probes never, and the result does not depend on how the probes
are split over calls.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.kernels import _tuning, philox, philox_cpu, philox_triton
from hessdiag.kernels._checks import check_tensor, is_eager_cpu
from hessdiag.kernels._launch import launch, way
from hessdiag.kernels._layout import as_int32, layout
from hessdiag.kernels._triton import tl, triton

# In NumPy: numbers of a row, and of a block of rows, that stay in the cache; and the longest rows
# whose sum is faster down the columns, one number after the other, than a row at a time.
_ROW = 2**14
_BLOCK = 2**15
_SHORT_ROW = 32
# From this length on a call of NumPy takes less than its work, and rows are best taken one by one.
_LONG_ROW = 2**13


class Moments(NamedTuple):
    """Moments of v * (J v) over the probes seen so far.

    Attributes:
        num_probes: How many.
        mean: Shape (B, ...): the estimate of diag(J).
        squared_deviations: Shape (B, ...): the sum over probes of (y - mean)^2; divided by
            ``num_probes - 1`` it estimates the variance of one probe.

    Example:
        The standard error of diag(J) from 64 probes:

        >>> import torch
        >>> from hessdiag.kernels import probe_moments
        >>> from hessdiag.kernels import rademacher
        >>> J = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
        >>> n, mean, squared_deviations = probe_moments(rademacher((64, 1, 2), seed=0) @ J, seed=0)
        >>> stderr = (squared_deviations / (n - 1) / n).sqrt()
        >>> bool(((mean - J.diagonal()).abs() < 4 * stderr).all())
        True
    """

    num_probes: int
    mean: Tensor
    squared_deviations: Tensor


_NUMBERS = [
    "num_probes",
    "first_tile",
    "first_probe",
    "num_tiles",
    "count",
    "batch",
    "groups_per_sample",
    "multiplier",
    "shift",
    "features",
    "sample_offset",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _probe_moments_kernel(
    seed_ptr,
    products_ptr,
    mean_ptr,
    deviations_ptr,
    mean_out_ptr,
    deviations_out_ptr,
    num_probes,
    first_tile,
    first_probe,
    num_tiles,
    count,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    sample_offset,
    CONTINUED: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    sample, group, offset, room = philox_triton.locate(
        tl.program_id(0),
        batch,
        groups_per_sample,
        multiplier,
        shift,
        features,
        8,
        ALIGNED,
        WIDE,
        GROUPS,
    )
    dtype: tl.constexpr = mean_out_ptr.dtype.element_ty
    if CONTINUED:
        mean = philox_triton.load(mean_ptr, offset, room, 8, ALIGNED, HALVES)
        deviations = philox_triton.load(deviations_ptr, offset, room, 8, ALIGNED, HALVES)
    elif HALVES == 2:
        mean = tl.zeros([GROUPS, 4, 2], dtype)
        deviations = tl.zeros([GROUPS, 4, 2], dtype)
    else:
        mean = tl.zeros([GROUPS, 8], dtype)
        deviations = tl.zeros([GROUPS, 8], dtype)

    seed, sample = tl.load(seed_ptr), sample + sample_offset.to(tl.uint32)
    length = philox_triton.row_length(batch, groups_per_sample, features, 8, ALIGNED)
    for tile in range(0, num_tiles):
        words = philox_triton.sign_words(seed, group, sample, first_tile + tile)
        # The row of the tile's first probe, which may lie before the first.
        row = tl.cast(tile, tl.int64) * 16 - first_probe
        rows_left = philox_triton.whole_number(num_probes) - row
        place = products_ptr + row * length
        before = count.to(tl.uint32).to(tl.int64) + row
        first = tl.maximum(-row, 0).to(tl.int32)
        end = tl.minimum(rows_left, 16).to(tl.int32)
        if WHOLE or end - first == 16:
            mean, deviations = _add_tile(
                mean, deviations, place, length, before, words, offset, room, ALIGNED, HALVES
            )
        else:
            for probe in range(first, end):
                product = philox_triton.load(
                    place + probe * length, offset, room, 8, ALIGNED, HALVES
                )
                word = philox_triton.byte_of_probe(words, probe)
                mean, deviations = _add(mean, deviations, product, word, before + probe, HALVES)
    philox_triton.store(mean_out_ptr, mean, offset, room, 8, ALIGNED, HALVES)
    philox_triton.store(deviations_out_ptr, deviations, offset, room, 8, ALIGNED, HALVES)


@triton.jit
def _add_tile(
    mean,
    deviations,
    place,
    length,
    before,
    words,
    offset,
    room,
    ALIGNED: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Return the moments with all probes of a tile added."""
    for probe in tl.static_range(16):
        product = philox_triton.load(place + probe * length, offset, room, 8, ALIGNED, HALVES)
        word = words[probe // 4] >> (8 * (probe % 4))
        mean, deviations = _add(mean, deviations, product, word, before + probe, HALVES)
    return mean, deviations


@triton.jit
def _add(mean, deviations, product, word, before, HALVES: tl.constexpr):
    """Return the moments with one probe added to the ``before`` that are in them."""
    y = philox_triton.flip(product.to(mean.dtype), philox_triton.sign_bits(word, HALVES))
    delta = y - mean
    mean += delta * (1.0 / (before + 1).to(mean.dtype))
    return mean, deviations + delta * (y - mean)


def probe_moments_reference(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Compute the moments in PyTorch; the arguments are those of :func:`probe_moments_triton`."""
    products = products.detach()  # an op is below automatic differentiation, and this has no rule
    dtype = _accumulator_dtype(products)
    signs = philox.signs(seed, probe_offset, *_sizes(products, sample_offset), dtype)
    return _moments_of_tensors(products, signs.reshape(products.shape), mean, deviations, count)


def _moments_of_tensors(
    products: Tensor, probes: Tensor, mean: Tensor | None, deviations: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Return the moments of probes * products, going on from those of ``count`` probes, if any."""
    dtype = _accumulator_dtype(products)
    states = [state for state in (mean, deviations) if state is not None]
    if is_eager_cpu(products, probes, *states):
        rows = _rows(probes, dtype)
        return _moments_of_arrays(products, rows, mean, deviations, count)
    if mean is None or deviations is None:
        mean = torch.zeros(products.shape[1:], dtype=dtype, device=products.device)
        deviations = torch.zeros_like(mean)
    for probe, product in zip(probes, products, strict=True):
        count += 1
        y = probe.to(dtype) * product.to(dtype)
        delta = y - mean
        mean = mean + delta / count
        deviations = deviations + delta * (y - mean)
    return mean, deviations


def _moments_of_arrays(
    products: Tensor,
    probes: NDArray[Any],
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return the same, the same bits, from probes of shape (M, n) in NumPy."""
    shape, rows = products.shape[1:], _rows(products, _accumulator_dtype(products))
    if mean is None or deviations is None:
        state = np.zeros((2, *shape), rows.dtype)
    else:
        state = np.stack([mean.numpy(force=True), deviations.numpy(force=True)])
    _add_rows(rows, probes, state[0].reshape(-1), state[1].reshape(-1), count)
    return torch.from_numpy(state[0]), torch.from_numpy(state[1])


def _rows(values: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """Return values of shape (M, B, ...) as an array of shape (M, n)."""
    # Forced, for a tensor may be negative or zero in name only.
    array = (values if values.dtype == dtype else values.to(dtype)).numpy(force=True)
    return array.reshape(len(array), -1)


def _add_rows(
    products: NDArray[Any],
    probes: NDArray[Any],
    mean: NDArray[Any],
    deviations: NDArray[Any],
    count: int,
) -> None:
    """Go on with ``mean`` and ``deviations``, shape (n,), over rows of shape (M, n).

    The recurrence of this module, operation by operation, and so the bits of PyTorch's operators.
    Only the mean depends on the row before through more than a sum: it takes three operations of
    NumPy for each row, and the others are done for a block of rows.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are seen in the result
        for first in range(0, len(mean), _ROW):
            columns = slice(first, first + _ROW)
            part = (products[:, columns], probes[:, columns], mean[columns], deviations[columns])
            add = _add_long_rows if len(part[2]) >= _LONG_ROW else _add_columns
            add(*part, count)


def _add_long_rows(
    products: NDArray[Any],
    probes: NDArray[Any],
    mean: NDArray[Any],
    deviations: NDArray[Any],
    count: int,
) -> None:
    subtract, divide, add, multiply = np.subtract, np.divide, np.add, np.multiply
    y, delta, share = (np.empty_like(mean) for _ in range(3))
    numbers = np.arange(count + 1, count + len(products) + 1).astype(mean.dtype)
    for i, (probe, product) in enumerate(zip(probes, products, strict=True)):
        multiply(probe, product, y)
        subtract(y, mean, delta)
        divide(delta, numbers[i, ...], share)
        add(mean, share, mean)
        subtract(y, mean, y)
        multiply(y, delta, y)
        add(deviations, y, deviations)


def _add_columns(
    products: NDArray[Any],
    probes: NDArray[Any],
    mean: NDArray[Any],
    deviations: NDArray[Any],
    count: int,
) -> None:
    num_rows, length = products.shape
    block = min(num_rows, max(1, _BLOCK // length))
    means = np.empty((block + 1, length), products.dtype)
    deltas = np.empty((block, length), products.dtype)
    rows_of_means, rows_of_deltas = list(means), list(deltas)
    subtract, divide, add = np.subtract, np.divide, np.add
    means[0] = mean
    for first in range(0, num_rows, block):
        y = probes[first : first + block] * products[first : first + block]
        last = first + len(y)
        # Arrays without dimensions, which NumPy divides by without a detour.
        numbers = np.arange(count + first + 1, count + last + 1).astype(y.dtype)
        divisors = [numbers[i, ...] for i in range(len(y))]
        for row, before, after, delta, divisor in zip(
            y, rows_of_means, rows_of_means[1:], rows_of_deltas, divisors, strict=False
        ):
            subtract(row, before, delta)
            divide(delta, divisor, after)
            add(before, after, after)
        terms = (y - means[1 : len(y) + 1]) * deltas[: len(y)]
        means[0] = means[len(y)]
        if length <= _SHORT_ROW:
            deviations[:] = add.accumulate(np.concatenate([deviations[None], terms]))[-1]
        else:
            for term in terms:
                add(deviations, term, deviations)
    mean[:] = means[0]


def probe_moments_triton(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    """Compute the moments with the Triton kernel.

    Args:
        products: Shape (M, B, ...), contiguous, like all tensors here.
        seed: 0-dimensional int64 tensor.
        mean: State of the probes before, or None.
        deviations: State of the probes before, or None.
        count: Number of the probes before.
        probe_offset: Number of the first probe here.
        sample_offset: Number of the first sample.
    """
    num_probes, batch, *sample_shape = products.shape
    dtype = _accumulator_dtype(products)
    mean_out = torch.empty((batch, *sample_shape), dtype=dtype, device=products.device)
    deviations_out = torch.empty_like(mean_out)
    size = products.dtype.itemsize
    groups, warps = _tuning.PROBE_MOMENTS[size]
    features = math.prod(sample_shape)
    lay = layout(batch, features, philox.FEATURES_PER_SIGN_TILE, groups)
    tiles = philox.SignTiles.of(probe_offset, num_probes)
    launch(
        _probe_moments_kernel,
        (lay.num_programs, 1, 1),
        (
            seed,
            products,
            mean_out if mean is None else mean,
            deviations_out if deviations is None else deviations,
            mean_out,
            deviations_out,
        ),
        (
            as_int32(num_probes),
            tiles.first,
            tiles.first_probe,
            tiles.num_tiles,
            as_int32(count),
            *lay.numbers,
            as_int32(sample_offset),
        ),
        (mean is not None, tiles.whole, lay.aligned, lay.wide, 1 if size == 2 else 2, groups),
        warps,
    )
    return mean_out, deviations_out


_probe_moments = torch.library.custom_op(
    "hessdiag::probe_moments", probe_moments_reference, mutates_args=()
)
_probe_moments.register_kernel("cuda")(probe_moments_triton)


@_probe_moments.register_fake
def _(products: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape, dtype = products.shape[1:], _accumulator_dtype(products)
    return (
        torch.empty(shape, dtype=dtype, device=products.device),
        torch.empty(shape, dtype=dtype, device=products.device),
    )


def probe_moments(
    products: Tensor,
    seed: philox.Seed,
    *,
    state: Moments | None = None,
    probe_offset: int = 0,
    sample_offset: int = 0,
) -> Moments:
    """Return the mean and the sum of squared deviations of v * (J v) over probes.

    The signs v are those of :func:`hessdiag.kernels.rademacher` for the same seed and offsets.

    Args:
        products: J v for each probe, shape (M, B, ...), in any of float32, float64, bfloat16 and
            float16. The moments are kept in float32, or float64 for float64.
        seed: Seed of the probes.
        state: Moments of earlier probes to go on from.
        probe_offset: Number of the first probe of ``products``.
        sample_offset: Number of the first sample.

    Returns:
        The moments over the probes of ``state`` and ``products``, as new tensors.

    Raises:
        TypeError: If ``products`` is of no type above, or takes part in forward-mode
            differentiation, for which the op has no rule.
        ValueError: If ``products`` has fewer than two dimensions, or the state does not fit.

    Example:
        >>> from hessdiag.kernels import probe_moments
        >>> from hessdiag.kernels import rademacher
        >>> probes = rademacher((4, 1, 3), seed=0)
        >>> moments = probe_moments(2.0 * probes, seed=0)    # J = 2 I
        >>> moments.num_probes, moments.mean, moments.squared_deviations
        (4, tensor([[2., 2., 2.]]), tensor([[0., 0., 0.]]))
    """
    _check(products, state)
    num_probes, batch, *_ = products.shape
    probe_offset = philox.check_counter("probe_offset", probe_offset, num_probes)
    sample_offset = philox.check_counter("sample_offset", sample_offset, batch)
    if products.numel() == 0:
        return _without_products(products, state)
    count, mean, deviations = (0, None, None) if state is None else state
    number = philox.seed_number(seed, products.device, products, *(state or ())[1:])
    if number is not None:
        sizes, dtype = _sizes(products, sample_offset), _accumulator_dtype(products)
        signs = philox_cpu.signs(number, probe_offset, *sizes, dtype).reshape(num_probes, -1)
        mean, deviations = _moments_of_arrays(products, signs, mean, deviations, count)
    else:
        seed = philox.seed_tensor(seed, products.device)
        compute = way(
            _probe_moments,
            probe_moments_triton,
            probe_moments_reference,
            *(products, seed, mean, deviations),
        )
        mean, deviations = compute(
            products.contiguous(),
            seed,
            None if mean is None else mean.contiguous(),
            None if deviations is None else deviations.contiguous(),
            count,
            probe_offset,
            sample_offset,
        )
    return Moments(count + num_probes, mean, deviations)


def probe_moments_from_probes(
    products: Tensor, probes: Tensor, *, state: Moments | None = None
) -> Moments:
    """Return what :func:`probe_moments` does, bit for bit on a CPU, from probes at hand.

    A reference like the others of this package: in PyTorch, on any device, and in NumPy where
    that cannot be seen. On a CPU it saves to make the signs again.

    Args:
        products: J v for each probe, shape (M, B, ...).
        probes: v, in the shape of ``products``; of signs, each type holds them exactly.
        state: Moments of earlier probes to go on from.

    Raises:
        TypeError: As :func:`probe_moments`.
        ValueError: As :func:`probe_moments`, or if the probes have another shape.

    Example:
        >>> probes = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]]])
        >>> probe_moments_from_probes(2.0 * probes, probes)    # J = 2 I
        Moments(num_probes=2, mean=tensor([[2., 2.]]), squared_deviations=tensor([[0., 0.]]))
    """
    _check(products, state)
    check_tensor("probes", probes, products.device)
    if probes.shape != products.shape:
        raise ValueError(
            f"probes must have the shape of products, {tuple(products.shape)}, "
            f"got {tuple(probes.shape)}"
        )
    if products.numel() == 0:
        return _without_products(products, state)
    count, mean, deviations = (0, None, None) if state is None else state
    mean, deviations = _moments_of_tensors(products, probes, mean, deviations, count)
    return Moments(count + len(products), mean, deviations)


def _check(products: Tensor, state: Moments | None) -> None:
    """Raise unless products are what an op can read, and the state goes with them."""
    check_tensor("products", products)
    if products.dim() < 2:
        raise ValueError(f"products must have shape (M, B, ...), got {tuple(products.shape)}")
    if state is None:
        return
    if not isinstance(state, Moments):
        raise TypeError(f"state must be hessdiag.kernels.Moments, got {type(state).__name__}")
    count = philox.integer_of(state[0])
    if count is None or count < 0:
        raise ValueError(f"state.num_probes must be an int of at least 0, got {state[0]!r}")
    dtype = _accumulator_dtype(products)
    for name, tensor in zip(("mean", "squared_deviations"), state[1:], strict=True):
        check_tensor(f"state.{name}", tensor, products.device)
        if tensor.shape != products.shape[1:] or tensor.dtype != dtype:
            raise ValueError(
                f"state.{name} must have shape {tuple(products.shape[1:])} and dtype {dtype}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype}"
            )


def _without_products(products: Tensor, state: Moments | None) -> Moments:
    dtype = _accumulator_dtype(products)
    zeros = torch.zeros(products.shape[1:], dtype=dtype, device=products.device)
    if state is None:
        return Moments(len(products), zeros, zeros.clone())
    # Without entries the probes were taken, of nothing.
    return state._replace(num_probes=state.num_probes + len(products)) if len(products) else state


def _sizes(products: Tensor, sample_offset: int) -> tuple[int, int, int, int]:
    """Return how many probes, the first sample, how many samples, and features of each."""
    num_probes, batch, *sample_shape = products.shape
    return num_probes, sample_offset, batch, math.prod(sample_shape)


def _accumulator_dtype(products: Tensor) -> torch.dtype:
    return torch.promote_types(products.dtype, torch.float32)
