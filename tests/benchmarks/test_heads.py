"""The comparison of heads: what it computes from scores, and heads trained side by side."""

import math

import pytest
import torch
from harness.timing import Setting
from heads import likelihood, report
from heads.together import Together
from suites import heads

import ocm
from ocm.covariances.names import LEARNED


def test_heads_side_by_side_are_those_trained_alone(unet):
    """The same weights: they share evaluations, and nothing else."""
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    x0 = torch.rand(32, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = ocm.TrainingSettings(3, batch_size=8, max_gradient_norm=1e9, seed=5)
    units = ocm.Parameterisation(0.6, positive=True)

    def made():
        return {
            name: make(denoiser, ocm.make_head(denoiser, "residual", seed=1), units)
            for name, make in LEARNED.items()
        }

    together, alone = made(), made()
    losses = ocm.train_head(Together(together), x0, settings, progress=False)
    of_each = [ocm.train_head(c, x0, settings, progress=False) for c in alone.values()]
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(of_each).sum(0), rtol=1e-4, atol=1e-4
    )
    for name in LEARNED:
        for found, wanted in zip(
            together[name].head.parameters(), alone[name].head.parameters(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_differences_are_paired():
    """Of images that differ by far more than the heads do."""
    images = torch.tensor([1.0, 5.0, 9.0]).double()
    bits = {
        "ml-0": {5: images},
        "ml-1": {5: images + 0.2},
        "npr-0": {5: images + 0.1},
        "npr-1": {5: images + 0.5},
        "npr-0_calibrated": {5: images + torch.tensor([0.1, 0.2, 0.3])},
        "npr-1_calibrated": {5: images + torch.tensor([0.1, 0.2, 0.3]) + 0.2},
        "beta": {5: images + 1.0},
    }
    rows = {(r["covariance"], r["calibrated"]): r for r in likelihood.compared(bits, [0, 1])}
    assert rows["ml", False]["bits_per_dim"] == pytest.approx(5.1)
    assert rows["npr", False]["above"] == pytest.approx(0.2)
    assert rows["npr", False]["above_standard_error"] == pytest.approx(0.0, abs=1e-12)
    assert rows["npr", False]["seeds_std"] == pytest.approx(0.4 / math.sqrt(2))
    assert rows["npr", True]["above"] == pytest.approx(0.2)
    assert rows["npr", True]["above_standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert rows["beta", False]["above"] == pytest.approx(0.9)
    assert rows["beta", False]["seeds"] == 0


def row(covariance, above, error=0.01, calibrated=False, K=5):
    return {
        "data": "digits", "path": "cosine", "covariance": covariance, "calibrated": calibrated,
        "K": K, "bits_per_dim": 4.0 + above, "above": above, "above_standard_error": error,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("above", "below", "level"), [(0.05, True, True), (-0.015, False, True), (-0.03, False, False)]
)
def test_verdicts(above, below, level):
    rows = [row("ml", 0.0, 0.0), row("npr", 0.4), row("ocm", above, calibrated=True)]
    (cell,) = report.verdicts(rows)
    assert (cell["below"], cell["level"]) == (below, level)
    assert cell["best"] == "OCM head, calibrated"
    said = report.summary(rows)
    assert ("OCM head, calibrated is lower by" in said) == (not below)


def test_the_lowest_of_a_column_is_in_bold():
    table = report.likelihood([row("ml", 0.0), row("npr_papers", 0.2)])
    assert "| likelihood head | **4.000** |" in table
    assert "| NPR head, papers' units | 4.200 |" in table


@pytest.mark.soak
def test_all_of_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "work_directory", lambda size: tmp_path / "work")
    nowhere = tmp_path / "nowhere"
    setting = Setting(torch.device("cpu"), True, nowhere, nowhere)
    record, tables = heads.run(setting)
    assert {r["data"] for r in record["rows"]} == {"digits"}
    assert all(math.isfinite(r["bits_per_dim"]) for r in record["rows"])
    assert "| OCM head, papers' units, calibrated |" in tables
    assert tables == heads.report(record)
    heads.plot(record, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    again, _ = heads.run(setting)
    assert again["rows"] == record["rows"]
