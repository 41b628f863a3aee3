"""The suite of host times: both ways compute the same, and every op is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from suites import host

from hessdiag import kernels

ROOT = Path(__file__).parents[2]


def test_the_operators_of_pytorch_are_used_only_within(monkeypatch):
    seed = torch.tensor(1)
    used = []
    philox = sys.modules["hessdiag.kernels.philox"]
    in_numpy = philox.philox_cpu.signs

    def signs(*arguments):
        used.append(arguments)
        return in_numpy(*arguments)

    monkeypatch.setattr(philox.philox_cpu, "signs", signs)
    with host.operators_alone():
        expected = kernels.rademacher((3, 2, 5), seed)
        assert not used
    assert torch.equal(kernels.rademacher((3, 2, 5), seed), expected)
    assert used


def test_results_that_differ_are_not_timed():
    results = iter(torch.arange(4.0))
    with pytest.raises(RuntimeError, match="differ; nothing is timed"):
        host._reference("op", lambda: next(results), 1)


def test_every_op_is_launched():
    pytest.importorskip("triton", reason="triton has no wheels for this platform")
    script = ROOT / "benchmarks" / "harness" / "launch_times.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(script), "cpu", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = json.loads(process.stdout)
    ops = ["gaussian_step", "normal", "rademacher", "probe_moments", "ocm_loss"]
    assert [row["op"] for row in rows] == ops
    for row in rows:
        assert row["microseconds"] > 0
        ratio = row["usual_microseconds"] / row["microseconds"]
        assert row["usual_over_ours"] == pytest.approx(ratio)
