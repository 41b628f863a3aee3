"""How far samples of few steps are from a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

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
from ocm.mixtures.mixture import Mixture
from ocm.sampling.samplers import Sampler, ddim, ddpm, sample

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
                discrepancy = mixture.maximum_mean_discrepancy(x0.cpu(), bandwidth)
                rows.append({"sampler": name, "covariance": covariance, "K": K, "mmd": discrepancy})
    return rows


def discrepancy_of_data(mixture: Mixture, num_samples: int, bandwidth: float, seed: int) -> float:
    """Return the squared MMD of as many draws of the mixture itself: chance alone."""
    x0 = mixture.sample(num_samples, seed + 1_000_000)
    return mixture.maximum_mean_discrepancy(x0, bandwidth)
