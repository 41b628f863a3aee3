"""Write the recorded figures into the documents: ``python benchmarks/records quotes``.

A document quotes a record between two comments,

    <!-- figures: NAME -->
    <!-- end -->

and this fills in what the function of that name in :data:`BLOCKS` makes of the record, with the
command and the commit that the figures come from. Nothing between the comments is written by hand:
a test fails where it differs from the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from cifar10 import report as cifar10
from harness import budget
from mixtures.report import name_of
from suites.digits import likelihood, structure

from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table, table_of_lines

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_SCHEDULES = ("linear", "cosine")
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md")

_BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two comments.

    Attributes:
        record: File below ``benchmarks/results``.
        render: Makes Markdown of the record.
        command: What made the record, where it does not say so itself.
    """

    record: str
    render: Callable[[Row], str]
    command: str | None = None


def _products(record: Row) -> str:
    (row,) = [r for r in record["rows"] if (r["way"], r["M"]) == ("hutchinson, vjp", 16)]
    batch, _, height, width = record["shape"]
    return (
        "Against the loop that runs the network again for every probe, `hutchinson` takes\n"
        f"{row['over_loop']:.0%} of the time on a U-Net ({batch} images of {height}x{width}, "
        f"M = {row['M']}, {record['environment']['device'].upper()})."
    )


def _estimators(record: Row) -> str:
    gains = {(row["t"], row["M"]): row["coloring_gain"] for row in record["errors"]}
    headings = {4: "M = 4", 12: "12", 48: "48", 192: "192"}
    rows = [
        {"t of 1000": row["t"], "time at the error of M = 48": f"{row['times_faster']:.0f} times"}
        | {heading: gains[row["t"], M] for M, heading in headings.items()}
        for row in record["time_to_error"]
        if row["colors"] == 48
    ]
    columns = {"t of 1000": "d"} | dict.fromkeys(headings.values(), ".1f")
    return markdown_table(rows, columns | {"time at the error of M = 48": ">"})


def _digits(record: Row) -> str:
    names = ("beta", "analytic", "iddpm", "npr", "sn", "ocm", "exact", "cosine", "full")
    return likelihood(record, [*names, *(f"{n}_calibrated" for n in names)], errors=False)


def _mixtures(record: Row) -> str:
    """Errors at some noise levels, and samples of five and ten steps: means over seeds."""
    heads = ("iddpm", "npr", "sn", "ocm")
    errors = pd.DataFrame(record["errors"]).query("score == 'true' and parameterisation != 'paper'")
    levels = {(t,): f"t = {t}" for t in (5, 100, 300, 500, 700, 1000)}
    parts = [
        _means(
            mixture,
            errors[errors["mixture"] == mixture].groupby(["covariance", "t"])["relative"],
            ("analytic", *more, *heads),
            levels,
        )
        for mixture, more in (("nine Gaussians", ()), ("correlated mixture", ("hutchinson-10",)))
    ]
    samples = pd.DataFrame(record["samples"])
    places = {
        (mixture, sampler, K): f"{mixture.split()[0]}, {sampler.upper()}, {K}"
        for mixture in ("nine Gaussians", "correlated mixture")
        for sampler in ("ddpm", "ddim")
        for K in (5, 10)
    }
    parts += [
        _means(
            "MMD² of samples, K",
            samples.groupby(["covariance", "mixture", "sampler", "K"])["mmd"],
            ("beta", "beta_tilde", "analytic", *heads, "exact", "lanczos", "full"),
            places,
        ),
        "![Error of every covariance against the noise level](benchmarks/results/cpu/mixtures.png)",
        "![Distance of samples from the mixtures against the number of steps]"
        "(benchmarks/results/cpu/mixtures_samples.png)",
    ]
    return "\n\n".join(
        [
            "Relative squared error of Var[x0 | x_t] with the true score, "
            f"mean of {len(record['seeds'])} seeds:",
            *parts,
        ]
    )


def _means(
    corner: str, rows: Any, names: Sequence[str], places: Mapping[tuple[Any, ...], str]
) -> str:
    """Return the table of means over seeds, of rows grouped by covariance and place."""
    means = rows.mean()
    lines = {name_of(name): [f"{means[(name, *place)]:.1e}" for place in places] for name in names}
    return table_of_lines(corner, list(places.values()), lines)


