"""Tables of the experiment on mixtures, from its record."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ocm.covariances.names import label
from ocm.evaluation.environment import Row
from ocm.evaluation.markdown import markdown_table, table_of_lines

_UNITS = {"preconditioned": "", "paper": ", the papers' units", "": ""}
_HEADS = ("npr", "sn", "iddpm")


def name_of(covariance: str, parameterisation: str = "") -> str:
    """Return how a covariance of the experiment is written.

    Example:
        >>> name_of("hutchinson-10"), name_of("ocm", "paper")
        ('Hutchinson, M = 10', "OCM head, the papers' units")
    """
    if covariance.startswith("hutchinson-"):
        return f"Hutchinson, M = {covariance.removeprefix('hutchinson-')}"
    return label(covariance) + _UNITS[parameterisation]


def by_seed(rows: Sequence[Row], key: Callable[[Row], Any], value: str) -> dict[Any, list[float]]:
    """Return the values of all seeds for each key, in the order of the rows.

    Example:
        >>> rows = [{"K": 5, "mmd": 0.1}, {"K": 5, "mmd": 0.3}]
        >>> by_seed(rows, lambda row: row["K"], "mmd")
        {5: [0.1, 0.3]}
    """
    values: dict[Any, list[float]] = {}
    for row in rows:
        values.setdefault(key(row), []).append(row[value])
    return values


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean, and the standard deviation over seeds where there are several.

    Example:
        >>> mean_and_spread([0.010, 0.014])
        '1.2e-02 ± 2.8e-03'
    """
    mean = f"{statistics.fmean(values):.{digits}e}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}e}"


def tables(record: Mapping[str, Any]) -> str:
    """Return the tables of the record in Markdown."""
    settings, seeds = record["settings"], len(record["seeds"])
    sections = [
        f"Mixtures of Gaussians in the plane, {record['schedule']} schedule, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}: means ± the standard deviation over them. A head "
        f"sees {settings['head_steps']} steps of {settings['head_batch_size']} points with one "
        f"probe a target; a learned score {settings['denoiser_steps']} steps of "
        f"{settings['denoiser_batch_size']}.",
        "## Error of the variance",
        "Mean squared error of Var[x0 | x_t] over the mean squared variance, "
        f"{settings['num_test']} points a noise level, a fifth of them for Hutchinson. On the nine "
        "Gaussians with the true score Hutchinson is exact: the density is a product.",
    ]
    for score in ("true", "learned"):
        for mixture in _mixtures(record):
            rows = _of(record["errors"], mixture, score)
            values = by_seed(
                rows,
                lambda r: (name_of(r["covariance"], r["parameterisation"]), r["t"]),
                "relative",
            )
            sections.append(f"**{mixture}, {score} score**")
            sections.append(_table(values, "covariance", [f"t = {t}" for t in _axis(values)]))
            sections.append(_comparison(rows, score))
    sections += [
        "## Samples in few steps",
        "Squared maximum mean discrepancy to the mixture with a Gaussian kernel, exp(-|a - b|^2 / "
        f"(2 h^2)) with h = {settings['bandwidth']:g}, the means over the mixture in closed form: "
        f"{settings['num_samples']} samples of the true score a cell and seed. It is unbiased, and "
        "negative by chance where nothing is left to see.",
    ]
    for mixture in _mixtures(record):
        rows = _of(record["samples"], mixture, "true")
        (chance,) = by_seed(
            [r for r in rows if r["sampler"] == "data"], lambda r: "data", "mmd"
        ).values()
        for sampler in ("ddpm", "ddim"):
            cells = [r for r in rows if r["sampler"] == sampler]
            values = by_seed(cells, lambda r: (name_of(r["covariance"]), r["K"]), "mmd")
            sections.append(f"**{mixture}, {sampler.upper()}**")
            sections.append(_table(values, "covariance", [f"K = {K}" for K in _axis(values)]))
        sections.append(f"As many draws of the {mixture} itself: {mean_and_spread(chance)}.")
    sections += _checks(record)
    return "\n\n".join(sections)


def quoted(record: Mapping[str, Any]) -> str:
    """Return errors at some noise levels, and samples of five and ten steps: means over seeds."""
    heads = ("iddpm", "npr", "sn", "ocm")
    levels = {(t,): f"t = {t}" for t in (5, 100, 300, 500, 700, 1000)}
    tables = []
    for mixture, more in (("nine Gaussians", ()), ("correlated mixture", ("hutchinson-10",))):
        rows = _of(record["errors"], mixture, "true")
        errors = by_seed(
            [row for row in rows if row["parameterisation"] != "paper"],
            lambda row: (row["covariance"], row["t"]),
            "relative",
        )
        tables.append(_means(mixture, errors, ("analytic", *more, *heads), levels))
    places = {
        (mixture, sampler, K): f"{mixture.split()[0]}, {sampler.upper()}, {K}"
        for mixture in ("nine Gaussians", "correlated mixture")
        for sampler in ("ddpm", "ddim")
        for K in (5, 10)
    }
    samples = by_seed(
        record["samples"],
        lambda row: (row["covariance"], row["mixture"], row["sampler"], row["K"]),
        "mmd",
    )
    names = ("beta", "beta_tilde", "analytic", *heads, "exact", "lanczos", "full")
    sections = [
        "Relative squared error of Var[x0 | x_t] with the true score, mean of "
        f"{len(record['seeds'])} seeds:",
        *tables,
        _means("MMD² of samples, K", samples, names, places),
        "![Error of every covariance against the noise level](cpu/mixtures.png)",
        "![Distance of samples from the mixtures against the number of steps]"
        "(cpu/mixtures_samples.png)",
    ]
    return "\n\n".join(sections)


