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
from likelihoods.sizes import QUICK, LikelihoodSize

from ocm.covariances.names import NAMES, label
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from suites.heads import work_directory

_DATA = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
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
    models_found = [
        _model(name, path, folders[name], trained, size)
        for name, data in trained.data.items()
        if name == "digits" or (folders[name] / "train.parquet").exists()
        for path in data.paths
    ]
    record: Row = {
        "suite": "likelihoods",
        "settings": as_json(asdict(size)),
        "environment": environment(torch.device("cpu")),
        "models": models_found,
    }
    return record, report(record)


def _model(
    name: str, path: str, folder: Path, trained: heads_sizes.Size, size: LikelihoodSize
) -> Row:
    """Return everything about one denoiser."""
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

    row: Row = {"data": name, "path": path, "scores": parts.get("scores", scored)}
    row |= parts.get("probes", probed)
    if name == "digits":
        row["coverage"] = parts.get("coverage", lambda: probes.coverage(denoiser, y[:1], size))
    return row


def report(record: Row) -> str:
    """Return the tables of a record."""
    found, settings = record["models"], record["settings"]
    titles = [f"{_DATA[row['data']]}, {row['path']}" for row in found]
    lines: dict[str, Row] = {}
    for title, row in zip(titles, found, strict=True):
        for cell in row["scores"]:
            name = cell["what"].removeprefix("bound, ")
            if "K" in cell:
                head = label(name) if name in NAMES else "likelihood head in frequencies"
                name = f"bound, {head}, K = {cell['K']}"
            line = lines.setdefault(name, {"": name})
            line[title] = f"{cell['bits_per_dim']:.3f} ± {cell['standard_error']:.3f}"
    evaluations = found[0]["equal"][0]["evaluations"]
    parts = [
        f"Bits/dim of {settings['num_images']} test images, ± the standard error over images. The "
        f"ODE takes {evaluations} evaluations of the network, with 2 products each.",
        markdown_table(list(lines.values()), {"": ""} | dict.fromkeys(titles, ">")),
    ]
    equal = {row["probes"]: {"probes": row["probes"]} for model in found for row in model["equal"]}
    for title, model in zip(titles, found, strict=True):
        for row in model["equal"]:
            ratio = f"{row['standard_error']:.5f} ({row['ratio']:.1f})"
            equal[row["probes"]][title] = ratio
    parts += [
        f"Standard error in bits/dim of an image at {settings['num_products']} products an "
        f"evaluation (how many times smaller than with kept Rademacher probes), root mean square "
        f"over {settings['num_compared']} images, each within six standard errors of the exact "
        "divergence where that was taken.",
        markdown_table(list(equal.values()), {"probes": ""} | dict.fromkeys(titles, ">")),
    ]
    timed: dict[str, Row] = {}
    for title, model in zip(titles, found, strict=True):
        base = model["timed"][0]["seconds_to_target"]
        for row in model["timed"]:
            line = timed.setdefault(row["probes"], {"probes": row["probes"]})
            line[title] = (
                f"{row['seconds_to_target']:.1f} s, M = {row['products']} "
                f"({base / row['seconds_to_target']:.1f})"
            )
    parts += [
        f"Seconds for {settings['num_compared']} images to a standard error of "
        f"{settings['target']:g} bits/dim each (how many times faster than with kept Rademacher "
        "probes in one solution), in one run of one thread; where a run falls short of the target, "
        "or is repeated, by 1 / M.",
        markdown_table(list(timed.values()), {"probes": ""} | dict.fromkeys(titles, ">")),
    ]
    for title, model in zip(titles, found, strict=True):
        if "coverage" in model:
            rows = [
                {
                    "probes": f"{row['probes']}, M = {row['products']}",
                    "held": f"{row['coverage']:.1%}",
                    "error / stated": f"{row['error_over_stated']:.3f}",
                    "mean error, in standard errors": f"{row['mean_error_in_standard_errors']:.2f}",
                }
                for row in model["coverage"]
            ]
            columns = {"probes": "", "held": ">", "error / stated": ">"}
            columns |= {"mean error, in standard errors": ">"}
            parts += [
                f"{title}: 95% intervals of {model['coverage'][0]['seeds']} seeds on one image, "
                "against the exact divergence.",
                markdown_table(rows, columns),
            ]
    return "\n\n".join(parts)
