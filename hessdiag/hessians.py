"""The Hessian diagonal of a function of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hessdiag.choosing import ProbeName
from hessdiag.compat import NotDifferentiableError
from hessdiag.estimate import DiagonalEstimate, estimate
from hessdiag.jacobian import Jacobian, Ways
from hessdiag.kernels.philox import Seed
from hessdiag.probes import ProbeDesign

if TYPE_CHECKING:
    from typing_extensions import Unpack


def hessian_diagonal(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
    seed: Seed = 0,
    sample_offset: int = 0,
    probe_offset: int = 0,
    **ways: Unpack[Ways],
) -> DiagonalEstimate:
    """Estimate the diagonal of the Hessian of a scalar function, for each sample of a batch.

    It is :func:`hessdiag.estimate` of the gradient of f: reverse over reverse mode, or with
    ``mode="jvp"`` forward over reverse, which keeps fewer activations.

    Args:
        f: Maps (B, ...) to one number for each sample, shape (B,), or to their sum, shape ().
        x: Where the Hessian is taken, shape (B, ...).
        max_probes: Most probes for a sample; D of them or more with ``probes="auto"`` are exact.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`.
        atol: As in :func:`hessdiag.estimate`.
        chunk_size: Probes held in memory at a time.
        seed: Seed of the probes.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
        ways: As in :func:`hessdiag.estimate`.

    Returns:
        A :class:`DiagonalEstimate`, whose ``diagonal`` and ``stderr`` have the shape of x.

    Raises:
        TypeError: As :func:`hessdiag.estimate`.
        ValueError: As :func:`hessdiag.estimate`, or if f returns another shape.

    Example:
        >>> import torch, hessdiag
        >>> energy = lambda x: x.pow(3).sum(dim=1)
        >>> result = hessdiag.hessian_diagonal(energy, torch.ones(1, 2), max_probes=1)
        >>> result.diagonal
        tensor([[6., 6.]])
    """

    def total(point: Tensor) -> Tensor:
        value = f(point)
        if not isinstance(value, Tensor):
            raise TypeError(f"f must return a torch.Tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"f must return real numbers, got {value.dtype}")
        if value.shape not in ((), (len(point),)):
            raise ValueError(
                f"f must return one number for each sample, shape ({len(point)},), or their sum, "
                f"shape (), got {tuple(value.shape)}"
            )
        if not value.requires_grad:
            raise NotDifferentiableError(
                "the value of f does not depend on x; is it computed under torch.no_grad() or "
                "detached?"
            )
        return value.sum()

    # A gradient that does not depend on x is that of a linear function.
    J = Jacobian(torch.func.grad(total), x, may_be_constant=True, **ways)
    return estimate(
        J,
        max_probes=max_probes,
        probes=probes,
        rtol=rtol,
        atol=atol,
        chunk_size=chunk_size,
        seed=seed,
        sample_offset=sample_offset,
        probe_offset=probe_offset,
    )
