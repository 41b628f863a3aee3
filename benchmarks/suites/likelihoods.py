"""Log-likelihoods by the probability-flow ODE on the denoisers of the suite ``heads``.

For each data set and path: standard errors of probes at equal products, kept for the solution or
drawn anew; the time to a standard error; and bits/dim by the ODE beside the bounds of all heads, on
the same test images. Intervals are checked against the exact divergence on digits.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from cifar10.parts import Parts, as_json
from harness.timing import Setting
from heads import likelihood, models
from heads import sizes as heads_sizes
from likelihoods import probes, tables
from likelihoods.report import TABLES, plot, report
from likelihoods.sizes import QUICK, LikelihoodSize

from ocm.evaluation.environment import Row, environment
from suites.heads import work_directory

__all__ = ["plot", "report", "run"]

_HEADS = ("npr", "ocm", "ml")


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    trained = heads_sizes.QUICK if setting.quick else heads_sizes.REDUCED
    size = QUICK if setting.quick else LikelihoodSize()
    folders = {
        "digits": setting.data,
        "fashion_mnist": setting.fashion_mnist,
        "cifar10": setting.data,
    }
    found = [
        _model(name, path, folders[name], trained, size)
        for name, data in trained.data.items()
        if name == "digits" or (folders[name] / "train.parquet").exists()
        for path in data.paths
    ]
    record: Row = {
        "suite": "likelihoods",
        "settings": as_json(asdict(size)),
        "environment": environment(torch.device("cpu")),
        **{table: [row for model in found for row in model[table]] for table in TABLES},
    }
    return record, report(record)


def _model(
    name: str, path: str, folder: Path, trained: heads_sizes.Size, size: LikelihoodSize
) -> Row:
    """Return the rows of one denoiser by table."""
    work, of_data = work_directory(trained.name), trained.data[name]
    images = models.load_images(name, folder, of_data)
    denoiser, _ = models.train_denoiser(name, path, work, images, of_data)
    parts = Parts(work / "parts", f"likelihoods-{name}-{path}-", as_json(asdict(size)))
    y = probes.dequantised(images.test[: size.num_compared], images.levels)

    def probed() -> Row:
        rows = probes.compared(denoiser, y, size)
        found = [*probes.timed(denoiser, y, size, rows), probes.one_probe(denoiser, y, size)]
        if path == "flow":
            peer = probes.flow_matching_row(denoiser, y, size)
            found += [] if peer is None else [peer]
        return {"equal": rows, "timed": found}

    def scored() -> list[Row]:
        x0 = images.test[: size.num_images]
        given = (trained.seeds[0], denoiser, images, trained, of_data, work / name / path)
        learned, _ = likelihood.train_heads(*given)
        stated = {head: learned[head] for head in _HEADS}
        stated["frequency"] = likelihood.train_frequencies(*given)
        return [
            *tables.bounds(denoiser, stated, x0, images.levels, size),
            *tables.by_ode(denoiser, learned["ml"], x0, images.levels, size),
        ]

    tables_found: Row = {"scores": parts.get("scores", scored), "coverage": []}
    tables_found |= parts.get("probes", probed)
    if name == "digits":
        tables_found["coverage"] = parts.get(
            "coverage", lambda: probes.coverage(denoiser, y[:1], size)
        )
    return {
        table: [{"data": name, "path": path, **row} for row in tables_found[table]]
        for table in TABLES
    }
