"""One reverse step of a Gaussian diffusion sampler, with its noise made inside the kernel.

With the posterior mean and variance of x0 given x_t, every DDPM and DDIM step is::

    x0_hat  = clamp(p x_t + q prediction)
    sigma^2 = c + k clamp(variance)
    x_s     = a x_t + b x0_hat + sqrt(clamp(sigma^2)) z,      z ~ N(0, I),

so one pass over x_t, the network's prediction and the variance writes x_s: 16 bytes an element in
float32. The coefficients of the two samplers are in :mod:`ocm.sampling.samplers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hessdiag.kernels import _tuning, philox, philox_triton
from hessdiag.kernels._checks import FLOAT_TYPES, check_tensor, rows_per_sample
from hessdiag.kernels._launch import launch, way
from hessdiag.kernels._layout import as_int32, layout
from hessdiag.kernels._triton import tl, triton

# How the variance lies in memory.
_NO_VARIANCE: tl.constexpr = tl.constexpr(0)
_ONE_VARIANCE: tl.constexpr = tl.constexpr(1)
_VARIANCE_PER_SAMPLE: tl.constexpr = tl.constexpr(2)
_VARIANCE_PER_ELEMENT: tl.constexpr = tl.constexpr(3)
_SAMPLERS: tl.constexpr = tl.constexpr(philox.STREAM_SAMPLERS)


class StepCoefficients(NamedTuple):
    """The coefficients of a step, each a number or a tensor of shape (B,).

    Attributes:
        x0_from_x_t: p in ``x0_hat = p x_t + q prediction``.
        x0_from_prediction: q of the same.
        mean_from_x_t: a in ``mean = a x_t + b x0_hat``.
        mean_from_x0: b of the same.
        noise_variance: c in ``sigma^2 = c + k variance``.
        noise_from_variance: k of the same.

    Example:
        x0 is predicted, and x_s lies half-way to it, with the stated variance of x0 as noise:

        >>> import torch
        >>> from hessdiag.kernels import StepCoefficients, gaussian_step
        >>> half = StepCoefficients(
        ...     x0_from_x_t=0.0, x0_from_prediction=1.0, mean_from_x_t=0.5, mean_from_x0=0.5,
        ...     noise_variance=0.0, noise_from_variance=1.0)
        >>> x_t, x0_hat = torch.zeros(1, 2), torch.ones(1, 2)
        >>> gaussian_step(x_t, x0_hat, 0.0, half, seed=0, step=1)    # of a variance of zero
        tensor([[0.5000, 0.5000]])
    """

    x0_from_x_t: float | Tensor
    x0_from_prediction: float | Tensor
    mean_from_x_t: float | Tensor
    mean_from_x0: float | Tensor
    noise_variance: float | Tensor
    noise_from_variance: float | Tensor


class Clamps(NamedTuple):
    """Where x0_hat, its variance and the variance of the noise are clamped to."""

    x0_low: float = -math.inf
    x0_high: float = math.inf
    variance_low: float = -math.inf
    variance_high: float = math.inf
    noise_variance_high: float = math.inf


@triton.jit
def _clamp(x, low, high):
    # tl.clamp by itself turns NaN into a bound, and a broken network into plausible samples.
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


_NUMBERS = [
    "step",
    "batch",
    "groups_per_sample",
    "multiplier",
    "shift",
    "features",
    "sample_offset",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _gaussian_step_kernel(
    seed_ptr,
    rows_ptr,
    x_t_ptr,
    prediction_ptr,
    variance_ptr,
    out_ptr,
    step,
    batch,
    groups_per_sample,
    multiplier,
    shift,
    features,
    sample_offset,
    p,
    q,
    a,
    b,
    c,
    k,
    x0_low,
    x0_high,
    low,
    high,
    noise_variance_high,
    VARIANCE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # The bounds low and high are those of the noise's variance, and PER_SAMPLE of the variance.
    sample, group, offset, room = philox_triton.locate(
        tl.program_id(0),
        batch,
        groups_per_sample,
        multiplier,
        shift,
        features,
        4,
        ALIGNED,
        WIDE,
        GROUPS,
    )
    x_t = philox_triton.load(x_t_ptr, offset, room, 4, ALIGNED, 1).to(tl.float32)
    prediction = philox_triton.load(prediction_ptr, offset, room, 4, ALIGNED, 1).to(tl.float32)
    if VARIANCE == _VARIANCE_PER_ELEMENT:
        variance = philox_triton.load(variance_ptr, offset, room, 4, ALIGNED, 1).to(tl.float32)
    elif VARIANCE == _VARIANCE_PER_SAMPLE:
        place = variance_ptr + sample.to(tl.int64)[:, None]
        variance = tl.load(place, mask=room > 0).to(tl.float32)
    elif VARIANCE == _ONE_VARIANCE:
        variance = tl.load(variance_ptr).to(tl.float32)
    if PER_SAMPLE:
        row = rows_ptr + sample.to(tl.int64)[:, None] * 6
        p = tl.load(row + 0, mask=room > 0)
        q = tl.load(row + 1, mask=room > 0)
        a = tl.load(row + 2, mask=room > 0)
        b = tl.load(row + 3, mask=room > 0)
        c = tl.load(row + 4, mask=room > 0)
        k = tl.load(row + 5, mask=room > 0)
    number = sample + sample_offset.to(tl.uint32)
    z = philox_triton.normal_groups(tl.load(seed_ptr), group, number, step, _SAMPLERS)

    x0_hat = _clamp(p * x_t + q * prediction, x0_low, x0_high)
    if VARIANCE == _NO_VARIANCE:
        noise_variance = _clamp(c, 0.0, noise_variance_high)
    elif PER_SAMPLE:
        noise_variance = c + k * _clamp(variance, low, high)
        noise_variance = _clamp(noise_variance, 0.0, noise_variance_high)
    else:
        noise_variance = _clamp(c + k * variance, low, high)
    x_s = a * x_t + b * x0_hat + tl.sqrt(noise_variance) * z
    philox_triton.store(out_ptr, x_s, offset, room, 4, ALIGNED, 1)


def _noise_bounds(
    c: float, k: float, low: float, high: float, most: float
) -> tuple[float, float, float]:
    """Return k' and bounds with which one clamp of c + k' variance does what the two clamps do.

    c + k clamp(v) = clamp(c + k v) between the images of the bounds, so that the second clamp, to
    0 and ``most``, only moves these. With k = 0 the variance shall change nothing, be it infinite,
    but let NaN through.

    Example:
        >>> _noise_bounds(0.5, 2.0, low=0.0, high=1.0, most=9.0)
        (2.0, 0.5, 2.5)
        >>> _noise_bounds(0.5, 0.0, low=0.0, high=1.0, most=9.0)
        (1.0, 0.5, 0.5)
    """
    if k == 0.0:
        k, low, high = 1.0, c, c
    else:
        if k < 0.0:
            low, high = high, low
        # An infinite bound is none, also where c is infinite and their sum would be NaN.
        low = 0.0 if math.isinf(low) else c + k * low
        high = most if math.isinf(high) else c + k * high
    return k, min(max(low, 0.0), most), min(max(high, 0.0), most)


def gaussian_step_reference(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor | None,
    rows: Tensor | None,
    coefficients: Sequence[float],
    clamps: Sequence[float],
    seed: Tensor,
    step: int,
    sample_offset: int,
) -> Tensor:
    """Compute the step in PyTorch, in float32 (float64 for float64 input).

    The arguments are those of :func:`gaussian_step_triton`.
    """
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    p, q, a, b, c, k = (
        coefficients
        if rows is None
        else (column.to(dtype).reshape(-1, *[1] * (x_t.dim() - 1)) for column in rows.unbind(1))
    )
    limits = Clamps(*clamps)
    z = philox.standard_normals(
        seed, philox.STREAM_SAMPLERS, step, 1, sample_offset, len(x_t), x_t[0].numel()
    ).reshape(x_t.shape)

    x0_hat = (p * x_t.to(dtype) + q * prediction.to(dtype)).clamp(limits.x0_low, limits.x0_high)
    noise_variance = torch.as_tensor(c, dtype=dtype, device=x_t.device)
    if variance is not None:
        clamped = variance.to(dtype).clamp(limits.variance_low, limits.variance_high)
        noise_variance = noise_variance + k * clamped
    noise_std = noise_variance.clamp(0.0, limits.noise_variance_high).sqrt()
    x_s = a * x_t.to(dtype) + b * x0_hat + noise_std * z
    return x_s.to(x_t.dtype)


def gaussian_step_triton(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor | None,
    rows: Tensor | None,
    coefficients: Sequence[float],
    clamps: Sequence[float],
    seed: Tensor,
    step: int,
    sample_offset: int,
) -> Tensor:
    """Compute the step with the Triton kernel, in float32; float64 takes the reference.

    Args:
        x_t: Shape (B, ...), contiguous, like all tensors here.
        prediction: Shape of ``x_t``.
        variance: Shape (1, 1, ...), (B, 1, ...) or that of ``x_t``; None for none.
        rows: Coefficients of each sample, float32 of shape (B, 6), or None.
        coefficients: The six coefficients for all samples, read where ``rows`` is None.
        clamps: The fields of :class:`Clamps`.
        seed: 0-dimensional int64 tensor.
        step: Counter of the draw.
        sample_offset: Number of the first sample.
    """
    if x_t.dtype == torch.float64:
        return gaussian_step_reference(
            x_t, prediction, variance, rows, coefficients, clamps, seed, step, sample_offset
        )
    out = torch.empty_like(x_t)
    batch = x_t.shape[0]
    if variance is None:
        kind = 0
    elif variance.numel() == 1:
        kind = 1
    else:
        kind = 2 if variance.numel() == batch else 3
    x0_low, x0_high, low, high, noise_variance_high = clamps
    p, q, a, b, c, k = coefficients
    if rows is None and variance is not None:
        k, low, high = _noise_bounds(c, k, low, high, noise_variance_high)
    groups, warps = _tuning.GAUSSIAN_STEP[x_t.itemsize]
    lay = layout(batch, x_t.numel() // batch, philox.FEATURES_PER_NORMAL_GROUP, groups)
    launch(
        _gaussian_step_kernel,
        (lay.num_programs, 1, 1),
        (
            seed,
            seed if rows is None else rows,
            x_t,
            prediction,
            seed if variance is None else variance,
            out,
        ),
        (
            as_int32(step),
            *lay.numbers,
            as_int32(sample_offset),
            *(p, q, a, b, c, k),
            x0_low,
            x0_high,
            low,
            high,
            noise_variance_high,
        ),
        (kind, rows is not None, lay.aligned, lay.wide, groups),
        warps,
    )
    return out


_gaussian_step = torch.library.custom_op(
    "hessdiag::gaussian_step", gaussian_step_reference, mutates_args=()
)
_gaussian_step.register_kernel("cuda")(gaussian_step_triton)


@_gaussian_step.register_fake
def _(x_t: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_t)


def gaussian_step(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor | float,
    coefficients: StepCoefficients,
    *,
    seed: philox.Seed,
    step: int,
    sample_offset: int = 0,
    x0_range: tuple[float, float] | None = None,
    variance_range: tuple[float, float] | None = None,
    max_noise_std: float | None = None,
) -> Tensor:
    """Return x_s of one reverse step from the network's prediction and the variance of x0.

    Computes, elementwise and in one kernel on CUDA::

        x0_hat  = clamp(p x_t + q prediction, x0_range)
        sigma^2 = clamp(c + k clamp(variance, variance_range), 0, max_noise_std^2)
        x_s     = a x_t + b x0_hat + sigma z

    where z is stream 2 of the random-number contract at (seed, sample_offset + b, step, d).

    Args:
        x_t: Shape (B, ...), float32, bfloat16 or float16, computed in float32; or float64,
            which takes the reference on every device.
        prediction: Shape and dtype of ``x_t``.
        variance: Var[x0 | x_t]: a number, or a tensor that broadcasts to ``x_t`` from one value,
            one per sample, (B, 1, ...), or one per element.
        coefficients: p, q, a, b, c and k, numbers or tensors of shape (B,).
        seed: An integer in [0, 2**64), an int64 tensor with one element, or a torch.Generator,
            from which one is drawn.
        step: Which draw of a sample's noise this is, for example the timestep; below 2**32.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        x0_range: Where x0_hat is clamped to; None leaves it as it is.
        variance_range: Where the variance is clamped to; None leaves it as it is.
        max_noise_std: Upper bound of sigma; None for no bound.

    Returns:
        Shape and dtype of ``x_t``, contiguous.

    Raises:
        TypeError: If a tensor is of no type above, or takes part in forward-mode
            differentiation, for which the step has no rule.
        ValueError: If shapes, devices or ranges do not fit, or a tensor overlaps itself.

    Example:
        >>> import torch
        >>> from hessdiag.kernels import StepCoefficients, gaussian_step
        >>> x_t = torch.zeros(2, 3)
        >>> step = StepCoefficients(0.0, 1.0, 0.5, 1.0, 0.0, 0.0)
        >>> gaussian_step(x_t, torch.ones(2, 3), 0.0, step, seed=0, step=1)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    common = _is_common(x_t, prediction, variance)
    if not common:
        _check(x_t, prediction)
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be StepCoefficients, got {type(coefficients).__name__}")
    step = philox.check_counter("step", step)
    sample_offset = philox.check_counter("sample_offset", sample_offset, x_t.shape[0])
    x0_low, x0_high = _range("x0_range", x0_range)
    variance_low, variance_high = _range("variance_range", variance_range)
    if max_noise_std is not None and not max_noise_std >= 0.0:
        raise ValueError(f"max_noise_std must be at least 0, got {max_noise_std}")
    noise_variance_high = math.inf if max_noise_std is None else float(max_noise_std) ** 2
    clamps = Clamps(x0_low, x0_high, variance_low, variance_high, noise_variance_high)
    read: Tensor | None = None
    if common:
        read = cast("Tensor", variance)
    elif isinstance(variance, Tensor):
        read = _variance_layout(variance, x_t)
    elif not isinstance(variance, Real):
        raise TypeError(f"variance must be a number or a tensor, got {type(variance).__name__}")
    else:
        # A number is part of the step's own variance: nothing to read.
        fixed = min(max(float(variance), variance_low), variance_high)
        coefficients = coefficients._replace(
            noise_variance=coefficients.noise_variance + coefficients.noise_from_variance * fixed,
            noise_from_variance=0.0,
        )
    rows: Tensor | None = None
    if set(map(type, coefficients)) == {float}:
        numbers = cast("Sequence[float]", coefficients)
    else:
        rows, numbers = rows_per_sample(coefficients._asdict(), x_t)
    if x_t.numel() == 0:
        return torch.empty_like(x_t)
    if not common:
        x_t, prediction = x_t.contiguous(), prediction.contiguous()

    seed = philox.seed_tensor(seed, x_t.device)
    compute = way(
        _gaussian_step,
        gaussian_step_triton,
        gaussian_step_reference,
        *(x_t, prediction, seed, read, rows),
    )
    result: Tensor = compute(
        x_t, prediction, read, rows, numbers, clamps, seed, step, sample_offset
    )
    return result


