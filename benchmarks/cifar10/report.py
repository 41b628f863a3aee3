"""Tables of the CIFAR-10 experiment, from its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import budget

from ocm.covariances.names import CALIBRATED, label
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table, table_of_lines

# With which covariances OCM is compared in bits/dim, and at which numbers of steps.
RIVALS = ("analytic", "iddpm", "npr", "sn")
SAMPLER_NAMES = {"ddpm": "DDPM", "ddim": "DDIM"}
_CLAIMED_STEPS = (10, 25)
# What was tried before the settings of the heads were chosen.
_TRIED = Path(__file__).parents[1] / "results" / "cpu" / "cifar10_tried.json"


def tables(record: Row) -> str:
    """Return the tables of a record, in Markdown."""
    settings, training = record["settings"], record["training"][0]
    parameters = training["parameters"]
    sections = [
        f"{record['data']} Here at {settings['image_size']}x{settings['image_size']} pixels.",
        f"Denoiser: a U-Net of {parameters['denoiser'] / 1e6:.2f} million parameters, "
        f"{settings['denoiser']['num_steps']} steps of {settings['denoiser']['batch_size']}; "
        f"heads: {settings['head_kind']}, {parameters['head']} parameters, "
        f"{settings['heads']['num_steps']} steps of {settings['heads']['batch_size']}. Standard "
        f"errors are over {settings['num_scored'] // settings['group']} groups of "
        f"{settings['group']} test images, the same noisy ones for every cell.",
        claims(record),
    ]
    for schedule in schedules_of(record):
        sections += [
            f"**{schedule} schedule, bits/dim**",
            _by_steps(
                of_schedule(record["rows"], schedule), lambda row: f"{row['bits_per_dim']:.3f}"
            ),
            "The same minus OCM's, calibrated ones minus the calibrated OCM's, ± the standard "
            "error of the difference",
            _by_steps(of_schedule(record["rows"], schedule), _difference),
        ]
        sections += _sample_tables(record, schedule)
        sections += [
            "Seconds for 1,000 images by DDPM",
            _by_steps(
                of_schedule(record["quality"], schedule, "ddpm"),
                lambda row: f"{row['seconds_per_1000_images']:.1f}",
            ),
            "Cost of a DDPM step over one with β̃",
            markdown_table(of_schedule(record["costs"], schedule), _COST_COLUMNS),
            "At equal network evaluations, a Jacobian product counting as one: Fréchet distance "
            f"of {record['equal_evaluations'][0]['num_images']} samples (K steps)",
            budget.table(of_schedule(record["equal_evaluations"], schedule)),
        ]
    return "\n\n".join([*sections, *_validation(record)])


_COST_COLUMNS = {
    "covariance": "",
    "batch": "d",
    "milliseconds": ".2f",
    "over_plain": ".3f",
    "over_plain_of_minima": ".3f",
}


def claims(record: Row) -> str:
    """Return where, at K = 10 and 25, OCM's bits/dim are above those of another covariance."""
    compared = [
        row for row in record["rows"] if row["K"] in _CLAIMED_STEPS and row["covariance"] in RIVALS
    ]
    against = [row for row in compared if row["minus_ocm"] < 0]
    heading = (
        f"OCM against {', '.join(label(name) for name in RIVALS)} in bits/dim at K = 10 and 25, "
        f"plain and calibrated: at or below the other in {len(compared) - len(against)} of "
        f"{len(compared)} cells"
    )
    if not compared:
        return "No K of 10 or 25 was scored."
    if not against:
        return f"{heading}; there is none where it is above."
    lines = [f"{heading}. Above in:"]
    for row in against:
        excess, error = -row["minus_ocm"], row["minus_ocm_standard_error"]
        verdict = "more than two" if excess >= 2 * error else "a tie within two"
        name = name_of(row)
        lines.append(
            f"- {row['schedule']}, K = {row['K']}, {name}: OCM is above by {excess:.4f} ± "
            f"{error:.4f}, {verdict} standard errors."
        )
    if any(row["covariance"] == "npr" for row in against):
        lines.append(
            "\nNPR's targets are the errors of the learned mean, which the bound scores; OCM's are "
            "the covariance around a perfect mean, which is smaller by what the denoiser has not "
            "learned. Calibration, two numbers a timestep, makes up for a part of it."
        )
    return "\n".join(lines)


