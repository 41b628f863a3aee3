"""What the covariances of one schedule are worth on CIFAR-10, part by part."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import budget
from harness.timing import synchronize, time_together
from torch import Tensor

import ocm
from cifar10.parts import Parts, digest_of
from cifar10.sizes import (
    HEADS,
    LAST_NOISE,
    PLAIN,
    SAMPLED,
    SAMPLERS,
    SEED,
    Cells,
    Size,
)
from cifar10.training import data_sizes, load_images, training_images, validation_images
from ocm import checkpoints
from ocm.checkpoints.catalogue import build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances.names import CALIBRATED
from ocm.data import Images
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.tables import Table
from ocm.evaluation import classifier
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.features import FeatureExtractor, classifier_features
from ocm.evaluation.samples import draw, quality
from ocm.evaluation.scores import likelihood_table, steps_of
from ocm.sampling.samplers import ddpm, last_step_noise, reverse_step

_GRID_IMAGES = 8
# The step (s, t) whose cost is measured.
_COST_S, _COST_T = 400, 500


def feature_extractor(work: Path, data: Path, size: Size, device: torch.device) -> Row:
    """Train the classifier into ``work/classifier``, and return what its features are.

    Returns:
        Its accuracy on the test images, and how far these are from training images in its features.
    """

    def make() -> Row:
        images = load_images(data, size)
        shown = len(images.train) - size.num_validation
        assert images.train_labels is not None
        assert images.test_labels is not None
        assert images.num_classes is not None
        trained = classifier.train_classifier(
            training_images(images, size, device),
            images.train_labels[:shown],
            images.num_classes,
            num_features=size.num_features,
            num_steps=size.classifier_steps,
            seed=SEED,
            device=device,
        )
        classifier.save(trained, work / "classifier")
        extractor = classifier_features(trained)
        held_out = images.test[: size.num_real]
        floor = quality(extractor(images.train[: size.num_real]), extractor(held_out))
        return {
            "name": extractor.name,
            "accuracy": classifier.accuracy(trained, images.test, images.test_labels),
            "num_real": size.num_real,
            "held_out": floor._asdict() | {"num_images": len(held_out)},
        }

    key = _origin(data, device) | _of(size, "name", "image_size", "num_images")
    parts = Parts(work / "parts", "", key)
    found: Row = parts.get(
        "classifier",
        make,
        **_of(size, "num_validation", "num_features", "classifier_steps", "num_real"),
    )
    return found


def _origin(data: Path, device: torch.device) -> Row:
    """Return what every part depends on: the code, the data and the kind of device."""
    return {
        "commit": environment(device)["commit"],
        "data": data_sizes(data),
        "device": device.type,
    }


def evaluate_schedule(
    schedule: str, work: Path, data: Path, size: Size, device: torch.device
) -> Row:
    """Score one schedule part by part, and return its rows.

    Args:
        schedule: "linear" or "cosine".
        work: As in :func:`evaluate`.
        data: Directory of CIFAR-10.
        size: As in training.
        device: Where to compute.
    """
    checkpoint = checkpoints.load(work / schedule / "checkpoint", device)
    images = load_images(data, size)
    validation = validation_images(images, size)
    key = _origin(data, device) | {"checkpoint": digest_of(work / schedule / "checkpoint")}
    parts = Parts(work / "parts", f"{schedule}-", key)
    checkpoint = _fitted(checkpoint, validation[: size.num_fit].to(device), size, parts)
    extractor, real = _features(work, images, size, device)
    rows = {
        "validation": _validation(checkpoint, validation, size, parts),
        "rows": _likelihoods(checkpoint, images, size, parts),
        "quality": _quality(schedule, checkpoint, extractor, real, size, parts),
        "costs": parts.get(
            "costs", lambda: step_costs(checkpoint, size), **_of(size, "cost_batch", "cost_rounds")
        ),
        "equal_evaluations": _equal_evaluations(checkpoint, extractor, real, size, parts),
    }
    named = {key: [{"schedule": schedule, **row} for row in found] for key, found in rows.items()}
    return {**named, "seconds": parts.seconds()}


def _features(
    work: Path, images: Images, size: Size, device: torch.device
) -> tuple[FeatureExtractor, Tensor]:
    extractor = classifier_features(classifier.load(work / "classifier", device))
    return extractor, extractor(images.train[: size.num_real])


# Analytic variances and calibrations


@dataclass(frozen=True, eq=False)
class RememberingDenoiser(Denoiser):
    """A denoiser that does not compute its last prediction a second time.

    Several fits at one timestep take the same one.

    Attributes:
        last: The prediction, in a list of one or none.
    """

    last: list[Prediction] = field(default_factory=list)

    def predict(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        s: int | None = None,
        condition: Condition | None = None,
        sample_offset: int = 0,
    ) -> Prediction:
        """Return what one evaluation says, the last one's if x_t and t are the same."""
        for known in self.last:
            same = known.t == t and known.sample_offset == sample_offset
            if same and condition is None and torch.equal(known.x_t, x_t):
                return replace(known, s=s)
        made = super().predict(x_t, t, s=s, condition=condition, sample_offset=sample_offset)
        self.last[:] = [made]
        return made


