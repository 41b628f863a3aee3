"""Three checks: a score that errs, diagonal against full, and one head on another backbone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from mixtures.errors import WeightedPoints, score_error, variance_error
from mixtures.mixture import Mixture
from mixtures.samples import discrepancies, training_free
from mixtures.settings import MixtureSettings
from mixtures.trained import fitted_analytic, learned_denoiser, trained_head
from ocm.covariances import Covariance, Exact, OptimalCovarianceMatching
from ocm.covariances.learned.base import LearnedCovariance
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule
from ocm.evaluation.environment import Row


def with_weight_noise(denoiser: Denoiser, size: float, seed: int) -> Denoiser:
    """Return the denoiser with noise in its weights.

    Args:
        denoiser: Left as it is.
        size: Standard deviation of the noise, in units of that of each tensor of weights.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    backbone = copy.deepcopy(denoiser.backbone)
    with torch.no_grad():
        for weight in backbone.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += size * weight.std(correction=0) * noise
    return replace(denoiser, backbone=backbone).freeze()


def degraded_scores(
    mixture: Mixture,
    schedule: Schedule,
    good: Denoiser,
    points: Sequence[WeightedPoints],
    settings: MixtureSettings,
    seed: int,
) -> list[Row]:
    """Return the errors of score, variances and samples as the denoiser gets worse.

    Its covariances are those that need no head: what the score says itself.

    Args:
        mixture: The data.
        schedule: The noise schedule.
        good: The denoiser trained for as long as the settings say.
        points: Where errors are measured; their mean over noise levels is returned.
        settings: Sizes.
        seed: Seed of trainings, noise and samples.
    """
    device = good.device
    versions: dict[tuple[str, float], Denoiser] = {("none", 0.0): good}
    for num_steps in settings.early_steps:
        versions["training steps", num_steps] = learned_denoiser(
            mixture, schedule, settings, seed, device, num_steps
        )
    for size in settings.weight_noise:
        versions["noise in the weights", size] = with_weight_noise(good, size, seed)
    rows: list[Row] = []
    for (degradation, amount), denoiser in versions.items():
        analytic = fitted_analytic(denoiser, mixture, settings, settings.check_step_counts, seed)
        covariances = training_free(denoiser, analytic)
        row: Row = {
            # Text, by which rows of two records are told apart.
            "version": f"{degradation}, {amount:g}",
            "degradation": degradation,
            "amount": amount,
            "score_error": _mean([score_error(denoiser, mixture, at) for at in points]),
        }
        for name in ("exact", "analytic"):
            row[f"variance_error_{name}"] = _mean(_errors(covariances[name], denoiser, points))
        cells = discrepancies(
            denoiser,
            mixture,
            {name: covariances[name] for name in ("beta", "analytic", "exact", "full")},
            settings.check_step_counts,
            num_samples=settings.num_samples,
            bandwidth=settings.bandwidth,
            seed=seed,
            samplers=("ddpm",),
        )
        row |= {f"mmd_{cell['covariance']}_{cell['K']}": cell["mmd"] for cell in cells}
        rows.append(row)
    return rows


def one_head(
    mixture: Mixture,
    schedule: Schedule,
    head: LearnedCovariance,
    points: Sequence[WeightedPoints],
    settings: MixtureSettings,
    seed: int,
) -> list[Row]:
    """Return errors and samples of one OCM head under both samplers and on other backbones.

    The other backbones are one of the same training from another seed, and the head's own one with
    a little noise in its weights. On the former the head is read from its features, which mean
    other things there, and kept with its own backbone, for one evaluation more a step; a head that
    was trained on it, and its exact diagonal, show what there is to reach.

    Args:
        mixture: The data.
        schedule: The noise schedule.
        head: OCM's, with the denoiser that it was trained on.
        points: As in :func:`degraded_scores`.
        settings: Sizes.
        seed: Seed of trainings, noise and samples.
    """
    good, units = head.denoiser, head.parameterisation
    other = learned_denoiser(mixture, schedule, settings, seed + 500, good.device)
    retrained, _ = trained_head("ocm", units, other, mixture, settings, seed)
    noisy = with_weight_noise(good, settings.weight_noise[0], seed)

    def read_from(denoiser: Denoiser) -> Covariance:
        return OptimalCovarianceMatching(denoiser, head.head, units)

    cases: list[tuple[str, str, Denoiser, Covariance]] = [
        ("its own", "head", good, head),
        ("its own", "exact diagonal", good, Exact(good)),
        ("its own, with noise in the weights", "head", noisy, read_from(noisy)),
        ("of another seed", "head on features it has not seen", other, read_from(other)),
        ("of another seed", "head with its own backbone", other, head),
        ("of another seed", "head trained anew", other, retrained),
        ("of another seed", "exact diagonal", other, Exact(other)),
    ]
    rows: list[Row] = []
    for backbone, used, denoiser, covariance in cases:
        cells = discrepancies(
            denoiser,
            mixture,
            {used: covariance},
            settings.check_step_counts,
            num_samples=settings.num_samples,
            bandwidth=settings.bandwidth,
            seed=seed,
        )
        rows.append(
            {
                "backbone": backbone,
                "covariance": used,
                "variance_error": _mean(_errors(covariance, denoiser, points)),
            }
            | {f"mmd_{cell['sampler']}_{cell['K']}": cell["mmd"] for cell in cells}
        )
    return rows


def _errors(
    covariance: Covariance, denoiser: Denoiser, points: Sequence[WeightedPoints]
) -> list[float]:
    return [variance_error(covariance, denoiser, at).relative for at in points]


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean: towards t = N an error may be a million times another's."""
    return math.exp(sum(math.log(value) for value in values) / len(values))
