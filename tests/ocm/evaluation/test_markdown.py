"""Tables in Markdown: what is in a cell, and on which side."""

import pytest

from ocm.evaluation.markdown import markdown_table, table_of_lines


def test_cells_are_formatted_and_numbers_stand_on_the_right():
    rows = [
        {"way": "loop", "time_ms": 1.25, "note": "a", "unused": 1},
        {"way": "p(x | y)", "time_ms": None},
    ]
    assert markdown_table(rows, {"way": "", "time_ms": ".2f", "note": ">"}).splitlines() == [
        "| way | time ms | note |",
        "|:---|---:|---:|",
        "| loop | 1.25 | a |",
        r"| p(x \| y) |  |  |",
    ]


def test_a_table_without_rows_is_a_heading():
    assert markdown_table([], {"way": ""}) == "| way |\n|:---|"


def test_a_line_must_have_a_cell_for_every_column():
    with pytest.raises(ValueError, match="shorter"):
        table_of_lines("covariance", ["K = 5", "K = 10"], {"beta": ["1.0"]})