def fits(checkpoint: Checkpoint, x0: Tensor, t: int, ends: Sequence[int], calibrate: bool) -> Row:
    """Fit the analytic variance and the calibrations of one timestep, in one pass.

    Args:
        checkpoint: The denoiser, with its heads.
        x0: Validation images on the device, all in one batch.
        t: The timestep.
        ends: Ends s >= 1 of the steps from t, for a covariance that looks at them.
        calibrate: Whether to calibrate those that do not look at them.

    Returns:
        "analytic", the fraction of :class:`ocm.Analytic`; and for each head a and b of
        :class:`ocm.Calibrated`, by s if it looks at it.
    """
    plain = checkpoint.denoiser
    denoiser = RememberingDenoiser(plain.backbone, plain.schedule, plain.prediction_type)
    found: Row = {
        "analytic": ocm.fit_analytic(
            denoiser, x0, [t], seed=SEED, batch_size=len(x0)
        ).scaled_variances.values[0].tolist()
    }  # fmt: skip

    def weights(name: str, timesteps: list[Any]) -> list[list[float]]:
        covariance = checkpoint.learned[name]
        table = ocm.calibrate(
            denoiser, covariance, x0, timesteps, seed=SEED, batch_size=len(x0)
        ).weights
        return table.values.tolist()

    for name, covariance in checkpoint.learned.items():
        if covariance.depends_on_s and ends:
            steps = [(s, t) for s in sorted(ends)]
            found[name] = dict(zip(sorted(ends), weights(name, steps), strict=True))
        elif not covariance.depends_on_s and calibrate:
            found[name] = weights(name, [t])[0]
    return found


def _fitted(checkpoint: Checkpoint, x0: Tensor, size: Size, parts: Parts) -> Checkpoint:
    """Return the checkpoint with its analytic variance and calibrations, fitted to ``x0``."""
    N = checkpoint.denoiser.schedule.num_timesteps
    used = {*size.step_counts, *(K for cells in size.samples for K, _ in cells.counts)}
    ends: dict[int, list[int]] = {t: [] for t in (1, N)}
    for s, t in steps_of(checkpoint.denoiser.schedule, sorted(used)):
        ends.setdefault(t, []).extend([s] if s > 0 else [])
    timesteps, found = sorted(ends), {}
    calibrated = spaced(timesteps, size.fit_spacing)
    for first in range(0, len(timesteps), 50):
        some = timesteps[first : first + 50]
        made = parts.get(
            f"fits-{first // 50}",
            lambda some=some: {t: fits(checkpoint, x0, t, ends[t], t in calibrated) for t in some},
            timesteps=some,
            **_of(size, "num_fit", "fit_spacing", "step_counts", "samples"),
        )
        found |= {int(t): row for t, row in made.items()}
    table = Table({t: found[t]["analytic"] for t in timesteps})
    calibrations: dict[str, Table] = {}
    for name, covariance in checkpoint.learned.items():
        rows = {t: found[t][name] for t in timesteps if name in found[t]}
        if covariance.depends_on_s:
            rows = {(int(s), t): w for t, row in rows.items() for s, w in row.items()}
        calibrations[name] = Table(rows)
    analytic = {"analytic": ocm.Analytic(checkpoint.denoiser, table)}
    return replace(checkpoint, analytic=analytic, calibrations=calibrations)


def spaced(timesteps: Sequence[int], factor: float) -> set[int]:
    """Return the first of increasing timesteps, each next one a factor on or more, and the last.

    Example:
        >>> sorted(spaced([1, 2, 3, 4, 5, 9, 10], 2.0))
        [1, 2, 4, 9, 10]
    """
    chosen = [timesteps[0]]
    for t in timesteps:
        if t >= factor * chosen[-1]:
            chosen.append(t)
    return {*chosen, timesteps[-1]}


