"""What costs one product for each feature: the exact diagonal, the Jacobian, and its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hessdiag.estimate import warn_of_forward_mode
from hessdiag.jacobian import Jacobian, ScoreFunction, Ways, as_jacobian
from hessdiag.probes import UnitVectors
from hessdiag.streaming import Chunks, chunk_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def exact(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    *,
    chunk_size: int | Literal["auto"] = "auto",
    **ways: Unpack[Ways],
) -> Tensor:
    """Compute diag(J) of each sample by D products, one for each feature.

    Product number i, with the i-th unit vector in every sample, gives column i of J in forward
    mode and row i in reverse mode, of which entry i is kept. Two products more make sure that no
    sample sees another.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone; or a :class:`hessdiag.Jacobian`.
        x: Where the Jacobian of a function is taken: shape (B, ...), real floating point, finite;
            D is the number of features of a sample.
        chunk_size: Products held in memory at a time, as in :func:`hessdiag.estimate`.
        ways: As in :func:`hessdiag.estimate`.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument or the output of ``score_fn`` is of the wrong type or dtype.
        ValueError: If a value is out of range, x is not finite, or ``score_fn`` returns another
            shape, does not depend on x, or couples the samples.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> hessdiag.exact(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[1., 4.]])
    """
    J = as_jacobian(score_fn, x, ways)
    x = J.x
    diagonal = torch.empty(len(x), x[:1].numel(), dtype=x.dtype, device=x.device)
    for features, rows in _rows(J, chunk_size):
        diagonal[:, features] = torch.diagonal(rows[:, :, features], dim1=0, dim2=2)
    return diagonal.reshape(x.shape)


def jacobian(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    *,
    chunk_size: int | Literal["auto"] = "auto",
    **ways: Unpack[Ways],
) -> Tensor:
    """Compute the whole Jacobian of each sample by D products.

    Args:
        score_fn: As in :func:`exact`.
        x: As in :func:`exact`.
        chunk_size: Products held in memory at a time.
        ways: As in :func:`hessdiag.estimate`.

    Returns:
        Shape (B, D, D), entry (b, i, j) the derivative of output i with respect to input j.

    Raises:
        TypeError: As :func:`exact`.
        ValueError: As :func:`exact`.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> hessdiag.jacobian(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[[1., 2.],
                 [3., 4.]]])
    """
    J = as_jacobian(score_fn, x, ways)
    x = J.x
    num_features = x[:1].numel()
    result = torch.empty(len(x), num_features, num_features, dtype=x.dtype, device=x.device)
    for features, rows in _rows(J, chunk_size):
        if J.mode == "vjp":
            result[:, features] = rows.transpose(0, 1)
        else:
            result[:, :, features] = rows.permute(1, 2, 0)
    return result


def _rows(J: Jacobian, chunk_size: int | Literal["auto"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features and their rows (mode "vjp") or columns ("jvp") of J, of shape (m, B, D)."""
    x, notes = J.x, list[str]()
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

    J.check_samples_alone()
    for first, _, taken in Chunks(draw, J.products, chunk, notes).run(num_features):
        features = torch.arange(first, first + len(taken), device=x.device)
        yield features, taken.reshape(len(taken), len(x), num_features)
    warn_of_forward_mode(J, "; ".join(J.notes + notes))
