"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ocm.evaluation.pictures import label
from ocm.evaluation.samples import Quality
from ocm.evaluation.scores import Estimate


def likelihood_markdown(
    table: Mapping[str, Mapping[int, Estimate]], step_counts: Sequence[int]
) -> str:
    """Return a table of bits/dim by covariance and K, with the standard error over images.

    Example:
        >>> print(likelihood_markdown({"ocm": {10: Estimate(4.9, 0.1)}}, [10]))
        | covariance | K = 10 |
        |:---|---:|
        | OCM head | 4.900 ± 0.100 |
    """
    rows = {name: [_with_error(row[K]) for K in step_counts] for name, row in table.items()}
    return _markdown([f"K = {K}" for K in step_counts], rows)


def variance_error_markdown(errors: Mapping[str, Mapping[int, float]]) -> str:
    """Return a table of the variance's relative error by covariance and timestep.

    Example:
        >>> print(variance_error_markdown({"ocm": {5: 0.2, 500: 0.1}}))
        | covariance | t = 5 | t = 500 |
        |:---|---:|---:|
        | OCM head | 0.200 | 0.100 |
    """
    timesteps = list(next(iter(errors.values())))
    rows = {name: [f"{row[t]:.3f}" for t in timesteps] for name, row in errors.items()}
    return _markdown([f"t = {t}" for t in timesteps], rows)


def quality_markdown(table: Mapping[str, Mapping[int, Quality]], step_counts: Sequence[int]) -> str:
    """Return a table of Fréchet distances by covariance and K, with precision and recall.

    Example:
        >>> print(quality_markdown({"ocm": {10: Quality(1.25, 0.9, 0.8, 0.01)}}, [10]))
        | covariance | K = 10 |
        |:---|---:|
        | OCM head | 1.250 (0.90, 0.80) |
    """
    rows = {
        name: [
            f"{row[K].frechet:.3f} ({row[K].precision:.2f}, {row[K].recall:.2f})"
            for K in step_counts
        ]
        for name, row in table.items()
    }
    return _markdown([f"K = {K}" for K in step_counts], rows)


def _with_error(cell: Estimate) -> str:
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.3f}"
    return f"{cell.mean:.3f}{error}"


def _markdown(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [
        f"| covariance | {' | '.join(columns)} |",
        "|:---|" + "---:|" * len(columns),
        *(f"| {label(name)} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]
    return "\n".join(lines)
