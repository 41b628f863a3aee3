"""The suite `likelihoods`: the peer's figure and ours, its tables, and a run of every line."""

import math
from pathlib import Path

import pytest
import torch
from harness.timing import Setting
from likelihoods import probes
from likelihoods.sizes import QUICK, LikelihoodSize
from suites import heads, likelihoods

import ocm

VARIANCE = 0.3


def test_the_peer_is_asked_for_the_same_density():
    """flow_matching's own function, on the velocity of a Gaussian, has its density."""
    pytest.importorskip("flow_matching")

    class Backbone(torch.nn.Module):
        def forward(self, x, time):
            u = (time / 1000).view(-1, 1, 1, 1)
            rate = (u - (1 - u) * VARIANCE) / ((1 - u) ** 2 * VARIANCE + u**2)
            return type("Output", (), {"sample": rate * x})

    class Denoiser:
        backbone, schedule = Backbone(), ocm.flow()

    y = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    size = LikelihoodSize(num_steps=100, num_repeats=2, target=1.0)
    row = probes.flow_matching_row(Denoiser, y, size)
    exact = 0.5 * (y.square().mean() / VARIANCE + math.log(2 * math.pi * VARIANCE)) / math.log(2)
    assert row["bits_per_dim"] == pytest.approx(exact.item(), abs=1e-3)
    assert row["standard_error"] == pytest.approx(0, abs=1e-5)  # a multiple of the identity


def test_all_of_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "work_directory", lambda size: tmp_path / "work")
    monkeypatch.setattr(likelihoods, "work_directory", lambda size: tmp_path / "work")
    setting = Setting(torch.device("cpu"), True, Path("absent"), Path("absent"))
    record, text = likelihoods.run(setting)
    rows = [row for table in ("scores", "equal", "timed", "coverage") for row in record[table]]
    assert {(row["data"], row["path"]) for row in rows} == {("digits", "cosine")}
    assert record["equal"][0]["probes"] == probes.KEPT
    assert {row["what"] for row in record["scores"]} >= {"ODE, uniform", "bound, ml"}
    assert len(record["coverage"]) == 3
    assert record["coverage"][0]["seeds"] == QUICK.num_seeds
    assert text == likelihoods.report(record)
    assert "| ODE, decoder |" in text
    assert "95% intervals" in text
    likelihoods.plot(record, tmp_path / "likelihoods.png")
    assert (tmp_path / "likelihoods.png").read_bytes().startswith(b"\x89PNG")
