"""The overhead of a sampling step: what is counted, and that all steps are timed together."""

from pathlib import Path

import torch
from harness.timing import Setting
from suites import overhead


def test_launches_are_what_computes():
    x = torch.ones(2, 3)
    assert overhead.count_launches(lambda: x.T.reshape(2, 3).expand(4, 2, 3)[0]) == 1  # the reshape
    assert overhead.count_launches(lambda: (x + 1).mul(2).clamp(0, 1)) == 3
    assert overhead.count_launches(lambda: torch.empty(3)) == 0


def test_every_step_is_measured_beside_the_op_and_diffusers():
    record, table = overhead.run(Setting(torch.device("cpu"), True, Path()))
    rows = {row["step"]: row for row in record["rows"]}
    assert rows["DDPMScheduler.step"]["over_diffusers"] == 1.0
    assert rows["gaussian_step alone"]["over_op"] == rows["gaussian_step alone"]["launches"] == 1.0
    beta, head = rows["ocm.sample, beta"], rows["ocm.sample, ocm head"]
    assert 3 <= beta["launches"] < head["launches"] < 7
    assert all(row["microseconds"] > 0 for row in rows.values())
    assert table == overhead.report(record)
