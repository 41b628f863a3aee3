"""Every head, plain and calibrated, on CIFAR-10 with two schedules; samplers at equal evaluations.

What is trained and scored is in ``benchmarks/cifar10``, whose three commands do the same. Here
the work is kept below ``.cache/benchmarks``, in a directory for each size, and goes on where it was
interrupted: on a GPU the full size, on a CPU a reduced one of 16x16 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar10 import commands as cifar10
from cifar10.sizes import FULL, QUICK, REDUCED
from cifar10.training import check_data, train_schedule
from harness import budget
from harness.timing import Setting, markdown

from ocm.checkpoints.catalogue import CALIBRATED
from ocm.evaluation.environment import Row
from ocm.evaluation.pictures import evaluation_plot, label, sample_rows, style

_CACHE = Path(__file__).parent.parent.parent / ".cache" / "benchmarks"
# Where OCM is compared with the others, and with which.
_CLAIMED_STEPS = (10, 25)
# Up to how many steps samples are shown.
_MOST_SHOWN_STEPS = 25
_RIVALS = ("analytic", "iddpm", "npr", "sn")
_SAMPLER_NAMES = {"ddpm": "DDPM", "ddim": "DDIM"}
# Of what is no covariance of `ocm.evaluation.pictures`, black as Okabe and Ito's palette has it.
_SOLVERS = {"DPM-Solver++": ("#000000", "x"), "Heun": ("#000000", "+")}


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables.

    Raises:
        ValueError: If CIFAR-10 is not in ``setting.data``.
    """
    full = FULL if setting.device.type == "cuda" else REDUCED
    size = QUICK if setting.quick else full
    check_data(setting.data)
    work = work_directory(size.name)
    cifar10.over_schedules(train_schedule, work, setting.data, size, setting.device)
    record = cifar10.evaluate(work, setting.data, size, setting.device)
    return record, report(record)


def work_directory(size: str) -> Path:
    """Return where the suite keeps what it trains and has finished."""
    return _CACHE / f"cifar10-{size}"


# Tables


