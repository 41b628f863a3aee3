"""``ocm evaluate``: bits/dim and sample quality of a checkpoint's covariances."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ocm.cli.options import (
    CheckpointPath,
    CovarianceName,
    Device,
    LanczosProbes,
    NumProbes,
    Quiet,
    Seed,
    prepare_directory,
    resolve_device,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ocm.checkpoints.checkpoint import Checkpoint
    from ocm.data import Images
    from ocm.evaluation.features import FeatureExtractor


def evaluate(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json and the report.")] = Path(
        "runs/evaluate"
    ),
    covariance: Annotated[
        list[CovarianceName] | None,
        typer.Option(
            help="Covariance to score; may be given several times. Default: all that the "
            "checkpoint can state, but those of D products only for D up to 1024."
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Steps K; may be given several times. Default: 5, 10, 25, 50."),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Score every covariance calibrated too.")
    ] = False,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Draw samples by DDPM and DDIM: Fréchet distance, precision, recall and MMD.",
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Both --calibrated and --quality.")
    ] = False,
    num_images: Annotated[int, typer.Option(min=1, help="Held-out images to score.")] = 64,
    fit_images: Annotated[
        int, typer.Option(min=2, help="Training images that calibrations are fitted to.")
    ] = 256,
    num_samples: Annotated[
        int, typer.Option(min=8, help="Samples for each figure of quality.")
    ] = 256,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="Inception weights of torch-fidelity for the features. Default: a classifier "
            "that is trained on the labelled data."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set; default: the checkpoint's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    num_probes: NumProbes = 8,
    lanczos_probes: LanczosProbes = 3,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Score covariances on held-out images: bits/dim, and with --all sample quality.

    Analytic variances and calibrations are fitted on training images where the checkpoint lacks
    them for the timesteps in use. Writes evaluation.json, report.md and evaluation.png.
    """
    from ocm import checkpoints
    from ocm.checkpoints.catalogue import CovarianceSettings, affordable
    from ocm.cli.inputs import calibration_images, calibration_labels, images_for
    from ocm.covariances.names import has_density
    from ocm.evaluation.environment import environment
    from ocm.evaluation.markdown import likelihood_markdown
    from ocm.evaluation.pictures import evaluation_plot
    from ocm.evaluation.scores import likelihood_record, likelihood_table

    place = resolve_device(device)
    prepare_directory(out)
    loaded = checkpoints.load(checkpoint, place)
    if loaded.x0_range is None:
        raise ValueError(f"{checkpoint} is a model of latents, which have no grey levels to score")
    images = images_for(loaded, data)
    if num_images > len(images.test):
        raise ValueError(
            f"--num-images must be at most {len(images.test)}, the held-out images of "
            f"{images.name}, got {num_images}"
        )
    calibrated, quality = calibrated or everything, quality or everything
    names = [name.value for name in covariance or []] or affordable(loaded)
    scored = [name for name in names if has_density(name)]
    if not scored and not quality:
        raise ValueError(
            f"--covariance {' '.join(names)} has no density, and so no bits/dim; pass --quality"
        )
    step_counts = sorted(set(steps or (5, 10, 25, 50)))
    settings = CovarianceSettings(num_probes, lanczos_probes, seed)
    start = time.perf_counter()
    x0 = calibration_images(loaded, images, fit_images)
    classes = calibration_labels(loaded, images, len(x0))
    loaded = _fitted(loaded, x0, classes, names, step_counts, calibrated, settings, seed, not quiet)
    table = likelihood_table(
        loaded,
        images.test[:num_images],
        scored,
        step_counts,
        calibrated=scored if calibrated else (),
        labels=images.test_labels if loaded.denoiser.takes_labels else None,
        settings=settings,
        seed=seed,
        batch_size=batch_size,
        progress=not quiet,
    )
    record: dict[str, Any] = likelihood_record(table) | {
        "checkpoint": str(checkpoint),
        "data": images.name,
        "num_images": num_images,
        "num_probes": num_probes,
        "lanczos_probes": lanczos_probes,
        "fit_images": fit_images,
        "seed": seed,
        "step_counts": step_counts,
        "environment": environment(place),
    }
    sections = []
    if scored:
        sections.append(
            f"Bits/dim on {num_images} held-out images of {images.name}, ± the standard error "
            f"over images\n\n{likelihood_markdown(table, step_counts)}"
        )
    if quality:
        part, more = _quality(
            loaded, images, names, step_counts, calibrated, settings, num_samples, inception, seed,
            batch_size, out, not quiet,
        )  # fmt: skip
        record |= part
        sections += more
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "evaluation.json", record)
    text = "\n\n".join(sections)
    (out / "report.md").write_text(f"# {checkpoint}\n\n{text}\n\n![Curves](evaluation.png)\n")
    evaluation_plot(record, out / "evaluation.png", title=f"{checkpoint}, {images.name}")
    typer.echo(text)
    typer.echo(f"\nfigures: {out / 'evaluation.json'}   picture: {out / 'evaluation.png'}")


