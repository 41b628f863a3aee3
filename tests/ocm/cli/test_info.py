"""What ``ocm info`` says of checkpoints and pipelines."""

import json

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import CliRunner

import ocm
from ocm import checkpoints
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.cli import app as cli
from ocm.diffusion.tables import Table
from ocm.training.small_unet import small_unet


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["info", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.flow(), "flow_prediction").freeze()
    npr = ocm.NPR(denoiser, ocm.make_head(denoiser, "simple"))
    analytic = ocm.Analytic(denoiser, Table({1: [1.0], 1000: [0.5]}))
    table = Table({1: [1.0, 0.0], 500: [1.0, 0.0], 1000: [1.0, 0.0]})
    out = tmp_path_factory.mktemp("untrained")
    made = Checkpoint(
        denoiser, (1, 8, 8), 17, "digits", {"npr": npr}, {"analytic": analytic}, {"npr": table},
        num_calibration=150,
    )  # fmt: skip
    checkpoints.save(made, out)
    return out


def test_all_that_a_checkpoint_holds_is_said(checkpoint):
    answer = invoke(checkpoint, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.output)
    loaded = checkpoints.load(checkpoint)
    weights = sum(weight.numel() for weight in loaded.denoiser.backbone.parameters())
    assert f"{weights:,} parameters" in found["denoiser"]
    assert found["predicts"] == "flow_prediction"
    assert found["path"].startswith("flow, N = 1000, continuous")
    assert found["images"] == "1 x 8 x 8, in [-1, 1], 17 grey levels"
    assert found["kept from training"] == "150 images"
    assert list(found["heads"]) == ["npr"]
    assert found["calibrated"] == {"npr": "3 timesteps"}
    assert found["fitted"] == {"analytic": "2 timesteps"}
    assert {"npr", "beta", "coloring"} <= set(found["covariances"])
    assert "ml" not in found["covariances"]


def test_the_same_is_said_in_lines(checkpoint):
    answer = invoke(checkpoint)
    assert answer.exit_code == 0, answer.output
    lines = answer.output.splitlines()
    assert lines[0].split(maxsplit=1) == ["checkpoint", str(checkpoint)]
    assert any(line.startswith("fitted") and "analytic: 2 timesteps" in line for line in lines)
    assert any(line.startswith("heads") and "npr: NPR head" in line for line in lines)


def test_a_pipeline_is_described_too(tmp_path):
    DDPMPipeline(small_unet((3, 8, 8), width=8), DDPMScheduler()).save_pretrained(tmp_path)
    answer = invoke(tmp_path, "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.output)
    assert "N = 1000" in found["path"]
    assert found["heads"] == {}
    assert found["data"] == "not named"


def test_what_is_no_checkpoint_is_named(tmp_path):
    answer = invoke(tmp_path)
    assert isinstance(answer.exception, checkpoints.CheckpointError)
    assert str(tmp_path) in str(answer.exception)
