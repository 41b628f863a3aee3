"""What costs one product for each feature: the exact diagonal, the Jacobian, and its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from hessdiag.checks import check_batch
from hessdiag.estimate import warn_of_forward_mode
from hessdiag.probes import UnitVectors
from hessdiag.products import JacobianProducts, Mode, ScoreFunction, check_samples_alone
from hessdiag.streaming import Chunks, chunk_of


def exact(
    score_fn: ScoreFunction,
    x: Tensor,
    *,
    mode: Mode = "auto",
    chunk_size: int | Literal["auto"] = "auto",
) -> Tensor:
    """Compute diag(J) of each sample by D products, one for each feature.

    Product number i, with the i-th unit vector in every sample, gives column i of J in forward
    mode and row i in reverse mode, of which entry i is kept. One product more makes sure that no
    sample sees another.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken: shape (B, ...), real floating point, finite; D is the
            number of features of a sample.
        mode: As in :func:`hessdiag.estimate`.
        chunk_size: Products held in memory at a time, as in :func:`hessdiag.estimate`.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument or the output of ``score_fn`` is of the wrong type or dtype.
        ValueError: If a value is out of range, x is not finite, or ``score_fn`` returns another
            shape, does not depend on x, or couples the samples.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> exact(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[1., 4.]])
    """
    check_batch("x", x)
    diagonal = torch.empty(len(x), x[:1].numel(), dtype=x.dtype, device=x.device)
    for features, rows, _ in _rows(score_fn, x, mode, chunk_size):
        diagonal[:, features] = torch.diagonal(rows[:, :, features], dim1=0, dim2=2)
    return diagonal.reshape(x.shape)


def jacobian(
    score_fn: ScoreFunction,
    x: Tensor,
    *,
    mode: Mode = "auto",
    chunk_size: int | Literal["auto"] = "auto",
) -> Tensor:
    """Compute the whole Jacobian of each sample by D products.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken, shape (B, ...).
        mode: As in :func:`hessdiag.estimate`.
        chunk_size: Products held in memory at a time.

    Returns:
        Shape (B, D, D), entry (b, i, j) the derivative of output i with respect to input j.

    Raises:
        TypeError: As :func:`exact`.
        ValueError: As :func:`exact`.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacobian(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[[1., 2.],
                 [3., 4.]]])
    """
    check_batch("x", x)
    num_features = x[:1].numel()
    result = torch.empty(len(x), num_features, num_features, dtype=x.dtype, device=x.device)
    for features, rows, taken_mode in _rows(score_fn, x, mode, chunk_size):
        if taken_mode == "vjp":
            result[:, features] = rows.transpose(0, 1)
        else:
            result[:, :, features] = rows.permute(1, 2, 0)
    return result


def _rows(
    score_fn: ScoreFunction, x: Tensor, mode: Mode, chunk_size: int | Literal["auto"]
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield features, their rows (vjp) or columns (jvp) of J, of shape (m, B, D), and the mode."""
    products, notes = JacobianProducts(score_fn, x, mode), list[str]()
    chunk, num_features, seed = chunk_of(chunk_size, x), x[:1].numel(), torch.tensor(0)

    def draw(first: int, count: int) -> Tensor:
        return UnitVectors().draw(
            (count, *x.shape),
            seed,
            probe_offset=first,
            sample_offset=0,
            dtype=x.dtype,
            device=x.device,
        )

    check_samples_alone(products, x)
    for first, _, taken in Chunks(draw, products, chunk, notes).run(num_features):
        features = torch.arange(first, first + len(taken), device=x.device)
        yield features, taken.reshape(len(taken), len(x), num_features), products.mode
    warn_of_forward_mode(mode, products.mode, "; ".join(products.notes + notes))
