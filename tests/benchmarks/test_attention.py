"""The suite `attention`: what it times is right, and is not timed otherwise."""

import json
from pathlib import Path

import pytest
import torch
from harness.timing import Setting
from suites import attention as suite

SETTING = Setting(device=torch.device("cpu"), quick=True, data=Path("."))
CASES = [suite.Case(1, 2, 48, 8, 3), suite.Case(2, 1, 33, 8, 1, torch.bfloat16, is_causal=True)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suite, "_cases", lambda device, quick: CASES)


def test_a_row_for_each_case(small):
    record, tables = suite.run(SETTING)
    assert [row["case"] for row in record["rows"]] == [
        "1 x 2 x 48 x 8, float32",
        "2 x 1 x 33 x 8, bfloat16, causal",
    ]
    for row in record["rows"]:
        assert 0 < row["milliseconds"]
        assert row["memory_over_mathematical"] == pytest.approx(
            row["mebibytes"] / row["mathematical_mebibytes"]
        )
        assert row["taken"] is False
    assert suite.report(json.loads(json.dumps(record))) == tables


def test_nothing_wrong_is_timed(small, monkeypatch):
    original = suite.kernels.attention_jvp

    def wrong(*args, **kwargs):
        out, tangent = original(*args, **kwargs)
        return out, 1.001 * tangent

    monkeypatch.setattr(suite.kernels, "attention_jvp", wrong)
    with pytest.raises(RuntimeError, match="1 x 2 x 48 x 8, float32 differs from float64 by 1"):
        suite.run(SETTING)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_rival_is_what_pytorch_attends(is_causal):
    case = suite.Case(2, 3, 5, 4, 2, is_causal=is_causal)
    points, tangents = suite._inputs(case, torch.device("cpu"))
    out, tangent = suite.mathematical(points, tangents, is_causal)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(out, attend(*points, is_causal=is_causal))
    assert tangent.shape == (2, *out.shape)
    step = 1e-4
    ahead, behind = (
        attend(
            *(
                p.double() + sign * step * t[1].double()
                for p, t in zip(points, tangents, strict=True)
            ),
            is_causal=is_causal,
        )
        for sign in (1, -1)
    )
    torch.testing.assert_close(
        tangent[1].double(), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_cases_are_told_apart(device, quick):
    cases = suite._cases(torch.device(device), quick)
    assert len({(str(case), case.num_probes) for case in cases}) == len(cases) >= 3
    assert {case.dtype for case in cases} <= set(suite._TOLERANCES)
