"""Tables and pictures of the comparison of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar10.parts import Parts

from heads.samples import CLASSIFIER, IMAGENET
from ocm.covariances.names import NAMES, label
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table
from ocm.evaluation.pictures import sample_rows as draw_sample_rows

DATA = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
# The head in frequencies, which is in no table of names of ocm.
FREQUENCY = "frequency"
_SHORT = {"even": "e", "trailing": "t", "rho = 7": "ρ"}


def samples_markdown(rows: Sequence[Row], described: Mapping[str, Row]) -> str:
    """Return tables of Fréchet distances, one for each data set and network, in Markdown.

    The best of a column is bold; Euler's method on a flow stands in DDIM's line.

    Args:
        rows: Of :func:`heads.samples.sample_rows`, of any data sets and paths.
        described: What the judges of each data set say of themselves.
    """
    sections = []
    for data in dict.fromkeys(row["data"] for row in rows):
        some = [row for row in rows if row["data"] == data]
        about = described[data]
        for extractor, what in about["features"].items():
            sections += [_heading(data, extractor, what, about, some), _table(some, extractor)]
        if about["missing"]:
            sections.append(about["missing"])
    if sections:
        sections.append(_legend(rows))
    return "\n\n".join(sections)


def name_of(row: Mapping[str, str]) -> str:
    """Return how a method is written.

    Example:
        >>> name_of({"method": "DDPM", "covariance": "beta"})
        'DDPM, β'
        >>> name_of({"method": "Euler", "covariance": ""})
        'DDIM (Euler)'
    """
    method, covariance = row["method"], row["covariance"]
    if method in ("DDIM", "Euler"):
        return "DDIM (Euler)"
    if not covariance:
        return method
    if covariance == FREQUENCY:
        return f"{method}, head in frequencies"
    return f"{method}, {label(covariance) if covariance in NAMES else covariance}"


def _heading(data: str, extractor: str, what: str, about: Row, rows: Sequence[Row]) -> str:
    floor = about["training_images"]
    right = f", right on {about['accuracy']:.1%} of test images" if extractor == CLASSIFIER else ""
    return (
        f"**{DATA[data]}**: Fréchet distance to test images in {what}{right}; lower is better. "
        f"Mean of {len(rows[0][f'{extractor}_sets'])} sets of {rows[0]['num_samples']} samples ± "
        f"its standard error. As many training images are at {_number(floor, extractor)}."
    )


def _number(row: Row, extractor: str) -> str:
    return f"{row[extractor]:.2f} ± {row[f'{extractor}_standard_error']:.2f}"


def _table(rows: Sequence[Row], extractor: str) -> str:
    def column(row: Row) -> str:
        return f"{row['path']}, E = {row['evaluations']}"

    paths = list(dict.fromkeys(row["path"] for row in rows))
    ordered = sorted(rows, key=lambda row: (paths.index(row["path"]), row["evaluations"]))
    columns = list(dict.fromkeys(map(column, ordered)))
    best = {name: min(row[extractor] for row in rows if column(row) == name) for name in columns}
    lines: dict[str, Row] = {}
    # Others first, and each in the order of the best that it reached anywhere.
    for row in sorted(rows, key=lambda row: row["is_ours"]):
        line = lines.setdefault(name_of(row), {"method": name_of(row)})
        cell = _number(row, extractor)
        bold = row[extractor] == best[column(row)]
        spacing = _SHORT[row["spacing"]]
        line[column(row)] = f"**{cell}** {spacing}" if bold else f"{cell} {spacing}"
    order = sorted(lines.values(), key=lambda line: line["method"] not in _others(rows))
    return markdown_table(order, {"method": ""} | dict.fromkeys(columns, ">"))


def _others(rows: Sequence[Row]) -> set[str]:
    return {name_of(row) for row in rows if not row["is_ours"]}


def _legend(rows: Sequence[Row]) -> str:
    """Return what the tables have in common."""
    all_at = max(
        {row["evaluations"] for row in rows},
        key=lambda E: sum(row["evaluations"] == E for row in rows),
    )
    return (
        "E counts evaluations of the network for a sample. Timesteps are even (e), trailing (t) or "
        "those of Karras et al. with ρ = 7 (ρ): for each method and denoiser those of least "
        f"distance to validation images at E = {all_at}, the geometric mean of the distances in "
        "both networks, by samples of another seed. The methods of others, and the processes of "
        "ours, that did best there are drawn at other E. All clip the estimate of x₀ and end with "
        "it. DPM-Solver++ and UniPC are those of diffusers. Without a head aDDIM takes the "
        "variance that x̂₀ lacks to be a tenth of that for data of variance 1/2, as its paper "
        "does; with one it takes the mean of the variances that the head states."
    )


def _first(rows: Sequence[Row], method: str) -> Row:
    return next(row for row in rows if row["is_ours"] and row["method"] == method)


def samples_picture(
    rows: Sequence[Row], parts: Parts, path: Path, *, data: str, process: str, evaluations: int
) -> bool:
    """Draw the first samples of every method of one denoiser, best first, from the same noise.

    Of a process of ours the head is shown with which it did best.

    Args:
        rows: Of :func:`heads.samples.sample_rows`.
        parts: Where the samples of the same run are.
        path: Where the PNG goes.
        data: The data set.
        process: The path of the denoiser.
        evaluations: Of the network.

    Returns:
        Whether it was drawn: not where samples are missing, which a line says.
    """
    from safetensors.torch import load_file

    some = [
        row
        for row in rows
        if (row["data"], row["path"], row["evaluations"]) == (data, process, evaluations)
    ]
    judge = IMAGENET if all(IMAGENET in row for row in some) else CLASSIFIER
    ranked = sorted(some, key=lambda row: row[judge])
    some = [row for row in ranked if not row["is_ours"] or row is _first(ranked, row["method"])]
    files = {f"{name_of(row)}: {row[judge]:.2f}": parts.directory / row["samples"] for row in some}
    absent = [file.name for file in files.values() if not file.exists()]
    if absent or not files:
        print(f"samples are not drawn: {(absent or ['no row'])[0]} is not in {parts.directory}")
        return False
    images = {name: load_file(file)["images"].float() / 127.5 - 1 for name, file in files.items()}
    draw_sample_rows(
        images,
        path,
        title=f"{DATA[data]}, {process}, {evaluations} evaluations, the same first noise; Fréchet "
        f"distance in {'ImageNet' if judge == IMAGENET else 'classifier'} features",
    )
    return True
