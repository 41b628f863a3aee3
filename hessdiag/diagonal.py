"""The diagonal of the Jacobian of a batched function: estimated, and exact."""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.checks import check_batch, check_positive_int
from hessdiag.kernels import Moments, probe_moments, rademacher
from hessdiag.kernels.philox import seed_tensor
from hessdiag.products import Mode, ScoreFunction, jacobian_products

# One tile of the random-number contract: a smaller block makes the same signs more than once.
_PROBES_PER_BLOCK = 16


def hutchinson(
    score_fn: ScoreFunction,
    x: Tensor,
    M: int,
    *,
    seed: int | Tensor = 0,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    sample_offset: int = 0,
    probe_offset: int = 0,
) -> Tensor:
    """Estimate diag(J) of each sample with M Rademacher probes.

    The estimate is Hutchinson's, as written for the diagonal by Bekas, Kokiopoulou and Saad
    (2007),

        d = (1/M) sum_m v_m * (J v_m),    v_m uniform on {-1, +1}^D,

    or the same with the transpose of J. It is unbiased, with variance

        Var[d_i] = (1/M) sum_{j != i} J_ij^2    (forward mode; J_ji^2 in reverse mode).

    The probes follow the random-number contract (:mod:`hessdiag.kernels.philox`): the result does
    not depend on ``chunk_size`` or on how a batch is split over calls, beyond what the product
    with J itself does. ``score_fn`` must act on each sample alone: put modules that couple the
    batch (BatchNorm) in eval mode.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone. For a Hessian diagonal, the
            gradient of a function.
        x: Where the Jacobian is taken: shape (B, ...), real floating point, finite.
        M: Number of probes, at least 1.
        seed: An integer in [0, 2**64), or an int64 tensor with one element.
        mode: "vjp", one evaluation of ``score_fn`` and M backward passes; "jvp", forward mode,
            which keeps no activations and evaluates ``score_fn`` once for each chunk; "auto",
            which is "vjp" wherever the output of ``score_fn`` has a backward graph.
        chunk_size: Probes held in memory at a time, and vmapped over in mode "jvp", where 1 does
            without vmap; None for 16.
        sample_offset: Number of the first sample, for a batch that is part of a larger one.
        probe_offset: Number of the first probe, for an estimate that is continued.

    Returns:
        Shape and dtype of ``x``, without a gradient. The mean is kept in float32 or, for float64,
        in float64.

    Raises:
        TypeError: If an argument or the output of ``score_fn`` is of the wrong type or dtype.
        ValueError: If a value is out of range, x is not finite, or ``score_fn`` returns another
            shape or does not depend on x.

    Example:
        >>> import torch, hessdiag
        >>> x = torch.linspace(0, 1, 6).reshape(2, 3)
        >>> hessdiag.hutchinson(torch.sin, x, M=1)    # exact: the Jacobian is diagonal
        tensor([[1.0000, 0.9801, 0.9211],
                [0.8253, 0.6967, 0.5403]])
    """
    check_batch("x", x)
    check_positive_int("M", M)
    block = _block_size(chunk_size, M)
    products = jacobian_products(score_fn, x, mode)
    seed = seed_tensor(seed, x.device)
    moments: Moments | None = None
    for first in range(0, M, block):
        offsets = {"probe_offset": probe_offset + first, "sample_offset": sample_offset}
        shape = (min(block, M - first), *x.shape)
        probes = rademacher(shape, seed, dtype=x.dtype, device=x.device, **offsets)
        moments = probe_moments(products(probes), seed, state=moments, **offsets)
    assert moments is not None  # M is at least 1
    return moments.mean.to(x.dtype)


def exact(
    score_fn: ScoreFunction,
    x: Tensor,
    *,
    mode: Mode = "auto",
    chunk_size: int | None = None,
) -> Tensor:
    """Compute diag(J) of each sample by D products, one for each feature.

    Product number i, with the i-th unit vector in every sample, gives column i of J in forward
    mode and row i in reverse mode, of which entry i is kept.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken: shape (B, ...), real floating point, finite; D is the
            number of features of a sample.
        mode: As in :func:`hutchinson`.
        chunk_size: Products held in memory at a time, as in :func:`hutchinson`.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument or the output of ``score_fn`` is of the wrong type or dtype.
        ValueError: If a value is out of range, x is not finite, or ``score_fn`` returns another
            shape or does not depend on x.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> hessdiag.exact(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[1., 4.]])
    """
    check_batch("x", x)
    num_features = x[:1].numel()
    block = _block_size(chunk_size, num_features)
    products = jacobian_products(score_fn, x, mode)
    diagonal = torch.empty(len(x), num_features, dtype=x.dtype, device=x.device)
    for first in range(0, num_features, block):
        features = torch.arange(first, min(first + block, num_features), device=x.device)
        units = torch.zeros(len(features), 1, num_features, dtype=x.dtype, device=x.device)
        units[torch.arange(len(features)), 0, features] = 1.0
        units = units.expand(-1, len(x), -1).reshape(len(features), *x.shape)
        rows = products(units).reshape(len(features), len(x), num_features)
        diagonal[:, features] = torch.diagonal(rows[:, :, features], dim1=0, dim2=2)
    return diagonal.reshape(x.shape)


def _block_size(chunk_size: int | None, products: int) -> int:
    if chunk_size is None:
        chunk_size = _PROBES_PER_BLOCK
    check_positive_int("chunk_size", chunk_size)
    return max(1, min(chunk_size, products))
