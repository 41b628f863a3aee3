"""The kernels compile for sm_90 without a GPU, into code that memory can bound."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from suites.machine_code import count_accesses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Counts of every kernel, from a process without Triton's interpreter."""
    pytest.importorskip("triton", reason="triton has no wheels for this platform")
    out = tmp_path_factory.mktemp("machine_code")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "benchmarks" / "run.py"
    subprocess.run(
        [sys.executable, str(script), "--suite", "machine_code", "--out", str(out)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    record = json.loads((out / "machine_code.json").read_text())
    return {row["kernel"]: row for row in record["rows"]}


def test_no_kernel_touches_local_memory(rows):
    assert {name: row["local_accesses"] for name, row in rows.items()} == dict.fromkeys(rows, 0)


def test_the_width_is_that_of_the_access_and_not_of_the_address():
    instructions = [
        "@!P0 LDG.E.U16 R7, desc[UR6][R2.64]",
        "LDG.E.64.CONSTANT R4, desc[UR6][R2.64]",
        "@P1 LDG.E.128 R8, desc[UR6][R2.64+0x128]",
        "STG.E.64 desc[UR6][R2.64], R4",
        "STG.E desc[UR6][R2.64], R128",
    ]
    cases = itertools.product(("LDG", "STG"), (64, 128))
    found = [count_accesses(instructions, *case) for case in cases]
    assert found == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_accessed_16_bytes_at_a_time(rows, dtype):
    # Four bfloat16 features of a group of normals are 8 bytes.
    step = rows[f"gaussian_step, {dtype}"]
    width = "wide" if dtype == "float32" else "half_wide"
    assert step[f"{width}_loads"] >= 6
    assert step[f"{width}_stores"] == 2
    assert rows[f"probe_moments, {dtype}"]["wide_loads"] >= 16
    assert rows[f"rademacher, {dtype}"]["wide_stores"] >= 32
    assert rows[f"ocm_loss forward, {dtype}"]["wide_loads"] >= 2
    assert rows[f"ocm_loss backward, {dtype}"]["wide_stores"] >= 1


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("rademacher, float32", 8),
        ("rademacher, bfloat16", 8),
        ("normal, float32", 56),
        ("gaussian_step, float32", 76),
        ("probe_moments, float32", 17),
        ("ocm_loss forward, float32", 62),
        ("ocm_loss backward, float32", 58),
    ],
)
def test_instructions_per_element_stay_near_the_recorded_figure(rows, kernel, most):
    recorded = json.loads((ROOT / "benchmarks/results/cpu/machine_code.json").read_text())
    figures = {row["kernel"]: row["instructions_per_element"] for row in recorded["rows"]}
    assert rows[kernel]["instructions_per_element"] <= most
    # Other versions of Triton's compiler may differ a little.
    assert rows[kernel]["instructions_per_element"] == pytest.approx(figures[kernel], rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_does_not_clamp_nan_away(rows, dtype):
    """The interpreter propagates NaN in any case; only the machine code can tell."""
    step = rows[f"gaussian_step, {dtype}"]
    assert step["nan_propagating_clamps"] >= 6
    # What is left clamps the uniform numbers below 1.
    assert step["silent_clamps"] <= 8
