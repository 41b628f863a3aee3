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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cifar10 import report as cifar10
from harness import budget
from heads import report as heads
from likelihoods import report as likelihoods
from mixtures import report as mixtures
from suites import attention, divergence, host, overhead
from suites.digits import likelihood, structure

from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table
from records import beside

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What is written by hand: the site's other folders are made when it is built.
DOCS = tuple(
    file for folder in (".", "guides", "explanations")
    for file in sorted((ROOT / "docs" / folder).glob("*.md"))
)  # fmt: skip
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md", *DOCS)

_BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two comments.

    Attributes:
        record: File below ``benchmarks/results``.
        render: Makes Markdown of the record.
        command: What made the record, where it does not say so itself.
        further: Other files below ``benchmarks/results``, which ``render`` takes after the record.
    """

    record: str
    render: Callable[..., str]
    command: str | None = None
    further: tuple[str, ...] = ()


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
    headings = {
        "instructions_per_element": "instructions an element",
        "cycles_per_element": "cycles an element",
        "ceiling": "ceiling, share of a copy",
    }
    rows = [
        row | {heading: row[key] for key, heading in headings.items()} for row in record["rows"]
    ]
    columns = dict(zip(headings.values(), (".1f", ".1f", ".0%"), strict=True))
    return markdown_table(rows, {"kernel": ""} | columns)


BLOCKS = {
    "demo": Block("demo/metrics.json", likelihood, "make demo"),
    "beside": Block(
        "cpu/estimators.json",
        beside.table,
        further=tuple(
            f"cpu/{name}.json" for name in ("products", "parameters", "inverse", "sampling")
        ),
    ),
    "products": Block("cpu/products.json", _products),
    "estimators": Block("cpu/estimators.json", _estimators),
    "mixtures": Block("cpu/mixtures.json", mixtures.quoted),
    "cifar10": Block("cpu/cifar10.json", cifar10.quoted),
    "cifar10-samples": Block("cpu/cifar10.json", cifar10.quoted_samples),
    "heads": Block("cpu/heads.json", heads.quoted),
    "likelihoods": Block("cpu/likelihoods.json", likelihoods.report),
    "divergence": Block("cpu/divergence.json", divergence.report),
    "digits": Block("cpu/digits.json", _digits),
    "digits-samples": Block("cpu/digits.json", _digits_samples),
    "host": Block("cpu/host.json", host.report),
    "overhead": Block("cpu/overhead.json", overhead.report),
    "attention": Block("cpu/attention.json", attention.report),
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
    files = (block.record, *block.further)
    records = [json.loads((RESULTS / file).read_text()) for file in files]
    sources = []
    for file, record in zip(files, records, strict=True):
        command = block.command or record.get("command")
        if command is None:
            raise ValueError(f"{file} names no command; state one in BLOCKS[{name!r}]")
        sources.append(f"`{command}` at {record['environment']['commit'][:7]}")
    return f"\n{block.render(*records)}\n\n_{', '.join(sources)}_\n\n"


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
    differing = [file for file in DOCUMENTS if filled(file.read_text()) != file.read_text()]
    for file in [] if check else differing:
        file.write_text(filled(file.read_text()))
    return [str(file.relative_to(ROOT)) for file in differing]
