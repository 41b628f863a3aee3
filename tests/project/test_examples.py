"""Every other script in examples/ runs, and prints something."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LONGEST = ("likelihood", "uncertainty_map")
CASES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.soak] if path.stem in LONGEST else [])
    for path in EXAMPLES
    if path.stem != "demo"  # see test_demo.py
]


@pytest.mark.parametrize("script", CASES)
def test_example_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out
