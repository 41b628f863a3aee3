"""Files of options: a run writes what it was given, and another takes it."""

import pytest
import torch
from typer.testing import CliRunner

import ocm
from ocm import checkpoints
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.cli import app as cli
from ocm.cli.configuration import tomllib
from ocm.training.small_unet import small_unet

QUICK = ["--device", "cpu", "--quiet"]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.cosine()).freeze()
    out = tmp_path_factory.mktemp("untrained")
    checkpoints.save(Checkpoint(denoiser, (1, 8, 8), 17, "digits"), out)
    return out


def said(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_run_can_be_made_again_by_what_it_writes(checkpoint, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--covariance", "beta", "--steps", 3, "--num-images", 5, "--sampler", "ddim"]
    answer = invoke(
        "sample", checkpoint, *options, "--eta", 0.5, "--seed", 3, "--out", first, *QUICK
    )
    assert answer.exit_code == 0, answer.output
    answer = invoke("sample", "--config", first / "sample.toml", "--out", again, "--quiet")
    assert answer.exit_code == 0, answer.output
    assert (again / "sample.toml").read_bytes() == (first / "sample.toml").read_bytes()
    pixels = [(folder / "samples.safetensors").read_bytes() for folder in (first, again)]
    assert pixels[0] == pixels[1]
    given = tomllib.loads((first / "sample.toml").read_text(encoding="utf-8"))["sample"]
    assert given["eta"] == 0.5
    assert given["covariance"] == "beta"
    assert given["checkpoint"] == str(checkpoint)
    assert "out" not in given


def test_heads_for_a_denoiser_are_trained_again_by_what_was_written(checkpoint, tmp_path):
    """What is for a new denoiser alone is not written, since --denoiser refuses it."""
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--denoiser", checkpoint, "--head", "npr", "--head", "sn", "--head-steps", 2]
    answer = invoke("train", *options, "--limit", 60, "--batch-size", 4, "--out", first, *QUICK)
    assert answer.exit_code == 0, answer.output
    answer = invoke("train", "--config", first / "train.toml", "--out", again, "--quiet")
    assert answer.exit_code == 0, answer.output
    one, other = (checkpoints.load(folder).learned for folder in (first, again))
    assert set(one) == set(other) == {"npr", "sn"}
    for name in one:
        for mine, theirs in zip(
            one[name].head.state_dict().values(),
            other[name].head.state_dict().values(),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_command_line_wins(checkpoint, tmp_path):
    file = said(tmp_path, '[sample]\nsteps = 3\nseed = 1\ncovariance = "beta"\n')
    out = tmp_path / "out"
    answer = invoke(
        "sample", checkpoint, "--config", file, "--seed", 2, "--num-images", 1, "--out", out, *QUICK
    )
    assert answer.exit_code == 0, answer.output
    given = tomllib.loads((out / "sample.toml").read_text(encoding="utf-8"))["sample"]
    assert (given["steps"], given["seed"]) == (3, 2)


WRONG = {
    "an option that does not exist": ("[sample]\nstep = 3", "'step' is no option of ocm sample"),
    "the option that was meant": ("[sample]\nstep = 3", "did you mean 'steps'?"),
    "itself": ('[sample]\nconfig = "a.toml"', "'config' is no option"),
    "another command": ("[train]\nwidth = 8", "must have a table [sample], and has [train]"),
    "nothing": ("", "must have a table [sample], and has nothing"),
    "no table": ("sample = 3", "must have a table [sample]"),
    "no TOML": ("steps: 3", "must be a file of TOML"),
    "deep lists": ("[sample]\nsteps = " + 9999 * "[", "must be a file of TOML"),
    "a list for a number": ("[sample]\nsteps = [3]", "steps must be a text or a number, got [3]"),
    "a truth value for a number": (
        "[sample]\nsteps = true",
        "must be a text or a number, got True",
    ),
    "a number for a flag": ("[sample]\ncalibrated = 1", "calibrated must be true or false, got 1"),
    "a number for a list": ("[sample]\nlabel = 1", "label must be a list, got 1"),
    "a day": ("[sample]\nsteps = 2026-01-01", "steps must be a text or a number"),
    "half a step": ("[sample]\nsteps = 2.5", "--steps"),
    "a step too few": ("[sample]\nsteps = 0", "--steps"),
    "a choice that there is not": ('[sample]\nsampler = "euler"', "--sampler"),
}


@pytest.mark.parametrize(("text", "error"), WRONG.values(), ids=WRONG)
def test_files_that_say_something_else_are_refused(checkpoint, tmp_path, text, error):
    out = tmp_path / "out"
    answer = invoke("sample", checkpoint, "--config", said(tmp_path, text), "--out", out, *QUICK)
    assert answer.exit_code == 2 or isinstance(answer.exception, ValueError)
    assert error in f"{answer.output}{answer.exception}"
    assert not out.exists()


@pytest.mark.parametrize("place", ["nowhere.toml", "."])
def test_a_file_that_is_none_is_refused(checkpoint, tmp_path, place):
    answer = invoke("sample", checkpoint, "--config", tmp_path / place, *QUICK)
    assert isinstance(answer.exception, (ValueError, FileNotFoundError))
    assert f"--config {tmp_path / place}" in str(answer.exception)