# Likelihood


def _validation(checkpoint: Checkpoint, validation: Tensor, size: Size, parts: Parts) -> list[Row]:
    """Return bits/dim of the heads on validation images that no fit has seen."""
    images = validation[size.num_fit : size.num_fit + size.num_chosen_on]
    step_counts = [K for K in (10, 25) if K in size.step_counts] or list(size.step_counts)

    def make() -> list[Row]:
        table = likelihood_table(
            checkpoint,
            images,
            ["analytic", *HEADS],
            step_counts,
            decoder="beta_tilde",
            seed=SEED,
            batch_size=size.group,
        )
        return [
            {
                "covariance": name,
                "K": K,
                "bits_per_dim": cell.mean,
                "standard_error": cell.standard_error,
                "num_images": len(images),
            }
            for name, cells in table.items()
            for K, cell in cells.items()
        ]

    rows: list[Row] = parts.get(
        "validation", make, **_of(size, "num_chosen_on", "num_fit", "group", "step_counts")
    )
    return rows


def _likelihoods(checkpoint: Checkpoint, images: Images, size: Size, parts: Parts) -> list[Row]:
    """Return rows of bits/dim on test images, group by group of images."""
    groups = []
    for first in range(0, size.num_scored, size.group):
        x0 = images.test[first : first + size.group]

        def make(x0: Tensor = x0, first: int = first) -> Row:
            # The seed is another for each group, since the table numbers its images from 0.
            table = likelihood_table(
                checkpoint,
                x0,
                PLAIN,
                size.step_counts,
                calibrated=HEADS,
                decoder="beta_tilde",
                seed=SEED + first,
                batch_size=size.group,
            )
            return {name: {K: cell.mean for K, cell in row.items()} for name, row in table.items()}

        groups.append(
            parts.get(
                f"likelihood-{first // size.group}",
                make,
                **_of(size, "group", "num_fit", "fit_spacing", "step_counts", "samples"),
            )
        )
    return likelihood_rows(groups, size.step_counts, size.group)


def likelihood_rows(
    groups: Sequence[Mapping[str, Mapping[str, float]]], step_counts: Sequence[int], group: int
) -> list[Row]:
    """Return bits/dim by covariance and K, and what it is above OCM's on the same images.

    Args:
        groups: Mean bits/dim of every group of images, by covariance and K as text.
        step_counts: Numbers of steps K.
        group: Images of a group.

    Standard errors are those of the mean over groups. Calibrated covariances are compared with the
    calibrated OCM.
    """
    rows = []
    for name in groups[0]:
        is_calibrated = name.endswith(CALIBRATED)
        rival = "ocm" + CALIBRATED if is_calibrated else "ocm"
        for K in step_counts:
            values, theirs = (
                torch.tensor([found[n][str(K)] for found in groups], dtype=torch.float64)
                for n in (name, rival)
            )
            difference = values - theirs
            rows.append(
                {
                    "covariance": name.removesuffix(CALIBRATED),
                    "calibrated": is_calibrated,
                    "K": K,
                    "bits_per_dim": values.mean().item(),
                    "standard_error": _standard_error(values),
                    "minus_ocm": difference.mean().item(),
                    "minus_ocm_standard_error": _standard_error(difference),
                    "num_images": group * len(groups),
                }
            )
    return rows


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


# Samples and costs


def _quality(
    schedule: str,
    checkpoint: Checkpoint,
    extractor: FeatureExtractor,
    real: Tensor,
    size: Size,
    parts: Parts,
) -> list[Row]:
    """Return rows of sample quality, and keep the first images of each cell."""
    rows: list[Row] = []
    for cells in size.samples:
        for K, count in cells.counts:
            name = f"samples-{cells.sampler}-{K}"
            levels = LAST_NOISE[schedule, cells.sampler]
            rows += parts.get(
                name,
                lambda cells=cells, K=K, count=count, name=name, levels=levels: sample_cells(
                    checkpoint, extractor, real, cells, K, count, levels, size, parts.file(name, "")
                ),
                last_noise_levels=levels,
                covariances=cells.covariances,
                num_samples=count,
                features=extractor.name,
                **_of(size, "num_real", "batch_size", "samples_in_bfloat16", "num_fit"),
                **_of(size, "fit_spacing", "step_counts", "samples"),
            )
    return rows


