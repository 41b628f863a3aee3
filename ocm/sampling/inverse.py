"""x0 given x_t and a linear measurement of it, by any covariance: a step of an inverse problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ocm.covariances.operators import PosteriorCovariance
from ocm.diffusion.checks import check_positive_int


def posterior_mean_given_measurement(
    mean: Tensor,
    covariance: PosteriorCovariance,
    measurement: Tensor,
    operator: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor] | None = None,
    *,
    noise_std: float | Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Tensor:
    """Return E[x0 | x_t, y] for y = A x0 + noise_std n and x0 given x_t ~ N(x0_hat, C).

    x0_hat + C A^T u, (A C A^T + noise_std^2 I) u = y - A x0_hat, with u by conjugate gradients,
    so that any linear A and any covariance will do. The step of PiGDM (Song et al., 2023) and
    DiffPIR (Zhu et al., 2023) with C = r^2 I, and of TMPD (Boys et al., 2023) with the covariance
    of x0.

    Args:
        mean: x0_hat, shape (B, ...).
        covariance: C, positive semi-definite: ``bounded``, as :func:`x0_given` returns it.
        measurement: y, shape (B, ...).
        operator: A, from the shape of ``mean`` to that of ``measurement``.
        adjoint: A^T; None takes it by reverse-mode differentiation.
        noise_std: Standard deviation of the noise, a number or a tensor that broadcasts to y.
        tolerance: Norm of the residual of u, relative to that of y - A x0_hat, for each sample.
        max_iterations: Of conjugate gradients, each one A, one A^T and one product with C.

    Returns:
        Shape of ``mean``. A UserWarning says where ``max_iterations`` were not enough.

    Raises:
        ValueError: If A(0) is not 0, shapes do not fit, ``noise_std`` is negative, or C is not
            positive semi-definite.
        TypeError: If ``max_iterations`` is no int.

    Example:
        >>> from ocm.covariances.operators import diagonal
        >>> C = diagonal(torch.tensor([[1.0, 4.0]]), torch.Size([1, 2]))
        >>> y, ones = torch.tensor([[5.0]]), lambda x: x.sum(dim=1, keepdim=True)
        >>> posterior_mean_given_measurement(torch.zeros(1, 2), C, y, ones, noise_std=0.0)
        tensor([[1., 4.]])
    """
    check_positive_int("max_iterations", max_iterations)
    if not bool((torch.as_tensor(noise_std) >= 0).all()):
        raise ValueError(f"noise_std must be at least 0, got {noise_std}")
    residual = measurement - operator(mean)
    if residual.shape != measurement.shape or len(measurement) != len(mean):
        raise ValueError(
            f"measurement must have the shape of operator(mean), one for each of {len(mean)} "
            f"samples, got {tuple(measurement.shape)}"
        )
    nothing = torch.zeros_like(mean)
    transposed = _transposed(operator, nothing) if adjoint is None else adjoint
    at_zero = operator(nothing)
    if bool((at_zero != 0).any()):
        raise ValueError(
            "operator must be linear, and it maps 0 to values up to "
            f"{at_zero.abs().max().item():.3g}: take its offset off the measurement"
        )
    noise_variance = noise_std**2

    def spread(u: Tensor) -> Tensor:
        return covariance.multiply(transposed(u))

    u = _conjugate_gradients(
        lambda u: operator(spread(u)) + noise_variance * u, residual, tolerance, max_iterations
    )
    return mean + spread(u)


def _transposed(operator: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """Return A^T of a linear operator."""
    pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(operator, at)[1]
    return lambda u: pull(u)[0]


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, max_iterations: int
) -> Tensor:
    """Return u of ``multiply(u)`` = b for each sample of a batch."""

    def dot(v: Tensor, w: Tensor) -> Tensor:
        return (v * w).flatten(1).sum(dim=1).reshape(-1, *[1] * (b.dim() - 1))

    u, r, p = torch.zeros_like(b), b, b
    squared = dot(r, r)
    enough = tolerance**2 * squared
    for _ in range(max_iterations):
        searching = squared > enough
        if not bool(searching.any()):
            return u
        product = multiply(p)
        curvature = dot(p, product)
        if bool((searching & (curvature <= 0)).any()):
            raise ValueError(
                "covariance must be positive semi-definite, and A C A^T + noise_std^2 I positive: "
                f"it takes a value of {curvature.min().item():.3g}. Use covariance.bounded(...), "
                "and a noise_std above 0 where measurements repeat each other"
            )
        # Samples that are done stay where they are.
        step = torch.where(searching, squared / curvature, 0.0)
        u = u + step * p
        r = r - step * product
        previous, squared = squared, torch.where(searching, dot(r, r), squared)
        p = torch.where(searching, r + squared / previous * p, p)
    if bool((squared > enough).any()):
        reached = (squared / dot(b, b)).max().sqrt().item()
        warnings.warn(
            f"conjugate gradients reached a relative residual of {reached:.2g} in {max_iterations} "
            f"iterations, not {tolerance:.2g}: raise max_iterations, or noise_std",
            UserWarning,
            stacklevel=3,
        )
    return u
