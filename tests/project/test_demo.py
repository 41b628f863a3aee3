"""The demonstration at its smallest size."""

import json
import subprocess
import sys

import demo as script
import pytest
from demo import QUICK, DemoSettings, run
from typer.testing import CliRunner

from ocm.cli import app as cli


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demonstration at its smallest size, with its checkpoint."""
    out = tmp_path_factory.mktemp("demo")
    return out, run(out, DemoSettings(**QUICK), progress=False)


def test_demo_writes_what_it_promises(demo):
    out, result = demo
    metrics = json.loads((out / "metrics.json").read_text())
    methods = {"beta", "coloring", "ocm", "ml", "coloring_calibrated", "ocm_calibrated"}
    assert set(metrics["nll_bits_per_dim"]) == methods
    for row in metrics["nll_bits_per_dim"].values():
        assert set(row) == {"3", "5"}
        assert all(value > 0 for value in row.values())
    assert metrics["nll_bits_per_dim"]["ocm"]["5"] == result.metrics["nll_bits_per_dim"]["ocm"][5]
    report = (out / "report.md").read_text()
    assert f"{metrics['nll_bits_per_dim']['ml']['5']:.3f}" in report
    for picture in ("samples.png", "likelihood.png", "maps.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in report


def test_evaluate_repeats_the_figures_of_the_demo(demo, tmp_path):
    out, result = demo
    arguments = (
        "evaluate", out / "checkpoint", "--out", tmp_path, "--steps", 5, "--num-images", 2,
        "--covariance", "ocm", "--covariance", "ml", "--device", "cpu", "--quiet",
    )  # fmt: skip
    answer = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("ocm", "ml"):
        expected = result.metrics["nll_bits_per_dim"][name][5]
        assert record["nll_bits_per_dim"][name]["5"] == pytest.approx(expected, rel=1e-6)
    assert "OCM head" in answer.output


@pytest.mark.soak
def test_the_script_prints_its_table(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--quiet", "--out", str(tmp_path)]
    answer = subprocess.run(
        [sys.executable, script.__file__, *arguments], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "| OCM head |" in answer.stdout
    assert str(tmp_path / "report.md") in answer.stdout