def quoted(record: Row) -> str:
    """Return bits/dim of every head for two schedules, and where OCM is above another."""
    counts = [K for K in (5, 10, 25, 50) if K in record["settings"]["step_counts"]]
    places = {
        (schedule, K): f"{schedule}, K = {K}" for schedule in schedules_of(record) for K in counts
    }
    bits: dict[str, dict[tuple[str, int], str]] = {}
    for row in record["rows"]:
        cells = bits.setdefault(name_of(row), {})
        cells[row["schedule"], row["K"]] = f"{row['bits_per_dim']:.3f}"
    lines = {name: [cells[place] for place in places] for name, cells in bits.items()}
    table = table_of_lines("covariance", list(places.values()), lines)
    return f"{table}\n\n{claims(record)}"


def quoted_samples(record: Row) -> str:
    """Return Fréchet distances at equal numbers of network evaluations, for both schedules."""
    rows = record["equal_evaluations"]
    tables = [
        f"{name.capitalize()} schedule:\n\n{budget.table(of_schedule(rows, name))}"
        for name in schedules_of(record)
    ]
    pictures = [
        "![Bits/dim above OCM, samples, and equal evaluations](cpu/cifar10.png)",
        "![Samples of ten steps from the same noise](cpu/cifar10_cosine_ddpm_10.png)",
    ]
    return "\n\n".join([*tables, *pictures])


def schedules_of(record: Row) -> list[str]:
    """Return the schedules of a record, in its order."""
    return list(dict.fromkeys(row["schedule"] for row in record["rows"]))


def of_schedule(rows: Sequence[Row], schedule: str, sampler: str | None = None) -> list[Row]:
    """Return the rows of one schedule, and of one sampler if it is given."""
    return [
        row
        for row in rows
        if row["schedule"] == schedule and (sampler is None or row["sampler"] == sampler)
    ]


def key_of(row: Row) -> str:
    """Return the name of a row's covariance, with the ending of calibrated ones.

    Example:
        >>> key_of({"covariance": "ocm", "calibrated": True})
        'ocm_calibrated'
    """
    return str(row["covariance"]) + (CALIBRATED if row["calibrated"] else "")


def name_of(row: Row) -> str:
    """Return how the covariance of a row is written."""
    return label(key_of(row))


def _by_steps(rows: Sequence[Row], cell: Any) -> str:
    """Return a table of a line for each covariance and a column for each K."""
    table: dict[str, Row] = {}
    for row in rows:
        cells = table.setdefault(name_of(row), {"covariance": name_of(row)})
        cells[f"K = {row['K']}"] = cell(row)
    steps = sorted({row["K"] for row in rows})
    return markdown_table(
        list(table.values()), {"covariance": ""} | {f"K = {K}": "" for K in steps}
    )


def _difference(row: Row) -> str:
    if row["covariance"] == "ocm":
        return "0"
    return f"{row['minus_ocm']:+.4f} ± {row['minus_ocm_standard_error']:.4f}"


def _sample_tables(record: Row, schedule: str) -> list[str]:
    held_out = record["features"]["held_out"]
    sections = [
        f"Features: {record['features']['name']}, right on {record['features']['accuracy']:.1%} of "
        f"the test images. Samples are compared with {record['features']['num_real']} training "
        f"images, from which {held_out['num_images']} test images are at a Fréchet distance of "
        f"{held_out['frechet']:.3f} (precision {held_out['precision']:.2f}, recall "
        f"{held_out['recall']:.2f}); fewer of them would be further."
    ]
    for sampler, name in SAMPLER_NAMES.items():
        rows = of_schedule(record["quality"], schedule, sampler)
        if rows:
            counts = {row["K"]: row["num_samples"] for row in rows}
            numbers = ", ".join(f"{count} at K = {K}" for K, count in counts.items())
            sections += [
                f"Fréchet distance of {name} samples (precision, recall); a cell has {numbers}. "
                f"The noise of the last noisy step is at most {rows[0]['last_noise_levels']:g} of "
                "256 grey levels on average",
                _by_steps(
                    rows,
                    lambda row: (
                        f"{row['frechet']:.3f} ({row['precision']:.2f}, {row['recall']:.2f})"
                    ),
                ),
            ]
    return sections


def _validation(record: Row) -> list[str]:
    """Return what was chosen on validation images, and how the choice does there."""
    validation = record["validation"]
    rows = [row | {"calibrated": False} for row in validation["rows"]]
    tried = json.loads(_TRIED.read_text())["rows"]
    sections = [
        f"**Chosen on {validation['images']}**",
        "Tried before this run on such images of the reduced size, bits/dim of 128 of them",
        markdown_table(tried, dict.fromkeys(tried[0], "") | {"K = 10": ".4f", "K = 25": ".4f"}),
    ]
    for schedule in schedules_of(record):
        sections += [
            f"The heads of this run there, bits/dim, {schedule} schedule",
            _by_steps(of_schedule(rows, schedule), lambda row: f"{row['bits_per_dim']:.3f}"),
        ]
    return sections
