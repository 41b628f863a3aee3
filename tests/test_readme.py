"""The README quotes the recorded results, and its commands exist."""

import json
import re
from pathlib import Path

from ocm.evaluation import Estimate
from ocm.report import likelihood_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_demo_table_is_the_recorded_one():
    metrics = json.loads((RESULTS / "demo" / "metrics.json").read_text())
    table = {
        name: {
            int(K): Estimate(mean, metrics["nll_standard_error"][name][K])
            for K, mean in row.items()
        }
        for name, row in metrics["nll_bits_per_dim"].items()
    }
    (quoted,) = re.findall(r"<!-- demo table -->\n\n(.*?)\n\n<!-- end", README, re.DOTALL)
    assert quoted == likelihood_markdown(table, metrics["settings"]["step_counts"])


def test_the_recorded_demo_shows_what_it_is_for():
    """From K = 10 on the head's bound is below both of DDPM's, and within 3% of the exact one."""
    bits = json.loads((RESULTS / "demo" / "metrics.json").read_text())["nll_bits_per_dim"]
    for K in ("10", "25", "50"):
        assert bits["ocm"][K] < min(bits["beta"][K], bits["beta_tilde"][K])
        assert abs(bits["ocm"][K] / bits["exact"][K] - 1) < 0.03


def test_the_ratio_to_the_loop_is_the_recorded_one():
    record = json.loads((RESULTS / "cpu" / "products.json").read_text())
    (ratio,) = (
        row["over_loop"]
        for row in record["rows"]
        if (row["way"], row["M"]) == ("hutchinson, vjp", 16)
    )
    (quoted,) = re.findall(r"`hutchinson` takes\s+(\d+)% of the time", README)
    assert int(quoted) == round(100 * ratio)


def test_the_estimators_table_is_the_recorded_one():
    record = json.loads((RESULTS / "cpu" / "estimators.json").read_text())
    gains = {(row["t"], row["M"]): row["coloring_gain"] for row in record["errors"]}
    times = {row["t"]: row for row in record["time_to_error"] if row["colors"] == 48}
    lines = ["| t of 1000 | M = 4 | 12 | 48 | 192 | time at the error of M = 48 |"]
    lines += ["|---:|---:|---:|---:|---:|---:|"]
    for t, row in times.items():
        cells = [f"{gains[t, M]:.1f}" for M in (4, 12, 48, 192)]
        lines.append(f"| {t} | {' | '.join(cells)} | {row['times_faster']:.0f} times |")
    (quoted,) = re.findall(
        r"<!-- estimators table -->\n\n(.*?)\n\n<!-- end of estimators", README, re.DOTALL
    )
    assert quoted == "\n".join(lines)


def test_the_recorded_estimators_show_what_is_claimed():
    """Every coloring gains at every noise level, and "auto" never loses more than 5%."""
    record = json.loads((RESULTS / "cpu" / "estimators.json").read_text())
    gains = {(row["t"], row["M"]): row["coloring_gain"] for row in record["errors"]}
    assert all(gain > 1 for (_, M), gain in gains.items() if M > 1)
    assert min(gains[t, 48] for t in (5, 50)) >= 30
    assert gains[200, 48] >= 4
    assert all(row["auto_gain_measured"] > 0.95 for row in record["errors"] if row["M"] < 192)
    fastest = {
        t: max(row["times_faster"] for row in record["time_to_error"] if row["t"] == t)
        for t in (50, 200, 500)
    }
    assert fastest[50] >= 60
    assert fastest[200] >= 8
    assert fastest[500] >= 2.5


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets


DIGITS = ("beta", "analytic", "iddpm", "npr", "sn", "ocm", "exact", "cosine", "full")


def digits_evaluation():
    return json.loads((RESULTS / "digits" / "evaluation.json").read_text())


def test_the_digits_table_is_the_recorded_one():
    record = digits_evaluation()
    rows = [*DIGITS, *(f"{name}_calibrated" for name in DIGITS)]
    table = {
        name: {
            K: Estimate(record["nll_bits_per_dim"][name][str(K)], None)
            for K in record["step_counts"]
        }
        for name in rows
    }
    (quoted,) = re.findall(r"<!-- digits table -->\n\n(.*?)\n\n<!-- end", README, re.DOTALL)
    assert quoted == likelihood_markdown(table, record["step_counts"])


def test_the_recorded_digits_show_what_is_claimed():
    """Calibration lowers every bound up to K = 25, and the lowest of all is a calibrated one.

    A number for each timestep has nothing to gain from another: the calibrated analytic variance
    may differ from the plain one by its own error of estimation, but not by more.
    """
    bits = digits_evaluation()["nll_bits_per_dim"]
    plain = [name for name in bits if not name.endswith("_calibrated")]
    for name in plain:
        for K in ("5", "10", "25"):
            gain = bits[name][K] - bits[f"{name}_calibrated"][K]
            assert gain > (-0.002 if name == "analytic" else 0.0), (name, K)
    for K in ("5", "10", "25"):
        best = min(bits[f"{name}_calibrated"][K] for name in plain)
        assert best < min(bits[name][K] for name in plain)


def test_a_head_costs_one_pass_and_little_time():
    rows = json.loads((RESULTS / "cpu" / "sampling.json").read_text())["rows"]
    heads = [row for row in rows if "simple head" in row["covariance"]]
    assert len({row["network"] for row in heads}) == 2
    assert all(row["passes"] == 1 for row in heads)
    assert all(row["over_plain"] <= 1.05 for row in heads)
