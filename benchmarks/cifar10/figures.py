"""Pictures of the CIFAR-10 experiment, from its record and the samples beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import budget

from cifar10.report import RIVALS, SAMPLER_NAMES, key_of, name_of, of_schedule, schedules_of
from ocm.evaluation.environment import Row
from ocm.evaluation.pictures import evaluation_plot, sample_rows, style

# Up to how many steps samples are shown.
_MOST_SHOWN_STEPS = 25
# Of what is no covariance of `ocm.evaluation.pictures`, black as Okabe and Ito's palette has it.
_SOLVERS = {"DPM-Solver++": ("#000000", "x"), "Heun": ("#000000", "+")}


def plot_curves(record: Row, path: Path) -> None:
    """Draw differences to OCM, samples and equal evaluations, a row of panels for each schedule.

    Likelihoods and samples themselves go beside it, a PNG for each schedule.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedules = schedules_of(record)
    figure, panels = plt.subplots(
        len(schedules), 3, figsize=(14, 5.4 * len(schedules)), squeeze=False, layout="constrained"
    )
    for (first, second, third), schedule in zip(panels, schedules, strict=True):
        _draw_differences(first, of_schedule(record["rows"], schedule))
        first.set_title(f"{schedule}: bits/dim minus OCM's", fontsize=10)
        _draw_samples(second, of_schedule(record["quality"], schedule, "ddpm"))
        second.set_title(f"{schedule}: DDPM samples", fontsize=10)
        _draw_budgets(third, of_schedule(record["equal_evaluations"], schedule))
        third.set_title(f"{schedule}: equal network evaluations", fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
    for schedule in schedules:
        evaluation_plot(
            _as_evaluation(record, schedule),
            path.with_name(f"{path.stem}_{schedule}.png"),
            title=f"CIFAR-10 (JPEG), {schedule} schedule",
        )


def _draw_differences(axis: Any, rows: Sequence[Row]) -> None:
    for cells, line in _lines([row for row in rows if row["covariance"] in RIVALS]):
        axis.errorbar(
            [row["K"] for row in cells],
            [row["minus_ocm"] for row in cells],
            [2 * row["minus_ocm_standard_error"] for row in cells],
            capsize=2,
            **line,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylabel("above OCM (± two standard errors)")
    _finish(axis, [row["K"] for row in rows], "steps K")


def _draw_samples(axis: Any, rows: Sequence[Row]) -> None:
    for cells, line in _lines(rows):
        axis.plot([row["K"] for row in cells], [row["frechet"] for row in cells], **line)
    axis.set_yscale("log")
    axis.set_ylabel("Fréchet distance")
    _finish(axis, [row["K"] for row in rows], "steps K")


def _lines(rows: Sequence[Row]) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Yield the rows of each covariance, plain and calibrated apart, and how they are drawn."""
    for key in dict.fromkeys((row["covariance"], row["calibrated"]) for row in rows):
        cells = [row for row in rows if (row["covariance"], row["calibrated"]) == key]
        colour, marker = style(key[0])
        yield (
            cells,
            {
                "color": colour,
                "marker": marker,
                "linestyle": "--" if key[1] else "-",
                "label": name_of(cells[0]),
            },
        )


def _draw_budgets(axis: Any, rows: Sequence[Row]) -> None:
    for key in dict.fromkeys((row["method"], row["sampler"]) for row in rows):
        cells = [row for row in rows if (row["method"], row["sampler"]) == key]
        # "lanczos, k = 3" is drawn as Lanczos is everywhere.
        colour, marker = _SOLVERS.get(key[0]) or style(key[0].split(",")[0])
        if "symmetric" in key[0]:
            marker = "*"
        axis.plot(
            [row["budget"] for row in cells],
            [row["frechet"] for row in cells],
            color=colour,
            marker=marker,
            linestyle=":" if key[1] == "ddim" else "-",
            label=budget.name_of(cells[0]),
        )
    axis.set_yscale("log")
    axis.set_ylabel("Fréchet distance")
    _finish(axis, [row["budget"] for row in rows], "network evaluations")


def _finish(axis: Any, ticks: Sequence[int], what: str) -> None:
    ticks = sorted(set(ticks))
    axis.set(xscale="log", xlabel=what)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8, handlelength=3.5
    )


def _as_evaluation(record: Row, schedule: str) -> Row:
    """Return the rows of a schedule in the form of ``ocm evaluate``'s record."""
    bits: dict[str, dict[int, float]] = {}
    for row in of_schedule(record["rows"], schedule):
        bits.setdefault(key_of(row), {})[row["K"]] = row["bits_per_dim"]
    samples: dict[str, dict[str, dict[int, Row]]] = {}
    for row in of_schedule(record["quality"], schedule):
        samples.setdefault(row["sampler"], {}).setdefault(key_of(row), {})[row["K"]] = row
    return {"nll_bits_per_dim": bits, "quality": samples}


def plot_samples(record: Row, work: Path, path: Path) -> None:
    """Draw the first samples of every covariance, a PNG for each schedule, sampler and K <= 25.

    Args:
        record: Of this suite.
        work: Where the samples of the same run are; where they are not, a line says so.
        path: Of the plot that these stand beside.
    """
    from safetensors.torch import load_file

    for old in path.parent.glob(f"{path.stem}_*_dd[ip]m_*.png"):
        old.unlink()
    for schedule, sampler, K, rows in _cells(record):
        stem = work / "parts" / f"{schedule}-samples-{sampler}-{K}"
        if not _is_of(stem.with_suffix(".json"), rows):
            print(f"{stem}.json is not of this record: its samples are not drawn")
            continue
        kept = load_file(stem.with_suffix(".safetensors"))
        images = {
            # On two lines: the margin is narrow.
            name_of(row).replace(", ", ",\n"): kept[key_of(row)]
            for row in rows
        }
        sample_rows(
            {name: pixels.float() / 127.5 - 1.0 for name, pixels in images.items()},
            path.with_name(f"{path.stem}_{schedule}_{sampler}_{K}.png"),
            title=f"{schedule} schedule, {SAMPLER_NAMES[sampler]}, K = {K}, the same noise",
        )


def _cells(record: Row) -> Iterator[tuple[str, str, int, list[Row]]]:
    keys = dict.fromkeys((r["schedule"], r["sampler"], r["K"]) for r in record["quality"])
    for schedule, sampler, K in keys:
        if K > _MOST_SHOWN_STEPS:
            continue
        rows = [row for row in of_schedule(record["quality"], schedule, sampler) if row["K"] == K]
        yield schedule, sampler, K, rows


def _is_of(file: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a part holds these rows."""
    if not file.exists():
        return False
    stored = json.loads(file.read_text())["result"]
    return [{"schedule": rows[0]["schedule"], **row} for row in stored] == list(rows)
