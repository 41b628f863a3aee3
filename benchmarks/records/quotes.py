"""Write the recorded figures into the documents: ``python benchmarks/records quotes``.

A document quotes a record between two comments,

    <!-- figures: NAME -->
    <!-- end -->

and this fills in what the function of that name in :data:`BLOCKS` makes of the record, with the
command and the commit that the figures come from. Nothing between the comments is written by hand:
a test fails where it differs from the record.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cifar10.report import claims as cifar10_claims
from harness import budget
from mixtures.report import by_seed, name_of
from suites.digits import likelihood, structure

from ocm.checkpoints.catalogue import CALIBRATED
from ocm.evaluation.environment import Row
from ocm.evaluation.pictures import label

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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


def _demo(record: Row) -> str:
    return likelihood(record)


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
    lines = ["| t of 1000 | M = 4 | 12 | 48 | 192 | time at the error of M = 48 |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for row in record["time_to_error"]:
        if row["colors"] == 48:
            cells = [f"{gains[row['t'], M]:.1f}" for M in (4, 12, 48, 192)]
            times = f"{row['times_faster']:.0f} times"
            lines.append(f"| {row['t']} | {' | '.join(cells)} | {times} |")
    return "\n".join(lines)


def _digits(record: Row) -> str:
    names = ("beta", "analytic", "iddpm", "npr", "sn", "ocm", "exact", "cosine", "full")
    return likelihood(record, [*names, *(f"{n}_calibrated" for n in names)], errors=False)


def _mixtures(record: Row) -> str:
    """Errors at some noise levels, and samples of five and ten steps: means over seeds."""
    levels, counts = (5, 100, 300, 500, 700, 1000), (5, 10)
    heads = ("iddpm", "npr", "sn", "ocm")
    parts = []
    for mixture, more in (("nine Gaussians", ()), ("correlated mixture", ("hutchinson-10",))):
        errors = by_seed(
            [
                row
                for row in record["errors"]
                if (row["mixture"], row["score"]) == (mixture, "true")
                and row["parameterisation"] != "paper"
            ],
            lambda row: (row["covariance"], row["t"]),
            "relative",
        )
        columns = [f"t = {t}" for t in levels]
        lines = [f"| {mixture} | {' | '.join(columns)} |", "|:---|" + "---:|" * len(levels)]
        for name in ("analytic", *more, *heads):
            cells = [f"{fmean(errors[name, t]):.1e}" for t in levels]
            lines.append(f"| {name_of(name)} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    places = [
        (mixture, sampler, K)
        for mixture in ("nine Gaussians", "correlated mixture")
        for sampler in ("ddpm", "ddim")
        for K in counts
    ]
    columns = [f"{mixture.split()[0]}, {sampler.upper()}, {K}" for mixture, sampler, K in places]
    lines = [f"| MMD² of samples, K | {' | '.join(columns)} |", "|:---|" + "---:|" * len(places)]
    samples = by_seed(
        record["samples"],
        lambda row: (row["covariance"], row["mixture"], row["sampler"], row["K"]),
        "mmd",
    )
    for name in ("beta", "beta_tilde", "analytic", *heads, "exact", "lanczos", "full"):
        cells = [f"{fmean(samples[(name, *place)]):.1e}" for place in places]
        lines.append(f"| {name_of(name)} | {' | '.join(cells)} |")
    return (
        "Relative squared error of Var[x0 | x_t] with the true score, "
        f"mean of {len(record['seeds'])} seeds:\n\n"
        + "\n\n".join([*parts, "\n".join(lines)])
        + "\n\n![Error of every covariance against the noise level]"
        "(benchmarks/results/cpu/mixtures.png)"
        "\n\n![Distance of samples from the mixtures against the number of steps]"
        "(benchmarks/results/cpu/mixtures_samples.png)"
    )


def _cifar10(record: Row) -> str:
    """Bits/dim of every head for two schedules, and where OCM is above another."""
    counts = [K for K in (5, 10, 25, 50) if K in record["settings"]["step_counts"]]
    schedules = ("linear", "cosine")
    bits = {
        (row["covariance"], row["calibrated"], row["schedule"], row["K"]): row["bits_per_dim"]
        for row in record["rows"]
    }
    columns = [f"{schedule}, K = {K}" for schedule in schedules for K in counts]
    lines = [f"| covariance | {' | '.join(columns)} |", "|:---|" + "---:|" * len(columns)]
    for name, is_calibrated in dict.fromkeys(key[:2] for key in bits):
        cells = [
            f"{bits[name, is_calibrated, schedule, K]:.3f}"
            for schedule in schedules
            for K in counts
        ]
        written = label(name + (CALIBRATED if is_calibrated else ""))
        lines.append(f"| {written} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + cifar10_claims(record)


def _cifar10_samples(record: Row) -> str:
    """Fréchet distances at equal numbers of network evaluations, for both schedules."""
    parts = []
    for schedule in ("linear", "cosine"):
        rows = [row for row in record["equal_evaluations"] if row["schedule"] == schedule]
        parts.append(f"{schedule.capitalize()} schedule:\n\n{budget.table(rows)}")
    return (
        "\n\n".join(parts)
        + "\n\n![Bits/dim above OCM, samples, and equal evaluations](cpu/cifar10.png)"
        "\n\n![Samples of ten steps from the same noise](cpu/cifar10_cosine_ddpm_10.png)"
    )


def _digits_samples(record: Row) -> str:
    return (
        f"{budget.table(record['equal_evaluations'])}\n\n{structure(record)}\n\n"
        "![Energy off the diagonal, and asymmetry](cpu/digits_full.png)"
    )


def _sampling(record: Row) -> str:
    lines = ["| network | covariance | passes | time over a plain step |", "|:---|:---|---:|---:|"]
    lines += [
        f"| {row['network']} | {row['covariance']} | {row['passes']} | {row['over_plain']:.3f} |"
        for row in record["rows"]
        if row["covariance"] != "beta_tilde"
    ]
    return "\n".join(lines)


def _machine_code(record: Row) -> str:
    lines = ["| kernel | instructions an element | budget |", "|:---|---:|---:|"]
    lines += [
        f"| {row['kernel']} | {row['instructions_per_element']:.1f} | {row['budget']:.0f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines)


BLOCKS = {
    "demo": Block("demo/metrics.json", _demo, "make demo"),
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


def main() -> None:
    """Parse the command line and write the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    arguments = parser.parse_args()
    differing = []
    for document in DOCUMENTS:
        text = document.read_text()
        new = filled(text)
        if new != text:
            differing.append(str(document.relative_to(ROOT)))
            if not arguments.check:
                document.write_text(new)
    print(f"{'differs' if arguments.check else 'written'}: {', '.join(differing) or 'nothing'}")
    if arguments.check and differing:
        sys.exit(1)
