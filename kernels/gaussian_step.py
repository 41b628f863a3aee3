"""One reverse step of a Gaussian diffusion sampler, with its noise made inside the kernel.

With the posterior mean and variance of x0 given x_t, every DDPM and DDIM step is

    x0_hat  = clamp(p x_t + q prediction)
    sigma^2 = c + k clamp(variance)
    x_s     = a x_t + b x0_hat + sqrt(clamp(sigma^2)) z,      z ~ N(0, I),

so one pass over x_t, the network's prediction and the variance writes x_s: 16 bytes an element in
float32. The coefficients of the two samplers are in :mod:`ocm.samplers`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hessdiag.kernels import philox
from hessdiag.kernels._triton import tl, triton

_GROUPS_PER_PROGRAM = 128


class StepCoefficients(NamedTuple):
    """The coefficients of a step, each a number or a tensor of shape (B,).

    Attributes:
        x0_from_x_t: p in ``x0_hat = p x_t + q prediction``.
        x0_from_prediction: q.
        mean_from_x_t: a in ``mean = a x_t + b x0_hat``.
        mean_from_x0: b.
        noise_variance: c in ``sigma^2 = c + k variance``.
        noise_from_variance: k.
    """

    x0_from_x_t: float | Tensor
    x0_from_prediction: float | Tensor
    mean_from_x_t: float | Tensor
    mean_from_x0: float | Tensor
    noise_variance: float | Tensor
    noise_from_variance: float | Tensor


@triton.jit(do_not_specialize=["step", "sample_offset"])
def _gaussian_step_kernel(
    seed_ptr,
    coefficients_ptr,
    x_t_ptr,
    prediction_ptr,
    variance_ptr,
    out_ptr,
    batch,
    features,
    groups_per_sample,
    coefficients_stride,
    variance_sample_stride,
    variance_feature_stride,
    step,
    sample_offset,
    x0_low,
    x0_high,
    variance_low,
    variance_high,
    noise_variance_high,
    GROUPS: tl.constexpr,
):
    seed = tl.load(seed_ptr)
    first = tl.program_id(0).to(tl.int64) * GROUPS
    index = first + tl.arange(0, GROUPS)
    z = philox.normal_groups(
        seed,
        index % groups_per_sample,
        index // groups_per_sample + sample_offset,
        step,
        philox.STREAM_SAMPLERS_CONSTEXPR,
    )

    element = first * 4 + tl.arange(0, 4 * GROUPS)
    sample = element // (4 * groups_per_sample)
    feature = element % (4 * groups_per_sample)
    inside = (sample < batch) & (feature < features)
    offset = sample * features + feature

    row = coefficients_ptr + sample * coefficients_stride
    p = tl.load(row + 0, mask=inside)
    q = tl.load(row + 1, mask=inside)
    a = tl.load(row + 2, mask=inside)
    b = tl.load(row + 3, mask=inside)
    c = tl.load(row + 4, mask=inside)
    k = tl.load(row + 5, mask=inside)

    x_t = tl.load(x_t_ptr + offset, mask=inside).to(tl.float32)
    prediction = tl.load(prediction_ptr + offset, mask=inside).to(tl.float32)
    variance = tl.load(
        variance_ptr + sample * variance_sample_stride + feature * variance_feature_stride,
        mask=inside,
    ).to(tl.float32)

    x0_hat = tl.clamp(p * x_t + q * prediction, x0_low, x0_high)
    noise_variance = c + k * tl.clamp(variance, variance_low, variance_high)
    noise_variance = tl.clamp(noise_variance, 0.0, noise_variance_high)
    x_s = a * x_t + b * x0_hat + tl.sqrt(noise_variance) * z
    tl.store(out_ptr + offset, x_s.to(out_ptr.dtype.element_ty), mask=inside)


def gaussian_step_reference(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    step: int,
    sample_offset: int,
    x0_low: float,
    x0_high: float,
    variance_low: float,
    variance_high: float,
    noise_variance_high: float,
) -> Tensor:
    """Compute the step in PyTorch, in float32 (float64 for float64 input).

    The arguments are those of :func:`gaussian_step_triton`.
    """
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    columns = coefficients.to(dtype).unbind(-1)
    p, q, a, b, c, k = (column.reshape(-1, *[1] * (x_t.dim() - 1)) for column in columns)
    z = philox.standard_normals(
        seed, philox.STREAM_SAMPLERS, step, 1, sample_offset, len(x_t), x_t[0].numel()
    ).reshape(x_t.shape)

    x0_hat = (p * x_t.to(dtype) + q * prediction.to(dtype)).clamp(x0_low, x0_high)
    noise_variance = c + k * variance.to(dtype).clamp(variance_low, variance_high)
    noise_variance = noise_variance.clamp(0.0, noise_variance_high)
    x_s = a * x_t.to(dtype) + b * x0_hat + noise_variance.sqrt() * z
    return x_s.to(x_t.dtype)


def gaussian_step_triton(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    step: int,
    sample_offset: int,
    x0_low: float,
    x0_high: float,
    variance_low: float,
    variance_high: float,
    noise_variance_high: float,
) -> Tensor:
    """Compute the step with the Triton kernel.

    Args:
        x_t: Shape (B, ...).
        prediction: Shape of ``x_t``.
        variance: Shape (1, 1, ...), (B, 1, ...) or that of ``x_t``.
        coefficients: Shape (1, 6) or (B, 6), the columns in the order of StepCoefficients.
        seed: 0-dimensional int64 tensor.
        step: Counter of the draw.
        sample_offset: Number of the first sample.
        x0_low: Lower clamp of x0_hat.
        x0_high: Upper clamp of x0_hat.
        variance_low: Lower clamp of the variance of x0.
        variance_high: Upper clamp of the variance of x0.
        noise_variance_high: Upper clamp of the variance of the step.
    """
    x_t, prediction = x_t.contiguous(), prediction.contiguous()
    variance, coefficients = variance.contiguous(), coefficients.contiguous()
    out = torch.empty_like(x_t)
    batch, features = len(x_t), x_t[0].numel()
    per_sample = int(len(variance) == batch)
    per_element = int(variance.numel() == x_t.numel())
    groups_per_sample = triton.cdiv(features, philox.FEATURES_PER_NORMAL_GROUP)
    grid = (triton.cdiv(batch * groups_per_sample, _GROUPS_PER_PROGRAM),)
    _gaussian_step_kernel[grid](
        seed,
        coefficients,
        x_t,
        prediction,
        variance,
        out,
        batch,
        features,
        groups_per_sample,
        coefficients.shape[1] if len(coefficients) == batch else 0,
        per_sample * (features if per_element else 1),
        per_element,
        step,
        sample_offset,
        x0_low,
        x0_high,
        variance_low,
        variance_high,
        noise_variance_high,
        GROUPS=_GROUPS_PER_PROGRAM,
    )
    return out


@torch.library.custom_op("hessdiag::gaussian_step", mutates_args=())
def _gaussian_step(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    step: int,
    sample_offset: int,
    x0_low: float,
    x0_high: float,
    variance_low: float,
    variance_high: float,
    noise_variance_high: float,
) -> Tensor:
    return gaussian_step_reference(
        x_t,
        prediction,
        variance,
        coefficients,
        seed,
        step,
        sample_offset,
        x0_low,
        x0_high,
        variance_low,
        variance_high,
        noise_variance_high,
    )


_gaussian_step.register_kernel("cuda")(gaussian_step_triton)


@_gaussian_step.register_fake
def _(x_t: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_t, memory_format=torch.contiguous_format)


def gaussian_step(
    x_t: Tensor,
    prediction: Tensor,
    variance: Tensor | float,
    coefficients: StepCoefficients,
    *,
    seed: int | Tensor,
    step: int,
    sample_offset: int = 0,
    x0_range: tuple[float, float] | None = None,
    variance_range: tuple[float, float] | None = None,
    max_noise_std: float | None = None,
) -> Tensor:
    """Return x_s of one reverse step from the network's prediction and the variance of x0.

    Computes, elementwise and in one kernel on CUDA,

        x0_hat  = clamp(p x_t + q prediction, x0_range)
        sigma^2 = clamp(c + k clamp(variance, variance_range), 0, max_noise_std^2)
        x_s     = a x_t + b x0_hat + sigma z

    where z is stream 2 of the random-number contract at (seed, sample_offset + b, step, d).

    Args:
        x_t: Shape (B, ...), float32, float64, bfloat16 or float16.
        prediction: Shape and dtype of ``x_t``.
        variance: Var[x0 | x_t]: a number, or a tensor that broadcasts to ``x_t`` from one value,
            one per sample, (B, 1, ...), or one per element.
        coefficients: p, q, a, b, c and k, numbers or tensors of shape (B,).
        seed: An integer in [0, 2**64), or an int64 tensor with one element.
        step: Which draw of a sample's noise this is, for example the timestep; below 2**32.
        sample_offset: Number of the first sample; sample numbers must stay below 2**32.
        x0_range: Where x0_hat is clamped to; None leaves it as it is.
        variance_range: Where the variance is clamped to; None leaves it as it is.
        max_noise_std: Upper bound of sigma; None for no bound.

    Returns:
        Shape and dtype of ``x_t``, contiguous.

    Raises:
        TypeError: If a tensor is not of the floating-point type above, or takes part in
            forward-mode differentiation (this step has no derivative rule).
        ValueError: If shapes, devices or ranges do not fit.

    Example:
        >>> x_t = torch.zeros(2, 3)
        >>> step = StepCoefficients(0.0, 1.0, 0.5, 1.0, 0.0, 0.0)
        >>> gaussian_step(x_t, torch.ones(2, 3), 0.0, step, seed=0, step=1)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if isinstance(variance, Tensor):
        variance_tensor = variance
    else:
        variance_tensor = torch.tensor(float(variance), device=x_t.device)
    for name, tensor in (("x_t", x_t), ("prediction", prediction), ("variance", variance_tensor)):
        _check_tensor(name, tensor, x_t.device)
    if x_t.dim() < 1:
        raise ValueError("x_t must have a batch dimension, got a 0-dimensional tensor")
    if prediction.shape != x_t.shape or prediction.dtype != x_t.dtype:
        raise ValueError(
            f"prediction must have the shape and dtype of x_t, {tuple(x_t.shape)} and "
            f"{x_t.dtype}, got {tuple(prediction.shape)} and {prediction.dtype}"
        )
    philox.check_counter("step", step)
    philox.check_counter("sample_offset", sample_offset, len(x_t))
    x0_low, x0_high = _range("x0_range", x0_range)
    variance_low, variance_high = _range("variance_range", variance_range)
    if max_noise_std is not None and not max_noise_std >= 0.0:
        raise ValueError(f"max_noise_std must be at least 0, got {max_noise_std}")
    if x_t.numel() == 0:
        return torch.empty_like(x_t)

    result: Tensor = _gaussian_step(
        x_t,
        prediction,
        _variance_layout(variance_tensor, x_t),
        _pack(coefficients, x_t),
        philox.seed_tensor(seed, x_t.device),
        step,
        sample_offset,
        x0_low,
        x0_high,
        variance_low,
        variance_high,
        math.inf if max_noise_std is None else max_noise_std**2,
    )
    return result


