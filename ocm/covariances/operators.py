"""The covariance of x0 given x_t as a linear operator, for samplers, bounds and inverse problems.

Each is C = F^T diag(lambda) F in an orthonormal basis F: the pixels themselves for a diagonal
covariance, cosines, the eigenvectors of a matrix or of its blocks. So everything is a function of
the eigenvalues::

    product    C v     = F^T (lambda * F v)         noise  C^(1/2) z = F^T (sqrt(lambda) * F z)
    solve      C^-1 v  = F^T (F v / lambda)         log det C        = sum log lambda

and the families are closed under C -> a C + b I. The reverse step of a sampler, a calibration and
the C + sigma^2 I of an inverse problem are all of that form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

import hessdiag
from ocm.diffusion.checks import check_range
from ocm.diffusion.schedules import full_precision


class PosteriorCovariance(Protocol):
    """Cov[x0 | x_t] for every sample of a batch; v and z have the shape of x_t.

    Covariances return one from ``at``. Where eigenvectors are known it is a
    :class:`ocm.SpectralCovariance`; a class of your own gives all eight methods. Those that need
    what is not known may raise: samplers call ``bounded``, ``affine``, ``clamped`` and ``noise``,
    inverse problems ``multiply`` and ``noise``, densities take a spectral one.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> C = ocm.Exact(denoiser).at(denoiser.predict(torch.ones(1, 1, 2, 2), 500))
        >>> noisy = C.affine(1.0, 0.5)    # C + 0.5 I
        >>> noisy.diagonal().flatten(), noisy.log_determinant().abs().round(decimals=3)
        (tensor([1., 1., 1., 1.]), tensor([0.]))
    """

    def diagonal(self) -> Tensor:
        """Return the variance of each dimension, of the shape of x_t or broadcast to it."""
        ...

    def multiply(self, v: Tensor) -> Tensor:
        """Return C v."""
        ...

    def solve(self, v: Tensor) -> Tensor:
        """Return C^-1 v."""
        ...

    def noise(self, z: Tensor) -> Tensor:
        """Return C^(1/2) z, of covariance C for standard normal z."""
        ...

    def log_determinant(self) -> Tensor:
        """Return log det C, shape (B,)."""
        ...

    def affine(self, scale: float, shift: float) -> PosteriorCovariance:
        """Return scale C + shift I."""
        ...

    def clamped(self, low: float, high: float) -> PosteriorCovariance:
        """Return C with its eigenvalues clamped."""
        ...

    def bounded(self, x0_range: tuple[float, float] | None) -> PosteriorCovariance:
        """Return what data in ``x0_range`` allow of C.

        No eigenvalue is negative, and no variance of a dimension above ((high - low) / 2)^2. None
        stands for data without bounds.
        """
        ...


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """An orthonormal basis F of each sample.

    Attributes:
        analyse: v -> F v, from the shape of x_t to that of the eigenvalues.
        synthesise: F^T, back.
        diagonal: Eigenvalues -> sum_k F_ki^2 lambda_k, the variance of each dimension i.
        rescaled: From (eigenvalues, s) to S C S with S = diag(s), s of the shape of x_t; a
            covariance of the same family. None where the family is not closed under it.
    """

    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]
    diagonal: Callable[[Tensor], Tensor]
    rescaled: Callable[[Tensor, Tensor], SpectralCovariance] | None = None


# The basis of the dimensions themselves.
PIXELS = Eigenbasis(lambda v: v, lambda v: v, lambda eigenvalues: eigenvalues)


@dataclass(frozen=True, eq=False)
class SpectralCovariance:
    """C = F^T diag(lambda) F.

    Attributes:
        eigenvalues: Lambda, in the layout of ``basis``; for ``PIXELS`` the variance of each
            dimension, which may broadcast to ``shape``.
        shape: The shape (B, ...) of x_t.
        basis: The basis F.

    Raises:
        ValueError: By its methods, if a vector is of another shape, or bounds are not in order.

    Example:
        >>> import torch, ocm
        >>> C = ocm.SpectralCovariance(torch.tensor([[1.0, 4.0]]), torch.Size([1, 2]))
        >>> C.noise(torch.ones(1, 2)), C.affine(2.0, 1.0).diagonal(), C.log_determinant()
        (tensor([[1., 2.]]), tensor([[3., 9.]]), tensor([1.3863]))
    """

    eigenvalues: Tensor
    shape: torch.Size
    basis: Eigenbasis = PIXELS

    def diagonal(self) -> Tensor:
        """Return the variance of each dimension."""
        return self.basis.diagonal(self.eigenvalues)

    def multiply(self, v: Tensor) -> Tensor:
        """Return C v."""
        return self._filtered(self.eigenvalues, v)

    def solve(self, v: Tensor) -> Tensor:
        """Return C^-1 v; infinite where an eigenvalue is zero."""
        return self._filtered(1.0 / self.eigenvalues, v)

    def noise(self, z: Tensor) -> Tensor:
        """Return C^(1/2) z; NaN where an eigenvalue is negative."""
        return self._filtered(self.eigenvalues.sqrt(), z)

    def log_determinant(self) -> Tensor:
        """Return log det C, shape (B,)."""
        per_entry = self.shape.numel() // max(1, self.shape[0])
        logs = self.eigenvalues.log()
        if self.basis is PIXELS:
            logs = logs.expand(self.shape)
        return logs.reshape(self.shape[0], per_entry).sum(dim=1)

    def affine(self, scale: float, shift: float) -> SpectralCovariance:
        """Return scale C + shift I."""
        return replace(self, eigenvalues=scale * self.eigenvalues + shift)

    def clamped(self, low: float, high: float) -> SpectralCovariance:
        """Return C with its eigenvalues clamped.

        Raises:
            ValueError: If the bounds are not in order.
        """
        check_range("bounds of the eigenvalues", (low, high))
        return replace(self, eigenvalues=self.eigenvalues.clamp(low, high))

    def bounded(self, x0_range: tuple[float, float] | None) -> SpectralCovariance:
        """Return C clamped to what data in ``x0_range`` allow.

        Negative eigenvalues become 0. A variance above the bound of its dimension is brought down
        to it by S C S with diagonal S, which keeps correlations; in a basis that does not allow
        this (cosines) the whole sample is scaled down.
        """
        bound = variance_bound(x0_range)
        if self.basis is PIXELS or bound == torch.inf:
            return self.clamped(0.0, bound)
        # An infinite eigenvalue would leave NaN below.
        positive = self.clamped(0.0, torch.finfo(self.eigenvalues.dtype).max ** 0.5)
        variances = positive.diagonal()
        if self.basis.rescaled is not None:
            if bool((variances <= bound).all()):
                return positive
            scale = (bound / variances.clamp(min=bound)).sqrt()
            # Again, since the eigenvalues of the product may be negative by rounding.
            return self.basis.rescaled(positive.eigenvalues, scale).clamped(0.0, torch.inf)
        largest = variances.flatten(1).amax(dim=1).clamp(min=bound)
        factor = (bound / largest).reshape(-1, *[1] * (positive.eigenvalues.dim() - 1))
        return replace(positive, eigenvalues=positive.eigenvalues * factor)

    def _filtered(self, weights: Tensor, v: Tensor) -> Tensor:
        # One sample of C may serve all of v; but what broadcasts in any other way is a mistake.
        if not isinstance(v, Tensor) or not (
            v.shape[1:] == self.shape[1:] and v.dim() > 0 and self.shape[0] in (1, len(v))
        ):
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(
                f"a vector must have the shape of the covariance, {tuple(self.shape)}, got {got}"
            )
        return self.basis.synthesise(weights * self.basis.analyse(v))


def spectral(covariance: PosteriorCovariance) -> SpectralCovariance:
    """Return the covariance if its eigenvalues are known, as every density needs.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(covariance, SpectralCovariance):
        raise TypeError(
            f"covariance must have a density, and {type(covariance).__name__} has none: its draws "
            "are known through products alone"
        )
    return covariance


