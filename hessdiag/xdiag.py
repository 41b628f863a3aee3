"""XDiag: the exchangeable estimator of a diagonal with a low-rank part taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessdiag.checks import as_int
from hessdiag.jacobian import Jacobian, ScoreFunction, Ways, as_jacobian
from hessdiag.kernels import rademacher
from hessdiag.kernels.philox import Seed, check_counter, seed_tensor
from hessdiag.matrices import exact
from hessdiag.products import Mode
from hessdiag.streaming import Chunks, chunk_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def xdiag(
    score_fn: Jacobian | ScoreFunction,
    x: Tensor | None = None,
    *,
    num_probes: int,
    symmetric: bool = False,
    seed: Seed = 0,
    sample_offset: int = 0,
    **ways: Unpack[Ways],
) -> Tensor:
    """Estimate diag(J) of each sample by XDiag (Epperly, Tropp and Webber, 2024, section 6).

    With k = num_probes / 2 Rademacher probes Omega and Q R = J Omega, it is the mean over i of::

        diag(Q_i Q_i^T J) + omega_i * ((I - Q_i Q_i^T) J omega_i),

    where Q_i spans the products of all probes but the i-th; unbiased.

    Limits: it gains only where the singular values of J fall off fast. On the U-Net of
    benchmarks/results/cpu/estimators.json its variance was 2 to 30 times that of
    :func:`hessdiag.hutchinson` with as many products. All products of a batch, D k B numbers, are
    held in memory. It needs products with J and with J^T, so ``score_fn`` must have forward-mode
    and reverse-mode derivatives, unless ``symmetric`` says that one stands for the other.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone; or a :class:`hessdiag.Jacobian`.
        x: Where the Jacobian of a function is taken, shape (B, ...).
        num_probes: Products in all, even, at least 4 and at most 2 D.
        symmetric: J is symmetric, as a Hessian is: reverse mode alone serves. For a learned score
            it is not, and the result is biased by what it lacks.
        seed: Seed of the probes.
        sample_offset: Number of the first sample.
        ways: As in :func:`hessdiag.estimate`; both modes are taken, whatever ``mode`` says.

    Returns:
        Shape of ``x``, in float32, or float64 for float64 inputs.

    Raises:
        TypeError: As :func:`hessdiag.estimate`.
        ValueError: As :func:`hessdiag.estimate`, or if ``num_probes`` is out of range.

    Example:
        A matrix of rank one, found from two probes:

        >>> import torch, hessdiag
        >>> u = torch.tensor([1.0, 2.0, 3.0])
        >>> hessdiag.xdiag(lambda x: (x @ u)[:, None] * u, torch.zeros(1, 3), num_probes=4)
        tensor([[1.0000, 4.0000, 9.0000]])
    """
    J = as_jacobian(score_fn, x, ways)
    x = J.x
    num_features = x[:1].numel()
    num_probes = as_int("num_probes", num_probes)
    if num_probes % 2 or not 4 <= num_probes <= 2 * max(2, num_features):
        raise ValueError(
            f"num_probes must be even, at least 4 and at most 2 D = {2 * num_features}, "
            f"got {num_probes}"
        )
    sample_offset = check_counter("sample_offset", sample_offset, len(x))
    dtype = torch.promote_types(x.dtype, torch.float32)
    if num_features < 2:
        return exact(J).to(dtype)  # one product; fewer directions than two probes would span
    k = num_probes // 2

    def take(mode: Mode, probes: Tensor) -> Tensor:
        """Products of (B, D, k), a probe in every column."""
        products = J.in_mode(mode).products
        stacked = probes.permute(2, 0, 1).reshape(k, *x.shape).to(x.dtype)
        chunks = Chunks(lambda m, n: stacked[m : m + n], products, chunk_of("auto", x), [])
        taken = torch.cat([part for _, _, part in chunks.run(k)])
        return taken.reshape(k, len(x), num_features).permute(1, 2, 0).to(dtype)

    signs = rademacher(
        (k, *x.shape),
        seed_tensor(seed, x.device),
        sample_offset=sample_offset,
        dtype=dtype,
        device=x.device,
    )
    omega = signs.reshape(k, len(x), num_features).permute(1, 2, 0)
    Q, R = torch.linalg.qr(take("vjp" if symmetric else "jvp", omega))
    Z = take("vjp", Q)
    # Products may depend on each other: of signs that come twice among few features, or where J has
    # fewer than k directions. What rounding makes of the rest of Q is no direction of theirs.
    eps = torch.finfo(dtype).eps
    finite = R.isfinite().flatten(1).all(dim=1)
    U, sizes, Vh = torch.linalg.svd(torch.where(finite[:, None, None], R, 0.0))
    kept = sizes > 100 * eps * sizes[:, :1]
    Q, Z = Q @ U * kept[:, None], Z @ U * kept[:, None]
    R = (sizes * kept)[..., None] * Vh
    # Q_i Q_i^T = Q (I - s_i s_i^T) Q^T, with s_i column i of the inverse of R^T, normalised; and
    # Q Q^T where the others span J omega_i too, so that it is no part of the rows of R.
    S = torch.where(kept, 1.0 / sizes, 0.0)[..., None] * Vh
    S = S / S.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    S = S * ((Vh * ~kept[..., None]).norm(dim=-2, keepdim=True) < eps**0.5)
    QS, ZS = Q @ S, Z @ S
    # (I - Q_i Q_i^T) J omega_i = Q s_i (s_i^T R e_i), as J omega_i lies in the span of Q.
    residual = QS * (S * R).sum(dim=-2, keepdim=True)
    diagonal = (Q * Z).sum(dim=-1) + (omega * residual - QS * ZS).mean(dim=-1)
    return torch.where(finite[:, None], diagonal, torch.nan).reshape(x.shape)
