"""The bound beside the log-likelihood by the ODE, on the same test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

import ocm
from likelihoods.sizes import LikelihoodSize
from ocm.covariances.base import Covariance
from ocm.diffusion.denoiser import Denoiser
from ocm.evaluation.environment import Row
from ocm.evaluation.scores import estimate, likelihoods

SEED = 0


def bounds(
    denoiser: Denoiser,
    covariances: Mapping[str, Covariance],
    x0: Tensor,
    levels: int,
    size: LikelihoodSize,
) -> list[Row]:
    """Return rows of the variational bound, by covariance and number of steps K."""
    bits = likelihoods(denoiser, covariances, x0, size.step_counts, levels=levels, seed=SEED)
    return [
        _row(f"bound, {name}", values, K=K)
        for name, of_steps in bits.items()
        for K, values in of_steps.items()
    ]


def by_ode(
    denoiser: Denoiser, decoder: Covariance, x0: Tensor, levels: int, size: LikelihoodSize
) -> list[Row]:
    """Return rows of the ODE, by dequantisation.

    Args:
        denoiser: The denoiser.
        decoder: The covariance of the decoder.
        x0: Test images.
        levels: Number of grey levels.
        size: Steps and draws.
    """
    one = ocm.LikelihoodSettings(num_steps=size.num_steps, max_probes=2)
    several = replace(one, num_draws=size.num_draws)
    ways = {
        "uniform": (several, {"dequantisation": "uniform"}),
        f"uniform, {size.num_draws} draws weighted": (
            replace(several, importance_weighted=True),
            {"dequantisation": "uniform"},
        ),
        "truncated normal": (one, {"dequantisation": "truncated_normal"}),
        "decoder": (one, {"covariance": decoder}),
    }
    rows = []
    for name, (settings, options) in ways.items():
        found = ocm.log_likelihood(denoiser, x0, settings, levels=levels, seed=SEED, **options)
        probes = found.budget["probes"]
        assert isinstance(probes, Tensor)  # None is for the solver alone
        rows.append(
            _row(
                f"ODE, {name}",
                found.bits_per_dim,
                probe_standard_error=probes.square().mean().sqrt().item(),
            )
        )
    return rows


def _row(what: str, values: Tensor, **more: object) -> Row:
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(f"{what} is not finite")
    found = estimate(values)
    return {
        "what": what,
        "bits_per_dim": found.mean,
        "standard_error": found.standard_error,
        **more,
    }
