"""Pictures of the experiment on mixtures, from its record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtures.report import by_seed, name_of
from ocm.evaluation.environment import Row
from ocm.evaluation.pictures import pyplot, save_figure, style

_SAMPLED = (
    *("beta", "beta_tilde", "analytic", "iddpm", "npr", "sn", "ocm", "exact", "full", "lanczos"),
)
_DASHES = {"hutchinson-1": ":", "hutchinson-10": "--", "hutchinson-100": "-", "lanczos": "--"}


def draw(record: Mapping[str, Any], directory: Path, stem: str = "mixtures") -> list[Path]:
    """Draw errors, samples and checks; return the files, whose names begin with ``stem``."""
    files = [directory / f"{name}.png" for name in (stem, f"{stem}_samples", f"{stem}_checks")]
    for make, file in zip((_errors, _samples, _checks), files, strict=True):
        make(record, file)
    return files


def _mixtures(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["mixture"] for row in record["errors"]))


def _band(
    axis: Any, values: Mapping[tuple[Any, int], Sequence[float]], key: Any, **line: Any
) -> None:
    """Draw the mean over seeds against the second part of the keys, and its range as a band."""
    places = sorted(place for name, place in values if name == key)
    seeds = [values[key, place] for place in places]
    axis.plot(places, [statistics.fmean(v) for v in seeds], markersize=4.5, **line)
    low, high = [min(v) for v in seeds], [max(v) for v in seeds]
    axis.fill_between(places, low, high, color=line["color"], alpha=0.15, linewidth=0)


def _line(covariance: str, parameterisation: str = "") -> dict[str, Any]:
    color, marker = style(covariance.split("-")[0])
    paper = parameterisation == "paper"
    return {
        "color": color,
        "marker": marker,
        "linestyle": ":" if paper else _DASHES.get(covariance, "-"),
        "markerfacecolor": "white" if paper else color,
        "linewidth": 2.4 if covariance == "ocm" and not paper else 1.2,
        "zorder": 4 if covariance == "ocm" else 3,
        "label": name_of(covariance, parameterisation),
    }


def _errors(record: Mapping[str, Any], file: Path) -> None:
    plt, mixtures = pyplot(), _mixtures(record)
    figure, axes = plt.subplots(
        2, len(mixtures), figsize=(11, 9), layout="constrained", sharey=True, squeeze=False
    )
    for row_of_axes, score in zip(axes, ("true", "learned"), strict=True):
        for axis, mixture in zip(row_of_axes, mixtures, strict=True):
            rows = [
                row
                for row in record["errors"]
                if (row["mixture"], row["score"]) == (mixture, score)
                and not _is_exact(row["covariance"], mixture, score)
            ]
            values = by_seed(
                rows, lambda r: ((r["covariance"], r["parameterisation"]), r["t"]), "relative"
            )
            for key in dict.fromkeys(key for key, _ in values):
                _band(axis, values, key, **_line(*key))
            axis.set(yscale="log", xlabel="timestep t", title=f"{mixture}, {score} score")
            axis.set_ylim(1e-8, 1e4)
            axis.grid(alpha=0.25)
        row_of_axes[0].set_ylabel("relative squared error of Var[x₀ | xₜ]")
    axes[0, 0].text(
        0.02, 0.02, "Hutchinson and the exact diagonal are exact here", fontsize=8,
        transform=axes[0, 0].transAxes,
    )  # fmt: skip
    _legend(figure, axes.flat)
    save_figure(figure, file)


def _is_exact(covariance: str, mixture: str, score: str) -> bool:
    """Whether an error is that of rounding, which no logarithmic axis shows beside the others."""
    if score != "true":
        return False
    return covariance == "exact" or (
        mixture == "nine Gaussians" and covariance.startswith("hutchinson")
    )


def _samples(record: Mapping[str, Any], file: Path) -> None:
    plt, mixtures = pyplot(), _mixtures(record)
    figure, axes = plt.subplots(
        2, len(mixtures), figsize=(11, 9), layout="constrained", sharey=True, squeeze=False
    )
    for row_of_axes, sampler in zip(axes, ("ddpm", "ddim"), strict=True):
        for axis, mixture in zip(row_of_axes, mixtures, strict=True):
            rows = [row for row in record["samples"] if row["mixture"] == mixture]
            # What draws of the mixture itself are off by: nothing can be seen below.
            chance = max(abs(row["mmd"]) for row in rows if row["sampler"] == "data")
            shown: list[Row] = [
                row | {"shown": max(row["mmd"], chance)}
                for row in rows
                if row["sampler"] == sampler
            ]
            values = by_seed(shown, lambda r: (r["covariance"], r["K"]), "shown")
            for name in _SAMPLED:
                _band(axis, values, name, **_line(name))
            axis.axhspan(chance / 3, chance, color="#999999", alpha=0.25, linewidth=0)
            counts = sorted({K for _, K in values})
            axis.set(xscale="log", yscale="log", xlabel="steps K")
            axis.set_title(f"{mixture}, {sampler.upper()}")
            axis.set_xticks(counts, [str(K) for K in counts])
            axis.xaxis.minorticks_off()
            axis.grid(alpha=0.25)
        row_of_axes[0].set_ylabel("MMD² of samples to the mixture (grey: chance)")
    _legend(figure, axes.flat)
    save_figure(figure, file)


def _checks(record: Mapping[str, Any], file: Path) -> None:
    plt, mixtures = pyplot(), _mixtures(record)
    K = record["settings"]["check_step_counts"][0]
    figure, axes = plt.subplots(
        1, len(mixtures) + 1, figsize=(14, 4.6), layout="constrained", squeeze=False
    )
    first, *rest = axes.flat
    shares = by_seed(record["off_diagonal"], lambda r: (r["mixture"], r["t"]), "share")
    for mixture, color, marker in zip(mixtures, ("#0072B2", "#D55E00"), ("o", "s"), strict=False):
        _band(first, shares, mixture, color=color, marker=marker, label=mixture)
    first.set(xlabel="timestep t", ylabel="share of the energy", title="Off the diagonal")
    first.legend(fontsize=8)
    for axis, mixture in zip(rest, mixtures, strict=True):
        rows = sorted(
            (row for row in record["degraded"] if row["mixture"] == mixture),
            key=lambda row: row["score_error"],
        )
        for name in ("beta", "analytic", "exact", "full"):
            for kind, filled in (("training steps", True), ("noise in the weights", False)):
                chosen = [row for row in rows if row["degradation"] in (kind, "none")]
                line = _line(name)
                if not filled:
                    line |= {"linestyle": ":", "markerfacecolor": "white", "label": None}
                axis.plot(
                    [row["score_error"] for row in chosen],
                    [max(row[f"mmd_{name}_{K}"], 1e-5) for row in chosen],
                    **line,
                )
        axis.set(xscale="log", yscale="log", xlabel="relative squared error of the score")
        axis.set_title(f"Scores that err, {mixture}")
        axis.xaxis.set_minor_formatter("")
        axis.legend(
            fontsize=8, title="solid: shorter training\ndotted: noisy weights", title_fontsize=8
        )
    rest[0].set_ylabel(f"MMD² of DDPM samples, K = {K}")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    save_figure(figure, file)


def _legend(figure: Any, axes: Any) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = math.ceil(len(entries) / 3)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8,
        handlelength=3.5,
    )  # fmt: skip
