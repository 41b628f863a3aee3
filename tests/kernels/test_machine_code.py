"""The kernels compile for sm_90 without a GPU, into code that memory can bound."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from suites.machine_code import count_accesses, count_by_pipe, cycles

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
    per_thread = 4 if dtype == "float32" else 8
    seed = 0 if dtype == "float32" else 1  # one access of 8 bytes
    assert step[f"{width}_loads"] == 3 * per_thread + seed
    assert step[f"{width}_stores"] == per_thread
    assert rows["normal, float32"]["wide_stores"] == 8
    # A group of 8 is two accesses of 16 bytes in float32.
    group = 2 if dtype == "float32" else 1
    assert rows[f"probe_moments, {dtype}"]["wide_loads"] == 16 * 2 * group
    assert rows[f"probe_moments, {dtype}"]["wide_stores"] == 2 * 2 * 2  # float32 in any case
    assert rows[f"rademacher, {dtype}"]["wide_stores"] == 64
    assert rows[f"ocm_loss forward, {dtype}"]["wide_loads"] == 2 * 4 * group
    assert rows[f"ocm_loss backward, {dtype}"]["wide_stores"] == 4 * group


@pytest.mark.parametrize(
    ("kernel", "most"),
    [
        ("rademacher, float32", 6.4),
        ("rademacher, bfloat16", 4.0),
        ("rademacher of one probe, float32", 26),
        ("rademacher of one probe, bfloat16", 13.5),
        ("normal, float32", 37),
        ("gaussian_step, float32", 54),
        ("gaussian_step, bfloat16", 55),
        ("probe_moments, float32", 9.5),
        ("probe_moments, bfloat16", 10.9),
        ("ocm_loss forward, float32", 18.5),
        ("ocm_loss forward, bfloat16", 21),
        ("ocm_loss backward, float32", 16.5),
        ("ocm_loss backward, bfloat16", 20),
    ],
)
def test_kernels_need_few_instructions(rows, kernel, most):
    assert rows[kernel]["instructions_per_element"] <= most


def test_the_recorded_counts_are_those_of_the_code(rows):
    recorded = json.loads((ROOT / "benchmarks/results/cpu/machine_code.json").read_text())
    figures = {row["kernel"]: row["instructions_per_element"] for row in recorded["rows"]}
    # Other versions of Triton's compiler may differ a little.
    assert {name: row["instructions_per_element"] for name, row in rows.items()} == pytest.approx(
        figures, rel=0.15
    )


def test_instructions_are_counted_by_the_pipe_that_executes_them():
    instructions = {
        "@!P0 FFMA.FTZ R7, R2, R3, R4": "float",
        "IMAD.WIDE.U32 R2, R0, -0x2daee0ad, RZ": "product",
        "@P1 LOP3.LUT R0, R1, 0x1, RZ, 0xc0, !PT": "integer",
        "FMNMX R33, R18, 0.99999994039535522461, PT": "integer",
        "I2FP.F32.U32 R0, R1": "integer",
        "MUFU.RSQ R0, R1": "special",
        "I2F.U64 R0, R2": "special",
        "@UP0 UIADD3 UR4, UR5, UR6, URZ": "uniform",
        "STG.E.128 desc[UR6][R2.64], R4": "memory",
        "BRA `(.L_x_0)": "control",
    }
    for instruction, pipe in instructions.items():
        assert [name for name, count in count_by_pipe([instruction]).items() if count] == [pipe]


def test_the_slowest_pipe_is_the_bound():
    counts = count_by_pipe([])
    assert cycles(counts) == 0
    assert cycles(counts | {"integer": 3, "uniform": 1}) == 6
    assert cycles(counts | {"product": 3, "float": 2}) == 6
    assert cycles(counts | {"product": 1, "float": 5, "memory": 2}) == 8  # those issued
    assert cycles(counts | {"special": 2, "float": 15}) == 17
    assert cycles(counts | {"special": 3, "float": 15}) == 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_does_not_clamp_nan_away(rows, dtype):
    """The interpreter propagates NaN in any case; only the machine code can tell."""
    step = rows[f"gaussian_step, {dtype}"]
    elements = 16 if dtype == "float32" else 32  # of a thread
    # Two clamps of an element, each of two instructions.
    assert step["nan_propagating_clamps"] == 4 * elements
    # What is left clamps the uniform numbers below 1.
    assert step["silent_clamps"] == elements