def _cifar10(record: Row) -> str:
    """Bits/dim of every head for two schedules, and where OCM is above another."""
    counts = [K for K in (5, 10, 25, 50) if K in record["settings"]["step_counts"]]
    places = {(schedule, K): f"{schedule}, K = {K}" for schedule in _SCHEDULES for K in counts}
    bits: dict[str, dict[tuple[str, int], str]] = {}
    for row in record["rows"]:
        cells = bits.setdefault(cifar10.name_of(row), {})
        cells[row["schedule"], row["K"]] = f"{row['bits_per_dim']:.3f}"
    lines = {name: [cells[place] for place in places] for name, cells in bits.items()}
    table = table_of_lines("covariance", list(places.values()), lines)
    return f"{table}\n\n{cifar10.claims(record)}"


def _cifar10_samples(record: Row) -> str:
    """Fréchet distances at equal numbers of network evaluations, for both schedules."""
    rows = record["equal_evaluations"]
    tables = [
        f"{name.capitalize()} schedule:\n\n{budget.table(cifar10.of_schedule(rows, name))}"
        for name in _SCHEDULES
    ]
    pictures = [
        "![Bits/dim above OCM, samples, and equal evaluations](cpu/cifar10.png)",
        "![Samples of ten steps from the same noise](cpu/cifar10_cosine_ddpm_10.png)",
    ]
    return "\n\n".join([*tables, *pictures])


def _digits_samples(record: Row) -> str:
    return (
        f"{budget.table(record['equal_evaluations'])}\n\n{structure(record)}\n\n"
        "![Energy off the diagonal, and asymmetry](cpu/digits_full.png)"
    )


def _sampling(record: Row) -> str:
    rows = [
        row | {"time over a plain step": row["over_plain"]}
        for row in record["rows"]
        if row["covariance"] != "beta_tilde"
    ]
    columns = {"network": "", "covariance": "", "passes": "d", "time over a plain step": ".3f"}
    return markdown_table(rows, columns)


def _machine_code(record: Row) -> str:
    rows = [
        row | {"instructions an element": row["instructions_per_element"]} for row in record["rows"]
    ]
    return markdown_table(rows, {"kernel": "", "instructions an element": ".1f", "budget": ".0f"})


BLOCKS = {
    "demo": Block("demo/metrics.json", likelihood, "make demo"),
    "products": Block("cpu/products.json", _products),
    "estimators": Block("cpu/estimators.json", _estimators),
    "mixtures": Block("cpu/mixtures.json", _mixtures),
    "cifar10": Block("cpu/cifar10.json", _cifar10),
    "cifar10-samples": Block("cpu/cifar10.json", _cifar10_samples),
    "digits": Block("cpu/digits.json", _digits),
    "digits-samples": Block("cpu/digits.json", _digits_samples),
    "machine-code": Block("cpu/machine_code.json", _machine_code),
    "sampling": Block("cpu/sampling.json", _sampling),
}


def rendered(name: str) -> str:
    """Return what the block of that name holds: its figures, and where they come from.

    Raises:
        ValueError: If there is no block of that name, or neither it nor its record names a command.
    """
    if name not in BLOCKS:
        raise ValueError(f"figures must be one of {', '.join(BLOCKS)}, got {name!r}")
    block = BLOCKS[name]
    record = json.loads((RESULTS / block.record).read_text())
    command = block.command or record.get("command")
    if command is None:
        raise ValueError(f"{block.record} names no command; state one in BLOCKS[{name!r}]")
    commit = record["environment"]["commit"][:7]
    return f"\n{block.render(record)}\n\n_`{command}` at {commit}_\n\n"


def filled(text: str) -> str:
    """Return a document with all of its blocks filled in.

    Raises:
        ValueError: If a block has no known name or no end, or ends without having begun.
    """
    starts, ends = text.count("<!-- figures:"), text.count("<!-- end -->")
    if not len(_BLOCK.findall(text)) == starts == ends:
        raise ValueError(
            f"every <!-- figures: NAME --> must have its <!-- end -->, got {starts} and {ends}"
        )
    return _BLOCK.sub(lambda found: found[1] + rendered(found["name"]) + found[3], text)


def write(*, check: bool = False) -> list[str]:
    """Write the blocks of all documents, and return the names of those that differed.

    Args:
        check: Whether to write nothing.
    """
    differing = {document: filled(document.read_text()) for document in DOCUMENTS}
    differing = {file: text for file, text in differing.items() if file.read_text() != text}
    if not check:
        for file, text in differing.items():
            file.write_text(text)
    return [str(file.relative_to(ROOT)) for file in differing]