def _check_tensor(name: str, tensor: Tensor, device: torch.device) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of x_t, {device}, got {tensor.device}")
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} carries a tangent of forward-mode differentiation, for which this step has "
            "no rule; pass a detached tensor"
        )


def _range(name: str, bounds: tuple[float, float] | None) -> tuple[float, float]:
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {bounds}")
    return float(low), float(high)


def _variance_layout(variance: Tensor, x_t: Tensor) -> Tensor:
    """Give the variance one of the three layouts that the kernel reads."""
    try:
        variance.expand(x_t.shape)
    except RuntimeError:
        raise ValueError(
            f"variance must broadcast to the shape of x_t, {tuple(x_t.shape)}, "
            f"got {tuple(variance.shape)}"
        ) from None
    shape = (1,) * (x_t.dim() - variance.dim()) + tuple(variance.shape)
    if math.prod(shape[1:]) == 1:
        return variance.reshape(shape)
    return variance.expand(x_t.shape)


def _pack(coefficients: StepCoefficients, x_t: Tensor) -> Tensor:
    """Stack the coefficients to (1, 6) or (B, 6) on the device of x_t."""
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    columns = [torch.as_tensor(value, dtype=dtype).reshape(-1) for value in coefficients]
    rows = max(len(column) for column in columns)
    if rows not in (1, len(x_t)):
        raise ValueError(
            f"coefficients must be numbers or tensors of shape ({len(x_t)},), got {rows} values"
        )
    return torch.stack([column.expand(rows) for column in columns], dim=1).to(x_t.device)
