"""The full covariance by a few products: the Lanczos sampler (arXiv 2605.22723).

Noise of covariance C is C^(1/2) z = |z| V T^(1/2) e_1 to the accuracy of k products from z. The
recurrence takes C as symmetric; a learned Jacobian is so up to a few percent, and either mode alone
then mixes its antisymmetric part into the off-diagonal of T. ``symmetric=True`` takes one product
of each kind, which costs twice as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import eigenvectors_of, variance_bound
from ocm.diffusion.checks import check_positive_int, check_range
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import full_precision


@dataclass(frozen=True)
class Lanczos(Covariance):
    """The full Cov[x0 | x_t] through k products for every vector it is applied to.

    C^(1/2) z = ‖z‖ V T^(1/2) e_1, with V and T of k steps of Lanczos from z (arXiv 2605.22723).

    Attributes:
        denoiser: Whose output is differentiated.
        num_probes: k, the products for each vector; exact from D on.
        symmetric: Whether to average J and its transpose, at two products a step of k.

    Raises:
        TypeError: If ``num_probes`` is not an int.
        ValueError: If it is below 1; by ``at``, as :class:`ocm.Exact`.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> C = ocm.Lanczos(denoiser, 2).at(denoiser.predict(torch.ones(1, 1, 2, 2), 500))
        >>> C.multiply(torch.ones(1, 1, 2, 2))
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """

    denoiser: Denoiser
    num_probes: int = 3
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_positive_int("num_probes", self.num_probes)

    def at(self, prediction: Prediction) -> LanczosCovariance:
        """Return the covariance; each use of it takes k products."""
        prediction = prediction.by(self.denoiser)
        x_t = prediction.x_t
        c, k, J = prediction.covariance_terms

        def taken(J: hessdiag.Jacobian, v: Tensor) -> Tensor:
            return full_precision(J.products(v.to(x_t)))  # eigenvectors take float32 at least

        like = full_precision(x_t)
        if not self.symmetric:
            return LanczosCovariance(lambda v: c * v + k * taken(J, v), like, self.num_probes)
        backward, forward = J.in_mode("vjp") if J.mode == "jvp" else J, J.in_mode("jvp")

        def products(v: Tensor) -> Tensor:
            return c * v + k * (taken(backward, v) + taken(forward, v)) / 2.0

        return LanczosCovariance(products, like, self.num_probes)


# From the eigenvalues of T and their weights in a draw, both (B, k), to those of the result.
Transform = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LanczosCovariance:
    """g(C), applied to vectors by the Lanczos recurrence.

    g is a chain of scalings, shifts and clamps of the eigenvalues in the order in which they were
    asked for. The draws are no Gaussian of a density one could state, so there is no likelihood
    bound.

    Attributes:
        products: v -> C v, on (1, B, ...).
        like: A tensor of the shape of x_t, float32 at least.
        num_probes: The number k of products for each vector.
        transforms: The chain g.
    """

    products: Callable[[Tensor], Tensor]
    like: Tensor
    num_probes: int
    transforms: tuple[Transform, ...] = ()

    def diagonal(self) -> Tensor:
        """Return the variance of each dimension, by the recurrence from D unit vectors."""
        return self._quadrature(lambda values: values).reshape(self.like.shape)

    def multiply(self, v: Tensor) -> Tensor:
        """Return C v, of C itself by one product."""
        if not self.transforms:
            return self.products(v[None])[0]
        return self._apply(lambda values: values, v)

    def solve(self, v: Tensor) -> Tensor:
        """Return C^-1 v."""
        return self._apply(lambda values: 1.0 / values, v)

    def noise(self, z: Tensor) -> Tensor:
        """Return C^(1/2) z."""
        return self._apply(Tensor.sqrt, z)

    def log_determinant(self) -> Tensor:
        """Return log det C, by the recurrence's quadrature from D unit vectors."""
        return self._quadrature(Tensor.log).sum(dim=1)

    def affine(self, scale: float, shift: float) -> LanczosCovariance:
        """Return scale C + shift I."""
        return self._transformed(lambda values, weights: scale * values + shift)

    def clamped(self, low: float, high: float) -> LanczosCovariance:
        """Return C with its eigenvalues clamped.

        Raises:
            ValueError: If the bounds are not in order.
        """
        check_range("bounds of the eigenvalues", (low, high))
        return self._transformed(lambda values, weights: values.clamp(low, high))

    def bounded(self, x0_range: tuple[float, float] | None) -> LanczosCovariance:
        """Return C without negative eigenvalues, its mean variance at most that of the data.

        The mean variance is that of the vector the recurrence starts from, v^T C v / v^T v, so
        that the factor is one for each vector: it brings a runaway covariance down, without being
        linear. Leave it out where products must be, in conjugate gradients say.
        """
        limit = variance_bound(x0_range)

        def bound(values: Tensor, weights: Tensor) -> Tensor:
            values = values.clamp(min=0.0)
            if limit == torch.inf:
                return values
            mean = (weights * values).sum(dim=1, keepdim=True)
            return values * (limit / mean.clamp(min=limit))

        return self._transformed(bound)

    def _transformed(self, transform: Transform) -> LanczosCovariance:
        return replace(self, transforms=(*self.transforms, transform))

    def _decomposed(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return V, the eigenvalues of the result (B, k) and the eigenvectors of T (B, k, k)."""
        V, T = hessdiag.lanczos(self.products, full_precision(start), self.num_probes)
        values, vectors = eigenvectors_of(T)
        for transform in self.transforms:
            values = transform(values, vectors[:, 0].square())
        return V, values, vectors

    def _apply(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        V, values, vectors = self._decomposed(v)
        weights = (vectors @ (function(values) * vectors[:, 0])[..., None])[..., 0]  # f(T) e_1
        norm = v.flatten(1).norm(dim=1, keepdim=True)
        per_vector = (norm * weights).T.reshape(len(V), -1, *[1] * (v.dim() - 1))
        applied: Tensor = (per_vector * V).sum(dim=0)
        return applied

    def _quadrature(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return e_i^T f(C) e_i for every dimension i, shape (B, D)."""
        entries = []
        for i in range(self.like[0].numel()):
            unit = torch.zeros_like(self.like).flatten(1)
            unit[:, i] = 1.0
            _, values, vectors = self._decomposed(unit.reshape(self.like.shape))
            entries.append((vectors[:, 0].square() * function(values)).sum(dim=1))
        return torch.stack(entries, dim=1)