def variance_bound(x0_range: tuple[float, float] | None) -> float:
    """Return ((high - low) / 2)^2, the largest variance of a number in ``x0_range``.

    None stands for data without bounds, whose variance may be infinite.

    Raises:
        TypeError: If it is no pair.
        ValueError: If it is not in order.

    Example:
        >>> variance_bound((-1.0, 1.0))
        1.0
    """
    check_range("x0_range", x0_range)
    low, high = (-torch.inf, torch.inf) if x0_range is None else x0_range
    return ((high - low) / 2.0) ** 2


def diagonal(variance: Tensor, shape: torch.Size) -> SpectralCovariance:
    """Return the diagonal covariance of the given variances, which broadcast to ``shape``.

    Raises:
        ValueError: If they do not.
    """
    # From the last dimension on, each is 1 or that of the shape.
    pairs = zip(reversed(variance.shape), reversed(shape), strict=False)
    if variance.dim() > len(shape) or any(own not in (1, full) for own, full in pairs):
        raise ValueError(
            f"variances must broadcast to shape {tuple(shape)}, got {tuple(variance.shape)}"
        )
    return SpectralCovariance(variance, shape)


def full(matrix: Tensor, shape: torch.Size) -> SpectralCovariance:
    """Return the covariance of a symmetric matrix for each sample, by its eigenvectors.

    Args:
        matrix: Shape (B, D, D); only its symmetric part counts.
        shape: (B, ...), D features a sample.

    Raises:
        ValueError: If the matrix is of another shape, or has no eigenvalues.

    Example:
        >>> C = full(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.Size([1, 2]))
        >>> C.multiply(torch.tensor([[1.0, 0.0]])).round(decimals=4)
        tensor([[2., 1.]])
    """
    features = shape[1:].numel()
    if matrix.shape != (shape[0], features, features):
        raise ValueError(
            f"matrix must have shape {(shape[0], features, features)}, got {tuple(matrix.shape)}"
        )
    return _blocks(
        matrix[:, None],
        shape,
        lambda v: v.flatten(1)[:, None],
        lambda b: b.reshape(len(b), *shape[1:]),
    )


