"""The tables of the comparison of heads, and what they show in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ocm.covariances.names import NAMES
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import table_of_lines
from ocm.evaluation.pictures import pyplot, save_figure, style

TITLES = {"digits": "digits", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
# The numbers of steps of the tables; the head was trained on all of these but 100.
STEP_COUNTS = (5, 10, 25, 50, 100)
_PAPERS = "_papers"
# Bits/dim up to which the picture reaches.
_TALLEST = 2.0
# The likelihood head in another basis than the pixels, which stands beside the comparison.
FREQUENCY, FREQUENCY_LABEL = "frequency", "likelihood head in frequencies"


def title(row: Row) -> str:
    """Return how a row's data set and path are written."""
    return f"{TITLES[row['data']]}, {row['path']}"


def head_label(row: Row) -> str:
    """Return how a row's covariance is written.

    Example:
        >>> head_label({"covariance": "ocm_papers", "calibrated": True})
        "OCM head, papers' units, calibrated"
    """
    plain = row["covariance"].removesuffix(_PAPERS)
    parts = [FREQUENCY_LABEL if plain == FREQUENCY else NAMES[plain].label]
    if plain != row["covariance"]:
        parts.append("papers' units")
    return ", ".join([*parts, *["calibrated"] * row["calibrated"]])


def models(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the data sets and paths of rows, in their order."""
    return list(dict.fromkeys((row["data"], row["path"]) for row in rows))


def of_model(rows: Sequence[Row], model: tuple[str, str]) -> list[Row]:
    """Return the rows of a data set and path."""
    return [row for row in rows if (row["data"], row["path"]) == model]


def likelihood(rows: Sequence[Row]) -> str:
    """Return a table of bits/dim of one model, the lowest of each column in bold."""
    step_counts = list(dict.fromkeys(row["K"] for row in rows))
    lowest = {K: min(row["bits_per_dim"] for row in rows if row["K"] == K) for K in step_counts}
    lines: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{row['bits_per_dim']:.3f}"
        if cell == f"{lowest[row['K']]:.3f}":
            cell = f"**{cell}**"
        lines.setdefault(head_label(row), []).append(cell)
    return table_of_lines("bits/dim", [f"K = {K}" for K in step_counts], lines)


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Return how the likelihood head, plain, does against all others in pixels, by model and K.

    ``below`` says whether it is below every other, ``level`` whether none is below it by more than
    two paired standard errors; ``best`` is the lowest other, ``margin`` how far it is above.
    """
    found = []
    for data, path in models(rows):
        others = [
            row
            for row in of_model(rows, (data, path))
            if row["covariance"] not in ("ml", FREQUENCY)
        ]
        known = {row["K"] for row in others}
        for K in sorted(known & set(STEP_COUNTS) or known):
            cells = [row for row in others if row["K"] == K]
            best = min(cells, key=lambda row: row["above"])
            found.append(
                {
                    "data": data,
                    "path": path,
                    "K": K,
                    "below": best["above"] > 0,
                    "level": all(r["above"] >= -2 * r["above_standard_error"] for r in cells),
                    "best": head_label(best),
                    "margin": best["above"],
                    "margin_standard_error": best["above_standard_error"],
                }
            )
    return found


def summary(rows: Sequence[Row]) -> str:
    """Return in how many cells the likelihood head is the lowest, and where it is not."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        cells = verdicts([row for row in rows if row["data"] == data])
        below, level = (sum(cell[key] for cell in cells) for key in ("below", "level"))
        lines.append(
            f"- {TITLES[data]}: the likelihood head, uncalibrated, is below every other head in "
            f"pixels, plain or calibrated, in {below} of {len(cells)} cells, and no other is below "
            f"it by more than two paired standard errors in {level}."
        )
        lines += [
            f"  - {title(cell)}, K = {cell['K']}: {cell['best']} is lower by "
            f"{-cell['margin']:.4f} ± {cell['margin_standard_error']:.4f}."
            for cell in cells
            if not cell["below"]
        ]
    frequencies = [
        row
        for row in rows
        if row["covariance"] == FREQUENCY and not row["calibrated"] and row["K"] in STEP_COUNTS
    ]
    for model in models(frequencies):
        cells = of_model(frequencies, model)
        found = ", ".join(
            f"{row['above']:+.3f} ± {row['above_standard_error']:.3f}" for row in cells
        )
        lines.append(
            f"- {title(cells[0])}: {FREQUENCY_LABEL}, minus the one in pixels, at K = "
            f"{', '.join(str(row['K']) for row in cells)}: {found}."
        )
    return "\n".join(lines)


def units(rows: Sequence[Row]) -> str:
    """Return OCM's head in the default units and in the papers', beside β."""
    lines: dict[str, list[str]] = {}
    known = {row["K"] for row in rows}
    step_counts = sorted(known & set(STEP_COUNTS) or known)
    for model in models(rows):
        for name in ("beta", "ocm", "ocm_papers"):
            cells = {
                row["K"]: f"{row['bits_per_dim']:.3f}"
                for row in of_model(rows, model)
                if row["covariance"] == name and not row["calibrated"]
            }
            heading = f"{TITLES[model[0]]}, {model[1]}: "
            shown = {"beta": "β", "ocm": "OCM", "ocm_papers": "OCM, papers' units"}[name]
            if cells:  # the papers' units are infinite on a flow
                lines[heading + shown] = [cells[K] for K in step_counts]
    return table_of_lines("bits/dim", [f"K = {K}" for K in step_counts], lines)


def plot(record: Row, path: Path) -> None:
    """Draw bits/dim above the likelihood head's against K, a panel for each model."""
    rows = record["rows"]
    found = models(rows)
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=(3.6 * columns + 2.4, 3.1 * lines + 1.2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, model in zip(axes.flat, found, strict=False):
        _panel(axis, of_model(rows, model))
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines_of, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines_of, strict=True))
    figure.legend(handles.values(), handles, loc="outside right center", fontsize=8)
    figure.suptitle(
        "Bits/dim above the plain likelihood head, ± 2 paired standard errors; what is higher "
        "leaves the plot"
    )
    save_figure(figure, path)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    axis.axhline(0.0, color="#332288", linewidth=1)
    step_counts = sorted({row["K"] for row in rows})
    for name in ("iddpm", "npr", "sn", "ocm", "ml"):
        for calibrated in (False, True):
            cells = [
                row for row in rows if (row["covariance"], row["calibrated"]) == (name, calibrated)
            ]
            if not cells or (name == "ml" and not calibrated):
                continue
            colour, marker = style(name)
            axis.errorbar(
                [row["K"] for row in cells],
                [row["above"] for row in cells],
                [2 * row["above_standard_error"] for row in cells],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle="--" if calibrated else "-",
                label=head_label(cells[0]),
                linewidth=1,
            )
    axis.set(xscale="log", title=title(rows[0]), xlabel="steps K")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-0.1, _TALLEST)
    ticks = (-0.1, -0.01, 0.0, 0.01, 0.1, 1.0)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.minorticks_off()
    axis.set_xticks(step_counts, [str(K) for K in step_counts], fontsize=7)
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)


def quoted(record: Row) -> str:
    """Return what documents quote: the summary, and a table of one path of each data set."""
    rows = record["rows"]
    parts = [summary(rows)]
    for model in models(rows):
        if model[1] == "cosine":
            of_cosine = of_model(rows, model)
            parts += [f"Bits/dim of {title(of_cosine[0])}:", likelihood(of_cosine)]
    return "\n\n".join(parts)
