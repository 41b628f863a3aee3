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

    return _by_steps(table, step_counts, cell)


def quality_markdown(table: Mapping[str, Mapping[int, Quality]], step_counts: Sequence[int]) -> str:
    """Return a table of Fréchet distances by covariance and K, with precision and recall.

    Example:
        >>> print(quality_markdown({"ocm": {10: Quality(1.25, 0.9, 0.8, 0.01)}}, [10]))
        | covariance | K = 10 |
        |:---|---:|
        | OCM head | 1.250 (0.90, 0.80) |
    """

    def cell(found: Quality) -> str:
        return f"{found.frechet:.3f} ({found.precision:.2f}, {found.recall:.2f})"

    return _by_steps(table, step_counts, cell)


def _by_steps(
    table: Mapping[str, Mapping[int, Any]], step_counts: Sequence[int], cell: Callable[[Any], str]
) -> str:
    lines = {label(name): [cell(row[K]) for K in step_counts] for name, row in table.items()}
    return table_of_lines("covariance", [f"K = {K}" for K in step_counts], lines)