def _fitted(
    loaded: Checkpoint,
    x0: Tensor,
    labels: Tensor | None,
    names: list[str],
    step_counts: list[int],
    calibrated: bool,
    settings: Any,
    seed: int,
    progress: bool,
) -> Checkpoint:
    """Fit to x0 what the checkpoint lacks for these numbers of steps."""
    from ocm.checkpoints.fitting import fitted
    from ocm.covariances.names import has_density, named
    from ocm.diffusion.tables import Table
    from ocm.evaluation.scores import steps_of

    steps = steps_of(loaded.denoiser.schedule, step_counts)

    def lacks(table: Table | None) -> bool:
        return table is None or not table.covers([(s, t) for s, t in steps if s > 0])

    analytic = {name: c.fractions for name, c in loaded.analytic.items()}
    wanted = [name for name in names if name in named("fitted") and lacks(analytic.get(name))]
    to_calibrate = [
        name
        for name in names
        if calibrated and has_density(name) and lacks(loaded.calibrations.get(name))
    ]
    return fitted(
        loaded,
        x0,
        wanted,
        steps,
        calibrated=to_calibrate,
        labels=labels,
        settings=settings,
        seed=seed,
        progress=progress,
    )


def _quality(
    loaded: Checkpoint,
    images: Images,
    names: list[str],
    step_counts: list[int],
    calibrated: bool,
    settings: Any,
    num_samples: int,
    inception: Path | None,
    seed: int,
    batch_size: int,
    out: Path,
    progress: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Return the record and the tables of sample quality under DDPM and DDIM."""
    from functools import partial

    from ocm.covariances.names import CALIBRATED, has_density
    from ocm.evaluation.markdown import quality_markdown
    from ocm.evaluation.samples import median_distance, quality, quality_table
    from ocm.sampling.samplers import ddim, ddpm

    extractor, said = _features(images, inception, seed, out, progress)
    real = extractor(images.train)
    rows = [*names]
    if calibrated:
        rows += [name + CALIBRATED for name in names if has_density(name)]
    floor = quality(real, extractor(images.test))
    record: dict[str, Any] = {
        "features": extractor.name,
        "num_samples": num_samples,
        "num_real": len(real),
        "mmd_bandwidth": median_distance(real),
        "held_out": floor._asdict() | {"num_images": len(images.test)},
        "quality": {},
    }
    sections = [
        f"{said} {num_samples} samples a cell are compared with {len(real)} training images; "
        f"{len(images.test)} held-out images are at a Fréchet distance of {floor.frechet:.3f}."
    ]
    for title, sampler in (("ddpm", ddpm), ("ddim", partial(ddim, eta=0.0))):
        table = quality_table(
            loaded,
            real,
            extractor,
            rows,
            step_counts,
            sampler=sampler,
            num_images=num_samples,
            label=f"samples of {title}",
            settings=settings,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        record["quality"][title] = {
            name: {K: cell._asdict() for K, cell in row.items()} for name, row in table.items()
        }
        sections.append(
            f"Fréchet distance of {title.upper()} samples (precision, recall)\n\n"
            f"{quality_markdown(table, step_counts)}"
        )
    return record, sections


def _features(
    images: Images, inception: Path | None, seed: int, out: Path, progress: bool
) -> tuple[FeatureExtractor, str]:
    """Return the features of quality, and a sentence on what they are."""
    from ocm.evaluation import classifier as classifiers
    from ocm.evaluation import features

    if inception is not None:
        extractor = features.inception(inception)
        return extractor, f"Features: {extractor.name}."
    if images.train_labels is None or images.num_classes is None:
        raise ValueError(
            f"--quality needs labels to train a classifier on, and {images.name} has none; pass "
            "--inception with the weights of torch-fidelity"
        )
    trained = classifiers.train_classifier(
        images.train, images.train_labels, images.num_classes, seed=seed, progress=progress
    )
    classifiers.save(trained, out / "classifier")
    said = "a classifier trained on the same training images"
    if images.test_labels is not None:
        right = classifiers.accuracy(trained, images.test, images.test_labels)
        said += f", right on {right:.1%} of the held-out ones"
    extractor = features.classifier_features(trained)
    return extractor, f"Features: {extractor.name}, {said}."
