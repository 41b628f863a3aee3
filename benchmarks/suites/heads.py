"""Heads of covariances against one another: bits/dim and samples on three data sets.

A denoiser is trained for each data set and path, and on each of them heads of every kind: of
I-DDPM, NPR, SN and OCM, the likelihood head, and NPR's and OCM's in the papers' units, the same
network in the same number of steps. Likelihoods are bounded with the stated decoder, plain and
calibrated on validation images; test images are used once. Samples are compared at equal numbers of
network evaluations.

Training is kept below ``.cache/benchmarks/heads-...``, and goes on where it was interrupted.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cifar10.parts import Parts, as_json
from harness.timing import Setting
from heads import likelihood, models
from heads import report as tables
from heads.samples import Judges, judges_of, sample_rows
from heads.samples_report import FREQUENCY, samples_markdown, samples_picture
from heads.sizes import QUICK, REDUCED, SEED, Size

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.evaluation.environment import Row, environment

# What the heads in pixels do not depend on.
_APART = (
    *("data", "name", "samples", "sampled"),
    *("frequency_seeds", "first_seed_alone", "frequencies_of"),
)
# Learned covariances that samples are drawn with.
SAMPLED = ("ocm", "ml", FREQUENCY)


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    size = QUICK if setting.quick else REDUCED
    folders = {
        "digits": setting.data,
        "fashion_mnist": setting.fashion_mnist,
        "cifar10": setting.data,
    }
    jobs = [
        (name, path)
        for name, data in size.data.items()
        if name == "digits" or (folders[name] / "train.parquet").exists()
        for path in data.paths
    ]
    for name in sorted(set(size.data) - {name for name, _ in jobs}):
        print(f"no train.parquet in {folders[name]}: {name} is left out")
    described = {}
    for name in dict.fromkeys(name for name, _ in jobs):  # once, before the processes of the paths
        if name not in size.sampled:
            continue
        images = models.load_images(name, folders[name], size.data[name])
        described[name] = _judges(name, folders[name], images, size).described
    if size.side_by_side:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
            waiting = [pool.submit(_model, *job, folders[job[0]], size) for job in jobs]
            found = [future.result() for future in waiting]
    else:
        found = [_model(*job, folders[job[0]], size) for job in jobs]
    record: Row = {
        "suite": "heads",
        "seeds": {"denoisers": SEED, "heads": list(size.seeds), "scores": SEED},
        "settings": as_json(asdict(size)),
        "environment": environment(torch.device("cpu")),
        "denoisers": [part["denoiser"] for part in found],
        "losses": {f"{n} {p}": part["losses"] for (n, p), part in zip(jobs, found, strict=True)},
        "rows": [row for part in found for row in part["rows"]],
        "judges": described,
        "samples": [row for part in found for row in part["samples"]],
    }
    return record, report(record)


def _model(name: str, path: str, data: Path, size: Size) -> Row:
    """Train and score one denoiser and its heads."""
    work, of_data = work_directory(size.name), size.data[name]
    images = models.load_images(name, data, of_data)
    denoiser, denoiser_record = models.train_denoiser(name, path, work, images, of_data)
    parts = Parts(work / "parts", f"{name}-{path}-", as_json(asdict(of_data)))
    if path in size.first_seed_alone:
        size = replace(size, seeds=size.seeds[:1])
    settings = {k: v for k, v in asdict(size).items() if k not in _APART}
    scored: Row = parts.get(
        "likelihood",
        lambda: likelihood.evaluate(denoiser, images, size, of_data, work / name / path),
        **settings,
    )
    if path in size.frequencies_of.get(name, ()):
        scored["rows"] += parts.get(
            "frequencies",
            lambda: likelihood.evaluate_frequencies(
                denoiser, images, size, of_data, work / name / path
            ),
            frequency_seeds=size.frequency_seeds,
            **settings,
        )
    samples: list[Row] = []
    if name in size.sampled:
        # Drawn with the heads of the first seed.
        given = (size.seeds[0], denoiser, images, size, of_data, work / name / path)
        learned, _ = likelihood.train_heads(*given)
        learned[FREQUENCY] = likelihood.train_frequencies(*given)
        checkpoint = Checkpoint(
            denoiser,
            tuple(images.test[:1].shape[1:]),
            images.levels,
            name,
            {head: learned[head] for head in SAMPLED},
        )
        judges, kept = _judges(name, data, images, size), Parts(work / "parts", "", {})
        samples = sample_rows(checkpoint, path, judges, size.samples, kept, SAMPLED)
    return {
        "denoiser": denoiser_record,
        "rows": [{"data": name, "path": path, **row} for row in scored["rows"]],
        "losses": scored["losses"],
        "samples": samples,
    }


def _judges(name: str, data: Path, images: models.Splits, size: Size) -> Judges:
    work = work_directory(size.name)
    parts = Parts(work / "parts", "", {})
    return judges_of(name, data, work, images, size.data[name], size.samples, parts)


def work_directory(size: str) -> Path:
    """Return where the suite keeps what it trains and has finished."""
    return Path(__file__).parents[2] / ".cache" / "benchmarks" / f"heads-{size}"


def report(record: Row) -> str:
    """Return the tables of a record."""
    rows, settings = record["rows"], record["settings"]
    parts = [
        "Bits/dim of test images in K evenly spaced steps, with the stated decoder; mean over the "
        f"seeds {', '.join(str(seed) for seed in settings['seeds'])} of the heads. Of the first "
        f"seed alone are those in the papers' units on images, those on the path "
        f"{' and '.join(settings['first_seed_alone']) or 'of none'}, and those in frequencies. "
        "Calibrations are fitted to "
        f"{settings['num_calibration']} validation images. The likelihood head was trained on K = "
        "5, 10, 25 and 50.",
        tables.summary(rows),
    ]
    for model in tables.models(rows):
        of_model = tables.of_model(rows, model)
        parts += [f"### {tables.title(of_model[0])}", tables.likelihood(of_model)]
    parts += ["### OCM in the default units and in the papers'", tables.units(rows)]
    parts += ["### Samples", samples_markdown(record["samples"], record["judges"])]
    return "\n\n".join(parts)


def plot(record: Row, path: Path) -> None:
    """Draw bits/dim above the likelihood head's, and samples of one path of each data set."""
    tables.plot(record, path)
    rows, settings = record["samples"], record["settings"]
    parts = Parts(work_directory(settings["name"]) / "parts", "", {})
    for data in record["judges"]:
        process = next(row["path"] for row in rows[::-1] if row["data"] == data)
        samples_picture(
            rows,
            parts,
            path.with_name(f"{path.stem}_samples_{data.replace('_', '')}.png"),
            data=data,
            process=process,
            evaluations=settings["samples"]["all_at"],
        )
