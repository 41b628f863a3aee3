"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ocm.covariances.names import label
from ocm.evaluation.samples import Quality
from ocm.evaluation.scores import Estimate


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    r"""Return rows as a Markdown table; a value that is None or missing leaves its cell empty.

    Args:
        rows: The rows.
        columns: Key of each column and the format of its values: "" for text, ">" for text on the
            right, else numbers, on the right too. Underscores of keys are shown as spaces.

    Example:
        >>> print(markdown_table([{"way": "a|b", "mean_ms": 1.25}], {"way": "", "mean_ms": ".1f"}))
        | way | mean ms |
        |:---|---:|
        | a\|b | 1.2 |
    """
    lines = [
        [_cell(key.replace("_", " "), "") for key in columns],
        *([_cell(row.get(key), spec) for key, spec in columns.items()] for row in rows),
    ]
    heading, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    rule = f"|{'|'.join('---:' if spec else ':---' for spec in columns.values())}|"
    return "\n".join([heading, rule, *body])


def _cell(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec).replace("|", r"\|")


def table_of_lines(corner: str, columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown table of lines with a title each, and cells on the right.

    Args:
        corner: Heading of the titles.
        columns: Headings of the cells.
        lines: Cells of every line by its title.

    Example:
        >>> print(table_of_lines("covariance", ["K = 5"], {"beta": ["1.2"]}))
        | covariance | K = 5 |
        |:---|---:|
        | beta | 1.2 |
    """
    rows = [
        {corner: title} | dict(zip(columns, cells, strict=True)) for title, cells in lines.items()
    ]
    return markdown_table(rows, {corner: ""} | dict.fromkeys(columns, ">"))


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

    def cell(found: Estimate) -> str:
        error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
        return f"{found.mean:.3f}{error}"

    return _by_covariance("K", step_counts, table, cell)


def variance_error_markdown(errors: Mapping[str, Mapping[int, float]]) -> str:
    """Return a table of the variance's relative error by covariance and timestep.

    Example:
        >>> print(variance_error_markdown({"ocm": {5: 0.2, 500: 0.1}}))
        | covariance | t = 5 | t = 500 |
        |:---|---:|---:|
        | OCM head | 0.200 | 0.100 |
    """
    return _by_covariance("t", list(next(iter(errors.values()))), errors, "{:.3f}".format)


def quality_markdown(table: Mapping[str, Mapping[int, Quality]], step_counts: Sequence[int]) -> str:
    """Return a table of Fréchet distances by covariance and K, with precision and recall.

    Example:
        >>> print(quality_markdown({"ocm": {10: Quality(1.25, 0.9, 0.8, 0.01)}}, [10]))
        | covariance | K = 10 |
        |:---|---:|
        | OCM head | 1.250 (0.90, 0.80) |
    """
    return _by_covariance(
        "K",
        step_counts,
        table,
        lambda found: f"{found.frechet:.3f} ({found.precision:.2f}, {found.recall:.2f})",
    )


def _by_covariance(
    symbol: str,
    places: Sequence[int],
    table: Mapping[str, Mapping[int, Any]],
    cell: Callable[[Any], str],
) -> str:
    lines = {label(name): [cell(row[place]) for place in places] for name, row in table.items()}
    return table_of_lines("covariance", [f"{symbol} = {place}" for place in places], lines)
