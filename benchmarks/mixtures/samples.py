"""How far samples of few steps are from a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mixtures.mixture import Mixture
from ocm.covariances import (
    Analytic,
    Beta,
    BetaTilde,
    Covariance,
    Exact,
    Full,
    Lanczos,
)
from ocm.diffusion.denoiser import Denoiser
from ocm.evaluation.environment import Row
from ocm.sampling.samplers import Sampler, ddim, ddpm, sample

# Of a matrix of distances that are held at a time.
_ROWS = 1000

SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": partial(ddim, eta=0.0)}


def training_free(denoiser: Denoiser, analytic: Analytic) -> dict[str, Covariance]:
    """Return the covariances that need no head, by name.

    Lanczos takes D products: with fewer it would be no covariance in the plane.
    """
    return {
        "beta": Beta(denoiser),
        "beta_tilde": BetaTilde(denoiser),
        "analytic": analytic,
        "exact": Exact(denoiser),
        "full": Full(denoiser),
        "lanczos": Lanczos(denoiser, 2),
    }


def discrepancies(
    denoiser: Denoiser,
    mixture: Mixture,
    covariances: Mapping[str, Covariance],
    step_counts: Sequence[int],
    *,
    num_samples: int,
    bandwidth: float,
    seed: int,
    samplers: Iterable[str] = tuple(SAMPLERS),
) -> list[Row]:
    """Return the squared MMD of samples to the mixture for every sampler, covariance and K.

    All cells of a seed start from the same noise, and their steps from t add the same noise.
    """
    rows: list[Row] = []
    shape = (num_samples, mixture.num_features)
    for name in samplers:
        for K in step_counts:
            for covariance, stated in covariances.items():
                x0 = sample(
                    denoiser,
                    stated,
                    shape,
                    K,
                    sampler=SAMPLERS[name],
                    seed=seed,
                    x0_range=None,
                )
                if not bool(torch.isfinite(x0).all()):
                    raise FloatingPointError(
                        f"samples of {covariance} are not finite under {name} with K = {K}"
                    )
                mmd = discrepancy(mixture, x0.cpu(), bandwidth)
                rows.append({"sampler": name, "covariance": covariance, "K": K, "mmd": mmd})
    return rows


def discrepancy_of_data(mixture: Mixture, num_samples: int, bandwidth: float, seed: int) -> float:
    """Return the squared MMD of as many draws of the mixture itself: chance alone."""
    x0 = mixture.sample(num_samples, seed + 1_000_000)
    return discrepancy(mixture, x0, bandwidth)


def discrepancy(mixture: Mixture, x: Tensor, bandwidth: float) -> float:
    """Return the squared MMD of samples and the mixture, without bias.

    As :func:`ocm.evaluation.distances.maximum_mean_discrepancy`, with the means over the
    mixture in closed form, so that the only chance in it is that of the samples: for k(a, b) =
    exp(-|a - b|^2 / (2 h^2)) and y ~ N(mu, S),

        E k(x, y) = |I + S / h^2|^(-1/2) exp(-(x - mu)^T (h^2 I + S)^-1 (x - mu) / 2).

    Args:
        mixture: The mixture.
        x: Samples, shape (n, d), n at least 2.
        bandwidth: h.

    Raises:
        ValueError: If shapes do not fit or the bandwidth is not positive.

    Example:
        >>> from mixtures.mixture import nine_gaussians
        >>> abs(discrepancy(nine_gaussians(), nine_gaussians().sample(2000), 1.0)) < 1e-3
        True
    """
    if x.dim() != 2 or len(x) < 2 or x.shape[1] != mixture.num_features:
        raise ValueError(
            f"x must have shape (n, {mixture.num_features}), n >= 2, got {tuple(x.shape)}"
        )
    if not 0.0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    x = x.double()
    scale = -0.5 / bandwidth**2
    total = sum(
        torch.cdist(part, x).square_().mul_(scale).exp_().sum().item() for part in x.split(_ROWS)
    )
    among_samples = (total - len(x)) / (len(x) * (len(x) - 1))  # k(a, a) = 1
    places = mixture.means.to(x.device), mixture.covariances.to(x.device)
    weights = mixture.weights.to(x.device)
    to_samples = _kernel_means(x, *places, bandwidth) @ weights
    # The difference of two components is Gaussian too, its covariance the sum of theirs.
    pairs = [
        _kernel_means(mixture.means, mu[None], (mixture.covariances + C)[:, None], bandwidth)[:, 0]
        for mu, C in zip(mixture.means, mixture.covariances, strict=True)
    ]
    among_mixture = mixture.weights @ torch.stack(pairs) @ mixture.weights
    return among_samples - 2.0 * to_samples.mean().item() + among_mixture.item()


def _kernel_means(x: Tensor, means: Tensor, covariances: Tensor, bandwidth: float) -> Tensor:
    """Return E k(x_a, y), y ~ N(mean_i, covariance_i), shape (n, number of Gaussians)."""
    widened = covariances + bandwidth**2 * torch.eye(x.shape[1]).to(x)
    apart = (x[:, None] - means)[..., None]
    exponent = -0.5 * (apart * torch.linalg.solve(widened, apart)).sum(dim=(-2, -1))
    size = (widened / bandwidth**2).logdet()
    kernel_means: Tensor = (exponent - 0.5 * size).exp()
    return kernel_means