def _is_common(x_t: Tensor, prediction: Tensor, variance: Tensor | float) -> bool:
    """Say at little cost whether the tensors are plain, alike and contiguous: nothing to mend."""
    return (
        type(x_t) is type(prediction) is type(variance) is Tensor
        and x_t.shape == prediction.shape == variance.shape
        and x_t.dtype is prediction.dtype
        and x_t.dtype in FLOAT_TYPES
        and variance.dtype in FLOAT_TYPES
        and x_t.device == prediction.device == variance.device
        and x_t.is_contiguous()
        and prediction.is_contiguous()
        and variance.is_contiguous()
        and x_t.dim() > 0
        and torch.autograd.forward_ad._current_level < 0
    )


def _check(x_t: Tensor, prediction: Tensor) -> None:
    """Raise unless the step can read the tensors."""
    check_tensor("x_t", x_t)
    check_tensor("prediction", prediction, x_t.device)
    if x_t.dim() < 1:
        raise ValueError("x_t must have a batch dimension, got a 0-dimensional tensor")
    if prediction.shape != x_t.shape or prediction.dtype != x_t.dtype:
        raise ValueError(
            f"prediction must have the shape and dtype of x_t, {tuple(x_t.shape)} and "
            f"{x_t.dtype}, got {tuple(prediction.shape)} and {prediction.dtype}"
        )


def _range(name: str, bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is not None and (not isinstance(bounds, Sequence) or len(bounds) != 2):
        raise TypeError(f"{name} must be (low, high) or None, got {bounds!r}")
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {bounds}")
    return float(low), float(high)


def _variance_layout(variance: Tensor, x_t: Tensor) -> Tensor:
    """Check the variance, and give it one of the three layouts that the kernel reads."""
    # One that was expanded to the shape of x_t is read as it is, not as overlapping memory.
    compact = variance[
        tuple(slice(1) if stride == 0 else slice(None) for stride in variance.stride())
    ]
    check_tensor("variance", compact, x_t.device)
    try:
        variance.expand(x_t.shape)
    except RuntimeError:
        raise ValueError(
            f"variance must broadcast to the shape of x_t, {tuple(x_t.shape)}, "
            f"got {tuple(variance.shape)}"
        ) from None
    shape = (1,) * (x_t.dim() - compact.dim()) + tuple(compact.shape)
    if math.prod(shape[1:]) == 1:
        return compact.reshape(shape).contiguous()
    return variance.expand(x_t.shape).contiguous()
