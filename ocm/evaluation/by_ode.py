"""Bits/dim of a checkpoint by the probability-flow ODE, beside the bounds of its covariances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.noise import labelled
from ocm.evaluation.scores import estimate
from ocm.likelihoods.budget import likelihood_settings
from ocm.likelihoods.log_likelihood import log_likelihood
from ocm.progress import tracked

# Images that settings are measured on.
_PILOTS = 4


def ode_bits_per_dim(
    checkpoint: Checkpoint,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    tolerance: float = 0.02,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return bits/dim by the ODE as JSON values, and a sentence of Markdown.

    With uniform dequantisation, and settings by :func:`ocm.likelihood_settings` on the first four
    images.

    Args:
        checkpoint: The denoiser and its number of grey levels.
        images: Held-out images in [-1, 1], on the grid of the levels.
        labels: Class of each image, for a denoiser that takes them.
        tolerance: For each image, in bits/dim.
        seed: Of probes and dequantisation noise.
        batch_size: Images at a time.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the tolerance cannot be reached.
    """
    denoiser, levels = checkpoint.denoiser, checkpoint.levels
    few = images[:_PILOTS].to(denoiser.device)
    condition = labelled(denoiser, labels, 0, len(few))
    settings = likelihood_settings(
        denoiser, few, tolerance, levels=levels, condition=condition, seed=seed
    )
    parts: list[Tensor] = []
    stated: dict[str, list[Tensor]] = {"probes": [], "dequantisation": []}
    starts = range(0, len(images), batch_size)
    for first in tracked(starts, "log-likelihood", "batches", shown=progress):
        batch = images[first : first + batch_size].to(denoiser.device)
        found = log_likelihood(
            denoiser,
            batch,
            settings,
            levels=levels,
            condition=labelled(denoiser, labels, first, len(batch)),
            seed=seed,
            sample_offset=first,
        )
        parts.append(found.bits_per_dim)
        for name, errors in stated.items():
            part = found.budget[name]
            assert part is not None  # None is for a solver that nobody measured
            errors.append(part)
    mean = estimate(torch.cat(parts))
    solver = found.budget["solver"]
    assert solver is not None  # as above: settings were measured
    budget = {
        "solver": solver.item(),
        **{k: torch.cat(v).square().mean().sqrt().item() for k, v in stated.items()},
    }
    record = {
        "ode": {
            "bits_per_dim": mean.mean,
            "standard_error": mean.standard_error,
            "tolerance": tolerance,
            "error_of_an_image": budget,
            "solver": settings.solver,
            "num_steps": settings.num_steps,
            "max_probes": settings.max_probes,
            "num_draws": settings.num_draws,
            "num_evaluations": found.num_evaluations,
            "num_products": found.num_products,
        }
    }
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.3f}"
    sentence = (
        f"By the probability-flow ODE with uniform dequantisation: {mean.mean:.3f}{error} bits/dim "
        f"on the same images, by {found.num_evaluations} evaluations and {found.num_products} "
        f"products each. An image's error is {budget['solver']:.4f} by the solver, "
        f"{budget['probes']:.4f} by probes and {budget['dequantisation']:.4f} by dequantisation "
        "noise."
    )
    return record, [sentence]
