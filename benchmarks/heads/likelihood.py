"""Heads of every kind trained on one denoiser, and bits/dim of test images with each."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar10.parts import say
from torch import Tensor

import ocm
from heads.models import Splits
from heads.sizes import HEADS, SEED, DataSize, Size
from heads.together import Together
from ocm.covariances.base import Covariance
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.names import CALIBRATED, LEARNED
from ocm.diffusion.denoiser import Denoiser
from ocm.evaluation.environment import Row
from ocm.evaluation.scores import estimate, likelihoods
from ocm.training.loop import mean_of_last

# Images that tell the standard deviation of the data.
_TELLING = 1000
# Images that tell the variances of frequencies.
_TELLING_FREQUENCIES = 5000


def train_heads(
    seed: int, denoiser: Denoiser, images: Splits, size: Size, data: DataSize, work: Path
) -> tuple[dict[str, LearnedCovariance], float]:
    """Return the covariances of one seed, trained or restored from ``work``, and their loss."""
    std = images.train[:_TELLING].std().item()
    covariances: dict[str, LearnedCovariance] = {}
    for head in HEADS:
        if not head.papers or seed in data.papers_seeds:
            units = ocm.PAPER if head.papers else ocm.Parameterisation(round(std, 4), positive=True)
            network = ocm.make_head(denoiser, size.head_kind, seed=seed)
            options = {"levels": images.levels} if head.name == "ml" else {}
            covariances[head.key] = LEARNED[head.name](denoiser, network, units, **options)
    start = time.perf_counter()
    # Another seed than the denoiser's, whose noisy images it was fitted to.
    settings = replace(size.head, num_steps=data.head_steps, seed=SEED + 1 + seed)
    # It trains as a learned covariance does, and states none itself.
    together: Any = Together(covariances)
    losses = ocm.train_head(
        together,
        images.train,
        settings,
        directory=work / f"heads-{seed}",
        progress=False,
    )
    say(f"{work}: heads of seed {seed}, {time.perf_counter() - start:.0f} s")
    return covariances, mean_of_last(losses)


def train_frequencies(
    seed: int, denoiser: Denoiser, images: Splits, size: Size, data: DataSize, work: Path
) -> ocm.FrequencyLikelihood:
    """Return the likelihood head in cosines of colours, trained or restored from ``work``."""
    made = ocm.FrequencyLikelihood.for_images(
        denoiser,
        images.train[:_TELLING_FREQUENCIES],
        denoiser.backbone.conv_norm_out.num_channels,
        fold=2 if data.folded else 1,
        seed=seed,
    )
    covariance = replace(made, levels=images.levels)
    start = time.perf_counter()
    settings = replace(size.head, num_steps=data.head_steps, seed=SEED + 1 + seed)
    ocm.train_head(
        covariance, images.train, settings, directory=work / f"frequency-{seed}", progress=False
    )
    say(f"{work}: frequencies of seed {seed}, {time.perf_counter() - start:.0f} s")
    return covariance


def score(
    covariances: Mapping[str, Covariance],
    denoiser: Denoiser,
    images: Splits,
    size: Size,
    data: DataSize,
) -> dict[str, dict[int, Tensor]]:
    """Return bits/dim of every test image by covariance, plain and calibrated, and K."""
    held_back = images.validation[: size.num_calibration]
    calibrations = {
        name: ocm.calibrate(
            denoiser, covariance, held_back, size.calibration_levels, seed=SEED
        ).weights
        for name, covariance in covariances.items()
        if not covariance.depends_on_s
    }
    return likelihoods(
        denoiser,
        covariances,
        images.test[: data.num_scored],
        size.step_counts,
        levels=images.levels,
        calibrations=calibrations,
        seed=SEED,
    )


def compared(
    bits: Mapping[str, Mapping[int, Tensor]], seeds: Sequence[int], reference: str = "ml"
) -> list[Row]:
    """Return the mean bits/dim of each head over images and seeds, and what it is above another.

    Args:
        bits: Of every image, by "head-seed" with or without "_calibrated" behind, or by the name of
            a covariance without a head, and K.
        seeds: Of the heads.
        reference: The head that all are compared with, plain, seed by seed.

    Returns:
        Rows of covariance, calibrated, K, bits_per_dim with its standard error over images and
        the standard deviation over seeds; and above, the mean of bits/dim minus the reference's,
        with the standard error over images of this paired difference.
    """
    rows: list[Row] = []
    names = dict.fromkeys(re.sub(r"-\d+", "", name) for name in bits)
    for name in names:
        plain = name.removesuffix(CALIBRATED)
        suffix = name[len(plain) :]
        # Of those without a head there is one, which stands beside every seed.
        own = [seed for seed in seeds if f"{plain}-{seed}{suffix}" in bits]
        runs = [bits[f"{plain}-{seed}{suffix}"] for seed in own] or [bits[name]]
        for K in runs[0]:
            values = torch.stack([run[K] for run in runs])
            others = torch.stack([bits[f"{reference}-{seed}"][K] for seed in own or seeds])
            found, above = estimate(values.mean(0)), estimate(values.mean(0) - others.mean(0))
            rows.append(
                {
                    "covariance": plain,
                    "calibrated": bool(suffix),
                    "K": K,
                    "bits_per_dim": found.mean,
                    "standard_error": found.standard_error,
                    "seeds": len(own),
                    "seeds_std": values.mean(1).std().item() if len(own) > 1 else None,
                    "above": above.mean,
                    "above_standard_error": above.standard_error,
                }
            )
    return rows


def evaluate(denoiser: Denoiser, images: Splits, size: Size, data: DataSize, work: Path) -> Row:
    """Train the heads of a denoiser and score them, beside β, on test images.

    Args:
        denoiser: The trained denoiser.
        images: Its data.
        size: Everything else.
        data: What differs between data sets.
        work: Directory of the states, from which an interrupted training goes on.

    Returns:
        Rows of :func:`compared`, and the losses.
    """
    covariances: dict[str, Covariance] = {"beta": ocm.Beta(denoiser)}
    losses, schedule = {}, denoiser.schedule
    for seed in size.seeds:
        trained, losses[seed] = train_heads(seed, denoiser, images, size, data, work)
        covariances |= {
            f"{key}-{seed}": covariance
            for key, covariance in trained.items()
            # The papers' unit is infinite where x_N holds no signal.
            if not key.endswith("_papers") or schedule.has_signal(schedule.num_timesteps)
        }
    start = time.perf_counter()
    bits = score(covariances, denoiser, images, size, data)
    say(f"{work}: scored in {time.perf_counter() - start:.0f} s")
    return {"rows": compared(bits, size.seeds), "losses": losses}


def evaluate_frequencies(
    denoiser: Denoiser, images: Splits, size: Size, data: DataSize, work: Path
) -> list[Row]:
    """Train the likelihood head in cosines of colours, and score it beside the one in pixels.

    The arguments are those of :func:`evaluate`, which comes first. Returns the rows of
    :func:`compared` that are of this head.
    """
    covariances: dict[str, Covariance] = {}
    for seed in size.frequency_seeds:
        trained, _ = train_heads(seed, denoiser, images, size, data, work)
        covariances[f"ml-{seed}"] = trained["ml"]
        covariances[f"frequency-{seed}"] = train_frequencies(
            seed, denoiser, images, size, data, work
        )
    bits = score(covariances, denoiser, images, size, data)
    rows = compared(bits, size.frequency_seeds)
    return [row for row in rows if row["covariance"] == "frequency"]