def _means(
    corner: str,
    values: Mapping[Any, Sequence[float]],
    names: Sequence[str],
    places: Mapping[tuple[Any, ...], str],
) -> str:
    """Return the table of means over seeds of values by covariance and place."""
    lines = {
        name_of(name): [f"{statistics.fmean(values[(name, *place)]):.1e}" for place in places]
        for name in names
    }
    return table_of_lines(corner, list(places.values()), lines)


def _checks(record: Mapping[str, Any]) -> list[str]:
    counts = record["settings"]["check_step_counts"]
    sections = [
        "## Diagonal against full",
        "Share of the energy of Cov[x0 | x_t] off its diagonal, E sum_{i != j} C_ij^2 over "
        "E sum_ij C_ij^2. What it costs samples to leave it out is the difference between the "
        "exact diagonal and the full covariance above.",
    ]
    shares = by_seed(record["off_diagonal"], lambda r: (r["mixture"], r["t"]), "share")
    sections.append(_table(shares, "mixture", [f"t = {t}" for t in _axis(shares)]))
    sections += [
        "## Scores that err",
        "Denoisers of shorter trainings, or with noise in the weights, in units of the standard "
        "deviation of each tensor. Errors are geometric means over the noise levels of "
        "E|score - true|^2 / E|true|^2 and of the variance's relative squared error; samples are "
        "DDPM's. First seed.",
    ]
    names = ("beta", "analytic", "exact", "full")
    for mixture in _mixtures(record):
        columns: dict[str, Callable[[Row], str]] = {
            "degradation": lambda r: _degradation(r),
            "score": lambda r: f"{r['score_error']:.1e}",
            "exact diagonal": lambda r: f"{r['variance_error_exact']:.1e}",
            "analytic": lambda r: f"{r['variance_error_analytic']:.1e}",
        }
        for K in counts:
            for name in names:
                key = f"mmd_{name}_{K}"
                columns[f"MMD² of {label(name)}, K = {K}"] = partial(_number, key)
        sections.append(f"**{mixture}**")
        sections.append(_plain(_of(record["degraded"], mixture, "learned"), columns))
    sections += [
        "## One head, two samplers, other backbones",
        "The OCM head is trained once. On the backbone of another seed its features mean other "
        "things; kept with its own backbone, at one pass more, it serves that one's mean as it is. "
        "Errors and samples as above.",
    ]
    for mixture in _mixtures(record):
        columns = {
            "backbone of the mean": lambda r: r["backbone"],
            "covariance": lambda r: r["covariance"],
            "error of the variance": lambda r: f"{r['variance_error']:.1e}",
        }
        for sampler in ("ddpm", "ddim"):
            for K in counts:
                key = f"mmd_{sampler}_{K}"
                columns[f"MMD² of {sampler.upper()}, K = {K}"] = partial(_number, key)
        sections.append(f"**{mixture}**")
        sections.append(_plain(_of(record["one_head"], mixture, "learned"), columns))
    return sections


def _number(key: str, row: Row) -> str:
    return f"{row[key]:.1e}"


def _degradation(row: Row) -> str:
    if row["degradation"] == "none":
        return "none"
    if row["degradation"] == "training steps":
        return f"{row['amount']:.0f} training steps"
    return f"{row['degradation']}, {row['amount']:g}"


def other_way(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Return the noise levels at which OCM's mean error is not below that of another covariance.

    Args:
        rows: Errors of one mixture and score; heads in the same units.
    """
    means = {
        key: statistics.fmean(values)
        for key, values in by_seed(
            [row for row in rows if row["parameterisation"] != "paper"],
            lambda row: (row["covariance"], row["t"]),
            "relative",
        ).items()
    }
    others = dict.fromkeys(name for name, _ in means if name != "ocm")
    return {
        other: [t for name, t in means if name == other and means[other, t] <= means["ocm", t]]
        for other in others
    }


def _comparison(rows: Sequence[Row], score: str) -> str:
    found = other_way(rows)
    below = [label(name) for name in (*_HEADS, "analytic") if not found[name]]
    parts = [f"OCM is below {_listed(below)} at every noise level."] if below else []
    above = [
        f"{name_of(name)} at t = {_listed([str(t) for t in found[name]])}"
        for name in (*_HEADS, "analytic", "hutchinson-10")
        if found.get(name)
    ]
    if above:
        parts.append(f"Not above OCM: {'; '.join(above)}.")
    return " ".join(parts)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _of(rows: Sequence[Row], mixture: str, score: str) -> list[Row]:
    return [row for row in rows if (row["mixture"], row["score"]) == (mixture, score)]


def _mixtures(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["mixture"] for row in record["errors"]))


def _axis(values: Mapping[Any, Any]) -> list[int]:
    return sorted({place for _, place in values})


def _table(values: Mapping[Any, Sequence[float]], first: str, columns: Sequence[str]) -> str:
    places = _axis(values)
    lines = {
        name: [mean_and_spread(values[name, place]) for place in places]
        for name in dict.fromkeys(name for name, _ in values)
    }
    return table_of_lines(first, columns, lines)


def _plain(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    first, *others = columns
    cells = [{name: cell(row) for name, cell in columns.items()} for row in rows]
    return markdown_table(cells, {first: ""} | dict.fromkeys(others, ">"))
