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
from dataclasses import asdict
from pathlib import Path

import torch
from cifar10.parts import Parts, as_json
from harness.timing import Setting
from heads import likelihood, models
from heads import report as tables
from heads.report import plot
from heads.sizes import QUICK, REDUCED, SEED, Size

from ocm.evaluation.environment import Row, environment

__all__ = ["plot", "report", "run"]


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
    }
    return record, report(record)


def _model(name: str, path: str, data: Path, size: Size) -> Row:
    """Train and score one denoiser and its heads."""
    work, of_data = work_directory(size.name), size.data[name]
    images = models.load_images(name, data, of_data)
    denoiser, denoiser_record = models.train_denoiser(name, path, work, images, of_data)
    parts = Parts(work / "parts", f"{name}-{path}-", as_json(asdict(of_data)))
    scored: Row = parts.get(
        "likelihood",
        lambda: likelihood.evaluate(denoiser, images, size, of_data, work / name / path),
        **{key: value for key, value in asdict(size).items() if key not in ("data", "name")},
    )
    rows = [{"data": name, "path": path, **row} for row in scored["rows"]]
    return {"denoiser": denoiser_record, "rows": rows, "losses": scored["losses"]}


def work_directory(size: str) -> Path:
    """Return where the suite keeps what it trains and has finished."""
    return Path(__file__).parents[2] / ".cache" / "benchmarks" / f"heads-{size}"


def report(record: Row) -> str:
    """Return the tables of a record."""
    rows, settings = record["rows"], record["settings"]
    parts = [
        "Bits/dim of test images in K evenly spaced steps, with the stated decoder; mean over the "
        f"seeds {', '.join(str(seed) for seed in settings['seeds'])} of the heads (those in the "
        "papers' units on images: the first). Calibrations are fitted to "
        f"{settings['num_calibration']} validation images. The likelihood head was trained on K = "
        "5, 10, 25 and 50.",
        tables.summary(rows),
    ]
    for model in tables.models(rows):
        of_model = tables.of_model(rows, model)
        parts += [f"### {tables.title(of_model[0])}", tables.likelihood(of_model)]
    parts += ["### OCM in the default units and in the papers'", tables.units(rows)]
    return "\n\n".join(parts)