def channel_blocks(matrices: Tensor, shape: torch.Size) -> SpectralCovariance:
    """Return the covariance of independent pixels, each with a matrix over its channels.

    Args:
        matrices: Shape (B, positions, C, C), positions in order.
        shape: (B, C, ...).
    """
    return _blocks(
        matrices, shape, lambda v: v.flatten(2).mT, lambda b: b.mT.reshape(len(b), *shape[1:])
    )


def _blocks(
    matrices: Tensor,
    shape: torch.Size,
    to_blocks: Callable[[Tensor], Tensor],
    from_blocks: Callable[[Tensor], Tensor],
) -> SpectralCovariance:
    """Return the covariance of matrices (B, L, k, k), for maps (B, ...) to (B, L, k) and back."""
    matrices = full_precision(matrices)
    values, vectors = eigenvectors_of((matrices + matrices.mT) / 2)

    def rescaled(eigenvalues: Tensor, scale: Tensor) -> SpectralCovariance:
        s = to_blocks(scale)
        matrix = (vectors * eigenvalues[..., None, :]) @ vectors.mT
        scaled = s[..., None] * matrix * s[..., None, :]
        return _blocks(scaled, shape, to_blocks, from_blocks)

    def times(matrix: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(matrix.dtype, b.dtype)
        return (matrix.to(dtype) @ b.to(dtype)[..., None])[..., 0]

    basis = Eigenbasis(
        analyse=lambda v: times(vectors.mT, to_blocks(v)),
        synthesise=lambda b: from_blocks(times(vectors, b)),
        diagonal=lambda b: from_blocks(times(vectors.square(), b)),
        rescaled=rescaled,
    )
    return SpectralCovariance(values, shape, basis)


def eigenvectors_of(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric matrices.

    Raises:
        ValueError: If PyTorch does not find those of a matrix that holds NaN.

    Example:
        >>> eigenvectors_of(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))[0]
        tensor([[1., 3.]])
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except RuntimeError as error:
        if bool(torch.isfinite(matrices).all()):
            raise
        raise ValueError(
            "covariance must be finite to have eigenvalues; does the denoiser return NaN?"
        ) from error
    return values, vectors


def cosine_diagonal(eigenvalues: Tensor, shape: torch.Size) -> SpectralCovariance:
    """Return the covariance that is diagonal in the orthonormal cosine transform of the images.

    Args:
        eigenvalues: Variance of each coefficient, of ``shape``.
        shape: (B, ..., H, W); the transform runs along the last two axes.

    Example:
        >>> C = cosine_diagonal(torch.ones(1, 1, 4, 4), torch.Size([1, 1, 4, 4]))
        >>> bool((C.diagonal() - 1).abs().max() < 1e-6)
        True
    """
    cosines = hessdiag.dct()

    def diagonal(values: Tensor) -> Tensor:
        # F along each axis, whose squares weight the eigenvalues.
        identities = (torch.eye(n, dtype=values.dtype, device=values.device) for n in shape[-2:])
        F_rows, F_columns = map(hessdiag.dct(1).synthesise, identities)
        return F_rows.square().T @ values @ F_columns.square()

    basis = Eigenbasis(cosines.analyse, cosines.synthesise, diagonal)
    return SpectralCovariance(eigenvalues, shape, basis)
