"""Mixtures of Gaussians, whose score and posterior are known: ground truth for covariances.

For x0 of component i with weight w_i, x0 ~ N(mu_i, Sigma_i), and M_i = alpha_bar Sigma_i +
beta_bar I, Bayes' rule gives

    q(x_t)          = sum_i w_i N(sqrt(alpha_bar) mu_i, M_i),
    E[x0 | x_t, i]  = mu_i + sqrt(alpha_bar) Sigma_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i) =: m_i,
    Cov[x0 | x_t, i] = beta_bar Sigma_i M_i^-1 =: S_i,

and with the responsibilities r_i = q(i | x_t) and m = sum_i r_i m_i

    E[x0 | x_t] = m,    Cov[x0 | x_t] = sum_i r_i (S_i + (m_i - m)(m_i - m)^T),
    score       = -sum_i r_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i).

No term is a small difference of large ones, so all digits are there at every noise level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessdiag.kernels import normal
from ocm.diffusion import draws
from ocm.diffusion.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of n Gaussians in d dimensions, float64.

    Attributes:
        means: mu_i, shape (n, d).
        covariances: Sigma_i, positive definite, shape (n, d, d).
        weights: w_i, positive with sum 1, shape (n,).

    Raises:
        ValueError: If the shapes do not fit, a covariance is not symmetric and positive definite,
            or the weights are not positive with sum 1.

    Example:
        >>> mixture = nine_gaussians()
        >>> x_t = torch.tensor([[0.0, 1.5]]).double()
        >>> from ocm.diffusion.schedules import linear
        >>> mixture.posterior_covariance(x_t, 200, linear()).shape
        torch.Size([1, 2, 2])
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name in ("means", "covariances", "weights"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).double())
        n, d = self.means.shape if self.means.dim() == 2 else (0, 0)
        if self.covariances.shape != (n, d, d) or self.weights.shape != (n,) or n * d == 0:
            raise ValueError(
                "means, covariances and weights must have shapes (n, d), (n, d, d) and (n,), got "
                f"{tuple(self.means.shape)}, {tuple(self.covariances.shape)} and "
                f"{tuple(self.weights.shape)}"
            )
        total = self.weights.sum().item()
        if not (bool((self.weights > 0).all()) and math.isclose(total, 1.0, rel_tol=1e-9)):
            raise ValueError(
                f"weights must be positive with sum 1, got sum {total} and least "
                f"{self.weights.min().item()}"
            )
        symmetric = torch.allclose(self.covariances, self.covariances.mT, rtol=1e-9, atol=1e-12)
        if not symmetric or not bool((torch.linalg.eigvalsh(self.covariances) > 0).all()):
            raise ValueError("covariances must be symmetric and positive definite")

    @property
    def num_features(self) -> int:
        """Number of features d of a sample."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """E[x0], shape (d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Cov[x0], shape (d, d)."""
        centred = self.means - self.mean
        within = torch.einsum("i,ijk->jk", self.weights, self.covariances)
        return within + (self.weights[:, None] * centred).mT @ centred

    @property
    def std(self) -> float:
        """Square root of the mean variance, for :class:`ocm.Parameterisation`."""
        return math.sqrt(self.covariance.diagonal().mean().item())

    def sample(self, count: int, seed: int = 0, *, sample_offset: int = 0) -> Tensor:
        """Draw x0 by the random-number contract: sample i is the same in any batch.

        Args:
            count: Number of samples.
            seed: Seed.
            sample_offset: Number of the first sample.

        Returns:
            Shape (count, d), float32.

        Example:
            >>> whole = nine_gaussians().sample(6, seed=1)
            >>> torch.equal(nine_gaussians().sample(2, seed=1, sample_offset=4), whole[4:])
            True
        """
        z = normal(
            (count, self.num_features + 1), seed, step=draws.MIXTURE, sample_offset=sample_offset
        ).double()
        # The distribution function of a normal number is uniform, and picks the component.
        uniform = torch.special.ndtr(z[:, 0])
        i = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=len(self.weights) - 1)
        factor = torch.linalg.cholesky(self.covariances)
        points: Tensor = self.means[i] + (factor[i] @ z[:, 1:, None])[..., 0]
        return points.float()

    def log_density(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return log q(x_t), shape (B,), float64; t = 0 is the data's own.

        Args:
            x_t: Shape (B, ...) with d features a sample.
            t: One timestep in 0 .. N, or an int64 tensor of shape (B,).
            schedule: The noise schedule.
        """
        log_density: Tensor = Posterior.of(self, x_t, t, schedule).log_joint.logsumexp(dim=1)
        return log_density

    def score(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return the gradient of log q(x_t), float64 of the shape of x_t."""
        return -Posterior.of(self, x_t, t, schedule).negative_score.reshape(x_t.shape)

    def posterior_mean(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return E[x0 | x_t], float64 of the shape of x_t."""
        return Posterior.of(self, x_t, t, schedule).mean.reshape(x_t.shape)

    def posterior_covariance(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return Cov[x0 | x_t], float64 of shape (B, d, d)."""
        posterior = Posterior.of(self, x_t, t, schedule)
        r, vectors = posterior.responsibilities, posterior.components.vectors
        # S_i = U diag(beta_bar lambda / (alpha_bar lambda + beta_bar)) U^T
        values = posterior.beta_bar[:, None, None] * posterior.components.values
        weighted = r[..., None] * values / posterior.marginal
        within = torch.einsum("njk,bnk,nlk->bjl", vectors, weighted, vectors)
        apart = posterior.component_means - posterior.mean[:, None]
        return within + torch.einsum("bn,bnj,bnk->bjk", r, apart, apart)


@dataclass(frozen=True, eq=False)
class Components:
    """A mixture with Sigma_i = U_i diag(lambda_i) U_i^T; on a device."""

    means: Tensor
    values: Tensor
    vectors: Tensor
    log_weights: Tensor

    @staticmethod
    def of(mixture: Mixture) -> Components:
        """Return the eigendecomposition of every component."""
        values, vectors = torch.linalg.eigh(mixture.covariances)
        return Components(mixture.means, values, vectors, mixture.weights.log())


@dataclass(frozen=True, eq=False)
class Posterior:
    """What x_t says of each component, float64.

    Attributes:
        components: The mixture.
        alpha_bar: Shape (B,) or (1,).
        beta_bar: As ``alpha_bar``.
        rotated: U_i^T (x_t - sqrt(alpha_bar) mu_i), shape (B, n, d).
        marginal: Eigenvalues of M_i, shape (B or 1, n, d).
    """

    components: Components
    alpha_bar: Tensor
    beta_bar: Tensor
    rotated: Tensor
    marginal: Tensor

    @staticmethod
    def of(mixture: Mixture, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Posterior:
        """Return what x_t at the timestep t says."""
        levels = torch.as_tensor(t).reshape(-1).cpu()
        tables = schedule.alpha_bar[levels], schedule.beta_bar[levels]
        return Posterior.at(Components.of(mixture), x_t, *tables)

    @staticmethod
    def at(components: Components, x_t: Tensor, alpha_bar: Tensor, beta_bar: Tensor) -> Posterior:
        """Return what x_t says at a noise level, or at one for every sample."""
        d = components.means.shape[1]
        x = x_t.double().flatten(1)
        if x.shape[1] != d:
            raise ValueError(f"x_t must have {d} features a sample, got {tuple(x_t.shape)}")
        apart = x[:, None] - alpha_bar.sqrt()[:, None, None] * components.means
        rotated = torch.einsum("njk,bnj->bnk", components.vectors, apart)
        marginal = alpha_bar[:, None, None] * components.values + beta_bar[:, None, None]
        return Posterior(components, alpha_bar, beta_bar, rotated, marginal)

    @cached_property
    def log_joint(self) -> Tensor:
        """Log of w_i N(x_t; sqrt(alpha_bar) mu_i, M_i), shape (B, n)."""
        exponents = self.rotated.square() / self.marginal + (2.0 * math.pi * self.marginal).log()
        return self.components.log_weights - 0.5 * exponents.sum(dim=2)

    @cached_property
    def responsibilities(self) -> Tensor:
        """Each r_i, shape (B, n)."""
        return self.log_joint.softmax(dim=1)

    @cached_property
    def negative_score(self) -> Tensor:
        """Sum of r_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i), shape (B, d)."""
        solved = self.responsibilities[..., None] * self.rotated / self.marginal
        return torch.einsum("njk,bnk->bj", self.components.vectors, solved)

    @cached_property
    def component_means(self) -> Tensor:
        """Each m_i, shape (B, n, d)."""
        gain = self.alpha_bar.sqrt()[:, None, None] * self.components.values / self.marginal
        moved = torch.einsum("njk,bnk->bnj", self.components.vectors, gain * self.rotated)
        return self.components.means + moved

    @cached_property
    def mean(self) -> Tensor:
        """The mean m, shape (B, d)."""
        return (self.responsibilities[..., None] * self.component_means).sum(dim=1)


def nine_gaussians() -> Mixture:
    """Return the nine Gaussians of the paper's slides: means {-3, 0, 3}^2, standard deviation 0.1.

    A product density: its posterior covariance is diagonal.

    Example:
        >>> nine_gaussians().covariance.round(decimals=2)
        tensor([[6.0100, 0.0000],
                [0.0000, 6.0100]], dtype=torch.float64)
    """
    places = torch.tensor([-3.0, 0.0, 3.0]).double()
    covariances = 0.01 * torch.eye(2).double().expand(9, 2, 2)
    return Mixture(torch.cartesian_prod(places, places), covariances, torch.ones(9).double() / 9.0)


def correlated_mixture() -> Mixture:
    """Return three long, rotated Gaussians whose posterior covariance is far from diagonal.

    Example:
        >>> mixture = correlated_mixture()
        >>> from ocm.diffusion.schedules import linear
        >>> x_t = linear().alpha_bar[200].sqrt() * mixture.means
        >>> C = mixture.posterior_covariance(x_t, 200, linear())
        >>> correlation = C[:, 0, 1] / (C[:, 0, 0] * C[:, 1, 1]).sqrt()
        >>> bool((correlation.abs() > 0.5).all())
        True
    """
    angles = torch.tensor([math.pi / 4, -math.pi / 5, math.pi / 3]).double()
    along = torch.stack([angles.cos(), angles.sin()], dim=1)
    across = torch.stack([-angles.sin(), angles.cos()], dim=1)
    spread = [std**2 * v[:, :, None] * v[:, None] for std, v in ((1.0, along), (0.2, across))]
    means = torch.tensor([[-2.0, -1.0], [1.5, 1.5], [2.0, -2.0]])
    return Mixture(means, spread[0] + spread[1], torch.tensor([0.4, 0.35, 0.25]).double())
