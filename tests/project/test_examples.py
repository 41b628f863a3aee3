"""Every other script in examples/ runs, prints something, and draws a picture where it says."""

import ast
import re
import runpy
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
    if path.stem != "demo"  # see test_demo.py
]
# Those that take more than some seconds.
LONGEST = (
    "attach_to_a_pipeline",
    "covariance_of_your_denoiser",
    "flow_of_digits",
    "likelihood",
    "reward_on_a_flow",
    "train_a_head",
    "uncertainty_map",
    "which_probes",
)
RUNS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.soak] if path.stem in LONGEST else [])
    for path in EXAMPLES
]
each = pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)


@pytest.mark.parametrize("script", RUNS)
def test_example_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script)])
    with matplotlib.rc_context():  # examples choose a style
        runpy.run_path(str(script), run_name="__main__")
    plt.close("all")
    printed = capsys.readouterr().out
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures
    assert pictures == set(re.findall(r"is (\w+\.png)$", printed, re.MULTILINE))


@each
def test_example_is_a_page_of_the_gallery(script):
    title, underline, *rest = ast.get_docstring(ast.parse(script.read_text())).splitlines()
    assert underline == "=" * len(title)
    assert "?" in " ".join(rest), "the reader's question comes first"


@each
def test_example_is_short(script):
    assert 40 <= len(script.read_text().splitlines()) <= 130


@each
def test_titles_within_an_example_are_underlined(script):
    cells = script.read_text().split("\n# %%\n")[1:]
    assert cells
    for cell in cells:
        title, underline = cell.splitlines()[:2]
        assert underline == "# " + "-" * (len(title) - 2), title