def sample_cells(
    checkpoint: Checkpoint,
    extractor: FeatureExtractor,
    real: Tensor,
    cells: Cells,
    K: int,
    count: int,
    last_noise_levels: float,
    size: Size,
    grid: Path,
) -> list[Row]:
    """Draw samples with every covariance, from the same noise, and compare them with real images.

    Args:
        checkpoint: The denoiser, with what the covariances need.
        extractor: Makes features.
        real: Those of real images.
        cells: Sampler and covariances.
        K: Steps.
        count: Samples of each.
        last_noise_levels: Of :func:`ocm.sampling.samplers.last_step_noise`.
        size: Batch size and precision.
        grid: Where the first images of each go, as safetensors of bytes.
    """
    from safetensors.torch import save_file

    device, rows, kept = checkpoint.denoiser.device, [], {}
    draws = partial(
        draw,
        checkpoint,
        sampler=SAMPLERS[cells.sampler],
        seed=SEED,
        batch_size=size.batch_size,
        max_last_noise=last_step_noise(last_noise_levels),
    )
    timesteps = ocm.even_timesteps(checkpoint.denoiser.schedule, K)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=size.samples_in_bfloat16)
    for name in cells.covariances:
        with precision:
            if not rows:  # compiles kernels and chooses convolutions, for which the first would pay
                draws(name, min(count, size.batch_size), timesteps[-2:])
            synchronize(device)
            start = time.perf_counter()
            images = draws(name, count, timesteps)
            synchronize(device)
        seconds = time.perf_counter() - start
        found = quality(real, extractor(images))
        kept[name] = ((images[:_GRID_IMAGES].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        rows.append(
            {
                "sampler": cells.sampler,
                "covariance": name.removesuffix(CALIBRATED),
                "calibrated": name.endswith(CALIBRATED),
                "K": K,
                "last_noise_levels": last_noise_levels,
                "frechet": found.frechet,
                "precision": found.precision,
                "recall": found.recall,
                "seconds_per_1000_images": 1000 * seconds / count,
                "num_samples": count,
            }
        )
    grid.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, grid.with_suffix(".safetensors"))
    return rows


@torch.no_grad()
def step_costs(checkpoint: Checkpoint, size: Size) -> list[Row]:
    """Return the time of a whole DDPM step with each covariance over that with beta_tilde."""
    denoiser = checkpoint.denoiser
    generator = torch.Generator().manual_seed(SEED)
    shape = (size.cost_batch, *checkpoint.image_shape)
    x_t = torch.randn(shape, generator=generator).to(denoiser.device)
    covariances = {name: build_covariance(name, checkpoint) for name in SAMPLED} | {
        "cosine, M = 1": ocm.CosineDiagonal(denoiser, 1),
        "lanczos, k = 3": ocm.Lanczos(denoiser, 3),
    }
    process = ddpm(denoiser.schedule, _COST_S, _COST_T)

    def step(covariance: ocm.Covariance) -> Tensor:
        prediction = denoiser.predict(x_t, _COST_T, s=_COST_S)
        return reverse_step(prediction, covariance.at(prediction), process, seed=SEED)

    timings, ratios = time_together(
        {name: partial(step, covariance) for name, covariance in covariances.items()},
        device=denoiser.device,
        rounds=size.cost_rounds,
        baseline="beta_tilde",
    )
    return [
        {
            "covariance": name,
            "batch": size.cost_batch,
            "milliseconds": 1e3 * timing.median,
            "over_plain": ratios[name],
            "over_plain_of_minima": timing.minimum / timings["beta_tilde"].minimum,
        }
        for name, timing in timings.items()
    ]


def _equal_evaluations(
    checkpoint: Checkpoint, extractor: FeatureExtractor, real: Tensor, size: Size, parts: Parts
) -> list[Row]:
    rows: list[Row] = []
    for evaluations in size.budgets:
        rows += parts.get(
            f"budget-{evaluations}",
            lambda evaluations=evaluations: budget.equal_evaluations(
                checkpoint,
                real,
                extractor,
                (evaluations,),
                num_images=size.budget_samples,
                seed=SEED,
                batch_size=size.batch_size,
            ),
            features=extractor.name,
            methods=[f"{method.name} {method.sampler}" for method in budget.METHODS],
            last_noise_levels=budget.LAST_NOISE_LEVELS,
            **_of(size, "budget_samples", "num_real", "num_fit"),
        )
    return rows


def _of(size: Size, *names: str) -> Row:
    return {name: getattr(size, name) for name in names}
