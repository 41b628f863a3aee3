"""The variance of probes="auto" over that of Rademacher probes, on Jacobians of many structures.

In closed form for the sets of features that the pilots decide for, and a mean over seeds: below
one where "auto" gains, above where it loses. Those of the last part were written down after the
choice was settled.
"""

from __future__ import annotations

from harness.structures import (
    further_structures,
    known_structures,
    unseen_structures,
    variance_ratio,
)
from harness.timing import Setting

from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

_PROBES = (1, 4, 12, 24, 48, 192)


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    seeds = 4 if setting.quick else 100
    rows: list[Row] = []
    parts = {
        "known": known_structures(),
        "further": further_structures(),
        "unseen": unseen_structures(),
    }
    for part, structures in parts.items():
        for name, (shape, J) in structures.items():
            ratios = {f"M={M}": variance_ratio(shape, J, M, seeds) for M in _PROBES}
            rows.append({"structure": name, "shape": str(shape), "part": part} | ratios)
    record = {
        "suite": "structures",
        "seeds": {"designs": f"0 to {seeds - 1}"},
        "num_seeds": seeds,
        "environment": environment(setting.device),
        "rows": rows,
        "largest": max(row[f"M={M}"] for row in rows for M in _PROBES),
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the table of a record."""
    columns = {"structure": "", "shape": "", "part": ""} | {f"M={M}": ".2f" for M in _PROBES}
    table = markdown_table(record["rows"], columns)
    return (
        f'Variance of "auto" over that of as many Rademacher probes, mean over '
        f"{record['num_seeds']} seeds; the largest is {record['largest']:.3f}.\n\n{table}"
    )
