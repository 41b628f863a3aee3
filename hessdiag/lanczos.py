"""The Lanczos recurrence for symmetric operators given by their products."""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.products import Products


def lanczos(products: Products, start: Tensor, num_probes: int) -> tuple[Tensor, Tensor]:
    """Run the Lanczos recurrence from one vector of each sample.

    With A symmetric and v_1 = start / ‖start‖, k products give an orthonormal V = [v_1 .. v_k] of
    the Krylov space and the tridiagonal T = V^T A V (Lanczos, 1950; with full
    reorthogonalisation), so that::

        f(A) start is close to ‖start‖ V f(T) e_1,

    exactly so from k = D on. Where the space is exhausted earlier, the rest of V is zero and the
    rest of T is cut off from its beginning.

    Args:
        products: From (1, B, ...) to A v of the same shape, a product for each sample.
        start: Shape (B, ...).
        num_probes: k, at least 1; the products are taken one after the other.

    Returns:
        V of shape (k, B, ...) and T of shape (B, k, k).

    Raises:
        TypeError: If ``num_probes`` is not an int, or ``start`` no floating-point tensor.
        ValueError: If it is below 1, or products are of another shape.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> V, T = hessdiag.lanczos(lambda v: v @ A, torch.tensor([[1.0, 0.0]]), 2)
        >>> T
        tensor([[[2., 1.],
                 [1., 3.]]])
    """
    check_positive_int("num_probes", num_probes)
    if not isinstance(start, Tensor) or not start.is_floating_point() or start.dim() < 1:
        got = type(start).__name__
        if isinstance(start, Tensor):
            got = f"{start.dtype} of shape {tuple(start.shape)}"
        raise TypeError(f"start must be a floating-point tensor of shape (B, ...), got {got}")
    batch, tiny = len(start), torch.finfo(start.dtype).eps
    v = start.reshape(batch, start.shape[1:].numel())
    v = v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
    basis = v[:, None]  # (B, j, D)
    T = start.new_zeros(batch, num_probes, num_probes)
    exhausted = torch.zeros(batch, dtype=torch.bool, device=start.device)
    for j in range(num_probes):
        taken = products(basis[:, j].reshape(1, *start.shape))
        if not isinstance(taken, Tensor) or taken.shape != (1, *start.shape):
            made = tuple(taken.shape) if isinstance(taken, Tensor) else type(taken).__name__
            raise ValueError(f"products must return shape {(1, *start.shape)}, got {made}")
        w = taken.to(start.dtype).reshape(v.shape)
        size = w.norm(dim=1)
        alpha = (basis[:, j] * w).sum(dim=1)
        # A diagonal entry that f may take, where nothing is left to learn.
        T[:, j, j] = torch.where(exhausted, T[:, 0, 0], alpha) if j else alpha
        if j + 1 == num_probes:
            break
        for _ in range(2):  # twice is enough for orthogonality to rounding
            w = w - ((basis @ w[..., None]).mT @ basis)[:, 0]
        beta = w.norm(dim=1)
        exhausted = exhausted | (beta <= 100 * tiny * size.clamp(min=T[:, 0, 0].abs()))
        beta = torch.where(exhausted, 0.0, beta)
        T[:, j, j + 1] = T[:, j + 1, j] = beta
        following = torch.where(exhausted[:, None], 0.0, w / beta.clamp(min=tiny**2)[:, None])
        basis = torch.cat([basis, following[:, None]], dim=1)
    return basis.transpose(0, 1).reshape(num_probes, *start.shape), T
