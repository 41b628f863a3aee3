"""Running moments of v * (J v) over probes, with the signs v made again inside the kernel.

For y_m = v_m * (J v_m) the running mean and sum of squared deviations follow Welford's recurrence
(Chan, Golub and LeVeque, 1983), one probe after the other:

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

from hessdiag.kernels import philox, philox_cpu
from hessdiag.kernels._checks import check_tensor, is_eager_cpu
from hessdiag.kernels._triton import on_device_of, tl, triton

_GROUPS_PER_PROGRAM = 128

# In NumPy: numbers of a row, and of a block of rows, that stay in the cache; and the longest rows
# whose sum is faster down the columns, one number after the other, than a row at a time.
_ROW = 2**14
_BLOCK = 2**15
_SHORT_ROW = 32


class Moments(NamedTuple):
    """Moments of v * (J v) over the probes seen so far.

    Attributes:
        num_probes: How many.
        mean: Shape (B, ...): the estimate of diag(J).
        squared_deviations: Shape (B, ...): the sum over probes of (y - mean)^2; divided by
            ``num_probes - 1`` it estimates the variance of one probe.
    """

    num_probes: int
    mean: Tensor
    squared_deviations: Tensor


@triton.jit(do_not_specialize=["count", "probe_offset", "sample_offset", "num_probes"])
def _probe_moments_kernel(
    seed_ptr,
    products_ptr,
    mean_ptr,
    deviations_ptr,
    mean_out_ptr,
    deviations_out_ptr,
    num_probes,
    num_groups,
    groups_per_sample,
    features,
    row_length,
    count,
    probe_offset,
    sample_offset,
    CONTINUED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    index, sample, group = philox.locate_groups(groups_per_sample, GROUPS, WIDE)
    offset, inside = philox.group_offsets(index, sample, group, num_groups, features, 8, ALIGNED)
    dtype: tl.constexpr = mean_out_ptr.dtype.element_ty
    if CONTINUED:
        mean = tl.load(mean_ptr + offset, mask=inside)
        deviations = tl.load(deviations_ptr + offset, mask=inside)
    else:
        mean = tl.zeros([GROUPS, 8], dtype)
        deviations = tl.zeros([GROUPS, 8], dtype)

    seed = tl.load(seed_ptr)
    # An offset below 2**31 comes as int32, in which its sum with a number of probes may overflow.
    probe_offset = probe_offset.to(tl.int64)
    first_tile = probe_offset // 16
    last_tile = (probe_offset + num_probes - 1) // 16
    for tile in range(first_tile, last_tile + 1):
        words = philox.sign_words(seed, group, sample + sample_offset, tile)
        for probe_in_tile in tl.static_range(16):
            row = (tile * 16 + probe_in_tile - probe_offset).to(tl.int64)
            # As a block, since the interpreter turns a block of booleans & a scalar into int32.
            rows = tl.zeros_like(index)[:, None] + row
            wanted = inside & (rows >= 0) & (rows < num_probes)
            product = tl.load(products_ptr + row * row_length + offset, mask=wanted, other=0.0)
            negative = philox.is_negative(words[probe_in_tile // 4], probe_in_tile % 4)
            y = tl.where(negative != 0, -product.to(dtype), product.to(dtype))
            delta = tl.where(wanted, y - mean, 0.0)
            weight = 1.0 / tl.maximum(count + row + 1, 1).to(dtype)
            mean += delta * weight
            deviations += delta * (y - mean)
    tl.store(mean_out_ptr + offset, mean, mask=inside)
    tl.store(deviations_out_ptr + offset, deviations, mask=inside)


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
            _add_columns(
                products[:, columns], probes[:, columns], mean[columns], deviations[columns], count
            )


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
    features = products[0, 0].numel()
    dtype = _accumulator_dtype(products)
    mean_out = torch.empty((batch, *sample_shape), dtype=dtype, device=products.device)
    deviations_out = torch.empty_like(mean_out)
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_SIGN_TILE)
    num_groups = batch * groups_per_sample
    with on_device_of(seed):
        _probe_moments_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM),)](
            seed,
            products,
            mean_out if mean is None else mean,
            deviations_out if deviations is None else deviations,
            mean_out,
            deviations_out,
            num_probes,
            num_groups,
            groups_per_sample,
            features,
            batch * features,
            count,
            probe_offset,
            sample_offset,
            CONTINUED=mean is not None,
            ALIGNED=features % philox.FEATURES_PER_SIGN_TILE == 0,
            WIDE=philox.needs_wide_index(num_groups, _GROUPS_PER_PROGRAM),
            GROUPS=_GROUPS_PER_PROGRAM,
        )
    return mean_out, deviations_out


@torch.library.custom_op("hessdiag::probe_moments", mutates_args=())
def _probe_moments(
    products: Tensor,
    seed: Tensor,
    mean: Tensor | None,
    deviations: Tensor | None,
    count: int,
    probe_offset: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    # An op is below automatic differentiation, for which this one has no rule.
    return probe_moments_reference(
        products.detach(), seed, mean, deviations, count, probe_offset, sample_offset
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
        mean, deviations = _probe_moments(
            products.contiguous(),
            philox.seed_tensor(seed, products.device),
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
    return state or Moments(len(products), zeros, zeros.clone())


def _sizes(products: Tensor, sample_offset: int) -> tuple[int, int, int, int]:
    """Return how many probes, the first sample, how many samples, and features of each."""
    num_probes, batch, *sample_shape = products.shape
    return num_probes, sample_offset, batch, math.prod(sample_shape)


def _accumulator_dtype(products: Tensor) -> torch.dtype:
    return torch.promote_types(products.dtype, torch.float32)
