"""The evaluation of a checkpoint: bits/dim and sample quality of its covariances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ocm.checkpoints.catalogue import CovarianceSettings, build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.fitting import fitted
from ocm.checkpoints.held_back import held_back
from ocm.checkpoints.unfinished import NOT_KEPT, Parts
from ocm.covariances.names import CALIBRATED, has_density, named
from ocm.data import Images
from ocm.diffusion.tables import Table
from ocm.evaluation import classifier as classifiers
from ocm.evaluation import features
from ocm.evaluation.by_ode import ode_bits_per_dim
from ocm.evaluation.distances import frechet_caution
from ocm.evaluation.markdown import likelihood_markdown, quality_markdown
from ocm.evaluation.samples import Quality, draw, median_distance, quality
from ocm.evaluation.scores import likelihood_record, likelihood_table, steps_of
from ocm.progress import tracked
from ocm.sampling.likelihood import Decoder
from ocm.sampling.samplers import Sampler, ddim, ddpm

# Samples are drawn by each.
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": partial(ddim, eta=0.0)}


@dataclass(frozen=True)
class EvaluationSettings:
    """What is scored, and on how much.

    Attributes:
        names: Covariances, by name.
        step_counts: Numbers of reverse steps K.
        calibrated: Whether every covariance is scored calibrated too.
        quality: Whether samples are drawn by DDPM and DDIM and compared with images.
        quality_names: The covariances that they are drawn with; None for all.
        num_images: Held-out images to score.
        fit_images: Training images that calibrations are fitted to.
        num_samples: Samples for each figure of quality.
        inception: Inception weights of torch-fidelity for the features; None trains a classifier
            on the labelled data.
        covariances: Settings of the covariances.
        decoder: As in :func:`ocm.bits_per_dim`.
        by_ode: Whether bits/dim by the probability-flow ODE stand beside the bounds.
        tolerance: Of the ODE, in bits/dim for an image.
        seed: Seed of all randomness.
        batch_size: Images at a time.
    """

    names: Sequence[str]
    step_counts: Sequence[int] = (5, 10, 25)
    calibrated: bool = False
    quality: bool = False
    quality_names: Sequence[str] | None = None
    num_images: int = 64
    fit_images: int = 256
    num_samples: int = 256
    inception: Path | None = None
    covariances: CovarianceSettings = field(default_factory=CovarianceSettings)
    decoder: Decoder = "stated"
    by_ode: bool = False
    tolerance: float = 0.02
    seed: int = 0
    batch_size: int = 128

    @property
    def scored(self) -> list[str]:
        """Those of the names that have a density."""
        return [name for name in self.names if has_density(name)]

    @property
    def drawn(self) -> list[str]:
        """What samples are drawn with, calibrated or not."""
        if not self.quality:
            return []
        plain = [*(self.names if self.quality_names is None else self.quality_names)]
        again = [name for name in plain if has_density(name)] if self.calibrated else []
        return plain + [name + CALIBRATED for name in again]

    @property
    def num_features(self) -> int:
        """Of the network that distances are taken in."""
        return classifiers.NUM_FEATURES if self.inception is None else features.INCEPTION_FEATURES


def evaluate(
    checkpoint: Checkpoint,
    images: Images,
    settings: EvaluationSettings,
    out: Path,
    *,
    parts: Parts = NOT_KEPT,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """Score covariances on held-out images.

    Analytic variances and calibrations are fitted on training images where the checkpoint lacks
    them for the timesteps in use.

    Args:
        checkpoint: What to score.
        images: Its data set.
        settings: What is scored, and on how much.
        out: Whose folder ``classifier`` gets the classifier that is trained for features.
        parts: Where everything is kept once it is found, and taken from.
        progress: Whether to show progress bars.

    Returns:
        All figures as JSON values, and their tables in Markdown.

    Raises:
        ValueError: If there is nothing to score, or the data have too few images or no labels for
            what is asked.
    """
    check(checkpoint, images, settings)
    extractor, said = None, ""
    if settings.quality:
        extractor, said = _features(images, settings, out, parts, progress)
    checkpoint = _fitted(checkpoint, images, settings, parts, progress)
    scored = settings.scored
    table = likelihood_table(
        checkpoint,
        images.test[: settings.num_images],
        scored,
        settings.step_counts,
        calibrated=scored if settings.calibrated else (),
        labels=images.test_labels if checkpoint.denoiser.takes_labels else None,
        settings=settings.covariances,
        decoder=settings.decoder,
        seed=settings.seed,
        batch_size=settings.batch_size,
        parts=parts,
        progress=progress,
    )
    record: dict[str, Any] = likelihood_record(table) | {
        "data": images.name,
        "num_images": settings.num_images,
        "num_probes": settings.covariances.num_probes,
        "lanczos_probes": settings.covariances.lanczos_probes,
        "fit_images": settings.fit_images,
        "decoder": settings.decoder,
        "seed": settings.seed,
        "step_counts": list(settings.step_counts),
    }
    sections = []
    if scored:
        sections.append(
            f"Bits/dim on {settings.num_images} held-out images of {images.name}, ± the standard "
            f"error over images\n\n{likelihood_markdown(table, settings.step_counts)}"
        )
    if settings.by_ode:
        by_ode = partial(
            ode_bits_per_dim,
            checkpoint,
            images.test[: settings.num_images],
            labels=images.test_labels if checkpoint.denoiser.takes_labels else None,
            tolerance=settings.tolerance,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=progress,
        )
        part, more = parts.json("ode", by_ode)
        record |= part
        sections += more
    if extractor is not None:
        part, more = _quality(checkpoint, images, settings, extractor, said, parts, progress)
        record |= part
        sections += more
    return record, "\n\n".join(sections)


def check(checkpoint: Checkpoint, images: Images, settings: EvaluationSettings) -> None:
    """Raise unless there is something to score, and what it needs.

    Raises:
        ValueError: If there is not.
    """
    if settings.num_images > len(images.test):
        raise ValueError(
            f"num_images must be at most {len(images.test)}, the held-out images of "
            f"{images.name}, got {settings.num_images}"
        )
    if not settings.scored and not settings.quality and not settings.by_ode:
        raise ValueError(
            f"covariance {' '.join(settings.names)} has no density, and so no bits/dim; ask for "
            "quality"
        )
    for name in settings.names:
        if name not in named("fitted"):
            build_covariance(name, checkpoint, settings.covariances)  # raises without its head
    if settings.quality and settings.inception is None and images.train_labels is None:
        raise ValueError(
            f"quality needs labels to train a classifier on, and {images.name} has none; give "
            "inception, the weights of torch-fidelity"
        )


def lacking(checkpoint: Checkpoint, settings: EvaluationSettings) -> tuple[list[str], list[str]]:
    """Return what must be fitted for these numbers of steps: analytic variances, calibrations."""
    steps = steps_of(checkpoint.denoiser.schedule, settings.step_counts)

    def lacks(table: Table | None) -> bool:
        return table is None or not table.covers(steps)

    analytic = {name: c.scaled_variances for name, c in checkpoint.analytic.items()}
    wanted = [n for n in settings.names if n in named("fitted") and lacks(analytic.get(n))]
    to_calibrate = [n for n in settings.scored if lacks(checkpoint.calibrations.get(n))]
    return wanted, to_calibrate if settings.calibrated else []


def _fitted(
    checkpoint: Checkpoint,
    images: Images,
    settings: EvaluationSettings,
    parts: Parts,
    progress: bool,
) -> Checkpoint:
    """Fit to training images what the checkpoint lacks for these numbers of steps."""
    x0, labels = held_back(checkpoint, images, settings.fit_images)
    wanted, to_calibrate = lacking(checkpoint, settings)
    return fitted(
        checkpoint,
        x0,
        wanted,
        steps_of(checkpoint.denoiser.schedule, settings.step_counts),
        calibrated=to_calibrate,
        labels=labels,
        settings=settings.covariances,
        seed=settings.seed,
        parts=parts,
        progress=progress,
    )


def _quality(
    checkpoint: Checkpoint,
    images: Images,
    settings: EvaluationSettings,
    extractor: features.FeatureExtractor,
    said: str,
    parts: Parts,
    progress: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Return the record and the tables of sample quality under DDPM and DDIM."""
    real = extractor(images.train)
    floor = quality(real, extractor(images.test))
    caution = frechet_caution(
        min(len(real), len(images.test)), settings.num_samples, extractor.num_features
    )
    record: dict[str, Any] = {
        "features": extractor.name,
        "num_samples": settings.num_samples,
        "num_real": len(real),
        "mmd_bandwidth": median_distance(real),
        "held_out": floor._asdict() | {"num_images": len(images.test)},
        "frechet_caution": caution,
        "quality": {},
    }
    sections = [
        f"{said} {settings.num_samples} samples a cell are compared with {len(real)} training "
        f"images; {len(images.test)} held-out images are at a Fréchet distance of "
        f"{floor.frechet:.3f}."
    ]
    if caution is not None:
        sections.append(f"Caution: {caution}.")
    classes = checkpoint.denoiser.num_classes

    def cell(sampler: Sampler, name: str, K: int) -> Quality:
        samples = draw(
            checkpoint,
            name,
            settings.num_samples,
            K,
            sampler=sampler,
            settings=settings.covariances,
            labels=None if classes is None else range(classes),  # which take turns
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
        return quality(real, extractor(samples))

    rows = settings.drawn
    for title, sampler in SAMPLERS.items():
        table: dict[str, dict[int, Quality]] = {name: {} for name in rows}
        cells = [(name, K) for name in rows for K in settings.step_counts]
        for name, K in tracked(cells, f"samples of {title}", "cells", shown=progress):
            found = parts.json(f"{title} {name} {K}", partial(cell, sampler, name, K))
            table[name][K] = Quality(*found)
        record["quality"][title] = {
            name: {K: cell._asdict() for K, cell in row.items()} for name, row in table.items()
        }
        sections.append(
            f"Fréchet distance of {title.upper()} samples (precision, recall)\n\n"
            f"{quality_markdown(table, settings.step_counts)}"
        )
    return record, sections


def _features(
    images: Images, settings: EvaluationSettings, out: Path, parts: Parts, progress: bool
) -> tuple[features.FeatureExtractor, str]:
    """Return the features of quality, and a sentence on what they are."""
    if settings.inception is not None:
        extractor = features.inception(settings.inception)
        return extractor, f"Features: {extractor.name}."
    labels, num_classes = images.train_labels, images.num_classes
    assert labels is not None  # check saw to it
    assert num_classes is not None

    def train() -> str:
        trained = classifiers.train_classifier(
            images.train, labels, num_classes, seed=settings.seed, progress=progress
        )
        classifiers.save(trained, out / "classifier")
        return trained.description

    parts.json("classifier", train)
    trained = classifiers.load(out / "classifier")
    said = "a classifier trained on the same training images"
    if images.test_labels is not None:
        right = classifiers.accuracy(trained, images.test, images.test_labels)
        said += f", right on {right:.1%} of the held-out ones"
    extractor = features.classifier_features(trained)
    return extractor, f"Features: {extractor.name}, {said}."