def report(record: Row) -> str:
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
    for schedule in _schedules(record):
        sections += [
            f"**{schedule} schedule, bits/dim**",
            _by_steps(_of(record["rows"], schedule), lambda row: f"{row['bits_per_dim']:.3f}"),
            "The same minus OCM's, calibrated ones minus the calibrated OCM's, ± the standard "
            "error of the difference",
            _by_steps(_of(record["rows"], schedule), _difference),
        ]
        sections += _sample_tables(record, schedule)
        sections += [
            "Seconds for 1,000 images by DDPM",
            _by_steps(
                _of(record["quality"], schedule, "ddpm"),
                lambda row: f"{row['seconds_per_1000_images']:.1f}",
            ),
            "Cost of a DDPM step over one with β̃",
            markdown(_of(record["costs"], schedule), _COST_COLUMNS),
            "At equal network evaluations, a Jacobian product counting as one: Fréchet distance "
            f"of {record['equal_evaluations'][0]['num_images']} samples (K steps)",
            budget.table(_of(record["equal_evaluations"], schedule)),
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
        row for row in record["rows"] if row["K"] in _CLAIMED_STEPS and row["covariance"] in _RIVALS
    ]
    against = [row for row in compared if row["minus_ocm"] < 0]
    heading = (
        f"OCM against {', '.join(label(name) for name in _RIVALS)} in bits/dim at K = 10 and 25, "
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
        name = label(row["covariance"] + (CALIBRATED if row["calibrated"] else ""))
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


def _schedules(record: Row) -> list[str]:
    return list(dict.fromkeys(row["schedule"] for row in record["rows"]))


def _of(rows: Sequence[Row], schedule: str, sampler: str | None = None) -> list[Row]:
    return [
        row
        for row in rows
        if row["schedule"] == schedule and (sampler is None or row["sampler"] == sampler)
    ]


def _name(row: Row) -> str:
    return str(label(row["covariance"] + (CALIBRATED if row["calibrated"] else "")))


def _by_steps(rows: Sequence[Row], cell: Any) -> str:
    """Return a table of a line for each covariance and a column for each K."""
    table: dict[str, Row] = {}
    for row in rows:
        cells = table.setdefault(_name(row), {"covariance": _name(row)})
        cells[f"K = {row['K']}"] = cell(row)
    steps = sorted({row["K"] for row in rows})
    return markdown(list(table.values()), {"covariance": ""} | {f"K = {K}": "" for K in steps})


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
    for sampler, name in _SAMPLER_NAMES.items():
        rows = _of(record["quality"], schedule, sampler)
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
    sections = [f"**Chosen on {validation['images']}**"]
    if validation["tried"]:
        columns = dict.fromkeys(validation["tried"][0], "") | {"K = 10": ".4f", "K = 25": ".4f"}
        sections += [
            "Tried before this run on such images of the reduced size, bits/dim of 128 of them",
            markdown(validation["tried"], columns),
        ]
    for schedule in _schedules(record):
        sections += [
            f"The heads of this run there, bits/dim, {schedule} schedule",
            _by_steps(_of(rows, schedule), lambda row: f"{row['bits_per_dim']:.3f}"),
        ]
    return sections


# Plots


def plot(record: Row, path: Path) -> None:
    """Draw the curves, and the samples that are in the suite's work directory."""
    plot_curves(record, path)
    plot_samples(record, work_directory(record["settings"]["name"]), path)


def plot_curves(record: Row, path: Path) -> None:
    """Draw differences to OCM, samples and equal evaluations, a row of panels for each schedule.

    Likelihoods and samples themselves go beside it, a PNG for each schedule.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedules = _schedules(record)
    figure, panels = plt.subplots(
        len(schedules), 3, figsize=(14, 5.4 * len(schedules)), squeeze=False, layout="constrained"
    )
    for (first, second, third), schedule in zip(panels, schedules, strict=True):
        _draw_differences(first, _of(record["rows"], schedule))
        first.set_title(f"{schedule}: bits/dim minus OCM's", fontsize=10)
        _draw_samples(second, _of(record["quality"], schedule, "ddpm"))
        second.set_title(f"{schedule}: DDPM samples", fontsize=10)
        _draw_budgets(third, _of(record["equal_evaluations"], schedule))
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
    for cells, line in _lines([row for row in rows if row["covariance"] in _RIVALS]):
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
                "label": _name(cells[0]),
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
    for row in _of(record["rows"], schedule):
        name = row["covariance"] + (CALIBRATED if row["calibrated"] else "")
        bits.setdefault(name, {})[row["K"]] = row["bits_per_dim"]
    samples: dict[str, dict[str, dict[int, Row]]] = {}
    for row in _of(record["quality"], schedule):
        name = row["covariance"] + (CALIBRATED if row["calibrated"] else "")
        samples.setdefault(row["sampler"], {}).setdefault(name, {})[row["K"]] = row
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
            _name(row).replace(", ", ",\n"): kept[
                row["covariance"] + (CALIBRATED if row["calibrated"] else "")
            ]
            for row in rows
        }
        sample_rows(
            {name: pixels.float() / 127.5 - 1.0 for name, pixels in images.items()},
            path.with_name(f"{path.stem}_{schedule}_{sampler}_{K}.png"),
            title=f"{schedule} schedule, {_SAMPLER_NAMES[sampler]}, K = {K}, the same noise",
        )


def _cells(record: Row) -> Iterator[tuple[str, str, int, list[Row]]]:
    keys = dict.fromkeys((r["schedule"], r["sampler"], r["K"]) for r in record["quality"])
    for schedule, sampler, K in keys:
        if K > _MOST_SHOWN_STEPS:
            continue
        rows = [row for row in _of(record["quality"], schedule, sampler) if row["K"] == K]
        yield schedule, sampler, K, rows


def _is_of(file: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a part holds these rows."""
    if not file.exists():
        return False
    stored = json.loads(file.read_text())["result"]
    return [{"schedule": rows[0]["schedule"], **row} for row in stored] == list(rows)
