"""Wrong use of the command line: one line of error, status 2, no work, and nothing written."""

import sys
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
from bad_input import command, table
from folders import contents
from safetensors.torch import load_file

from ocm.covariances import calibrated
from ocm.evaluation import samples, scores
from ocm.training import workflow

SMALL = "--denoiser-steps 1 --head-steps 1 --batch-size 4 --width 8 --device cpu --quiet"
# What is right about a use of each command.
RIGHT = {
    "sample": "{model} --out {out} --quiet",
    "train": f"--out {{out}} {SMALL}",
    "calibrate": "{model} --out {out} --quiet",
    "evaluate": "{model} --out {out} --quiet",
}
WORK = [
    (samples, "sample"),
    (scores, "likelihoods"),
    (calibrated, "noisy_prediction"),
    (workflow, "train_denoiser"),
    (workflow, "train_head"),
]


@dataclass(frozen=True)
class Use:
    """One use of the command line.

    Attributes:
        name: What is wrong about it.
        arguments: In which ``{out}`` stands for a folder to write to, ``{model}`` for a checkpoint,
            ``{file}`` for a file and ``{missing}`` for what is not there.
        says: Texts that the error must have.
    """

    name: str
    arguments: str
    says: tuple[str, ...]


def use(name, arguments, *says):
    return Use(name, arguments, says)


def wrong(command, name, options, *says):
    return Use(f"{command}: {name}", f"{command} {RIGHT[command]} {options}", says)


sample, train, calibrate, evaluate = (partial(wrong, command) for command in RIGHT)

# Options of integers, by a number that is too small for them.
TOO_SMALL = {
    "sample": {
        -1: ("--seed", "--label"),
        0: ("--steps", "--num-images", "--batch-size", "--num-probes", "--lanczos-probes"),
    },
    "train": {
        -1: ("--workers", "--seed"),
        0: ("--denoiser-steps", "--head-steps", "--batch-size", "--limit", "--image-size"),
        7: ("--width",),
    },
    "calibrate": {-1: ("--seed",), 0: ("--num-probes",), 1: ("--steps", "--num-images")},
    "evaluate": {
        -1: ("--seed",),
        0: ("--steps", "--num-images", "--batch-size", "--num-probes"),
        1: ("--fit-images",),
        7: ("--num-samples",),
    },
}
FLOATS = {
    "sample": ("--sampler ddim --eta", "--guidance", "--last-noise"),
    "train": ("--learning-rate", "--head-learning-rate"),
    "evaluate": ("--tolerance",),
}
NUMBERS = [
    *(
        wrong(name, f"{option} {value}", f"{option} {value}", option)
        for name, options in TOO_SMALL.items()
        for least in options
        for option in options[least]
        for value in (least, "1.5", "many")
    ),
    *(
        wrong(name, f"--seed {seed}", f"--seed {seed}", "--seed")
        for name in RIGHT
        for seed in (2**63, 2**64)
    ),
    *(
        wrong(name, f"{option} {value}", f"{option} {value}", option.split()[-1])
        for name, options in FLOATS.items()
        for option in options
        for value in ("nan", "inf", "-1", "half")
        if (option, value) != ("--guidance", "-1")
    ),
]
PLACES = [
    ("of what is not there", "{missing} --out {out}", "no checkpoint at", "missing"),
    ("of a file", "{file} --out {out}", "file"),
    ("of an empty folder", "{empty} --out {out}", "empty"),
    ("into a file", "{model} --out {file}", "--out", "must be a directory"),
    ("below a file", "{model} --out {file}/a", "--out", "must be a directory"),
    ("on a device of no name", "{model} --out {out} --device tpu9", "--device tpu9 cannot be"),
    ("on a device of no number", "{model} --out {out} --device cuda:x", "--device cuda:x cannot"),
    ("on a GPU that is not there", "{model} --out {out} --device cuda:99", "--device cuda:99"),
]
USES = [
    use("a command of no name", "draw", "No such command 'draw'"),
    use("an option of no name", "sample {model} --output {out}", "No such option", "--output"),
    use("sample of nothing", "sample --out {out}", "Missing argument"),
    *(
        use(f"{name} {what}", f"{name} {arguments}", *says)
        for name in ("sample", "calibrate", "evaluate")
        for what, arguments, *says in PLACES
    ),
    use("train into a file", "train --out {file}", "--out", "must be a directory"),
    use(
        "sample where nothing can be made",
        "sample {model} --out /proc/samples",
        "--out /proc/samples must be a directory",
    ),
    use(
        "train where nothing can be made",
        "train --out /proc/run",
        "--out /proc/run must be a directory",
    ),
    sample("more steps than timesteps", "--steps 1001", "K must lie in 1 .. 1000, got 1001"),
    sample("a covariance of no name", "--covariance best", "--covariance", "'best' is not one of"),
    sample("a covariance that was not fitted", "--covariance analytic", "analytic"),
    sample("a covariance that was not trained", "--covariance npr", "npr"),
    sample("a calibration that was not fitted", "--covariance beta --calibrated", "calibrat"),
    sample(
        "optimal timesteps without variances",
        "--spacing optimal",
        "--spacing optimal needs analytic variances",
    ),
    sample("a spacing of no name", "--spacing odd", "--spacing", "'odd'"),
    sample("a sampler of no name", "--sampler euler", "--sampler", "'euler'"),
    sample("eta for DDPM", "--eta 0.5", "--eta 0.5 is for --sampler ddim"),
    sample("eta of 2", "--sampler ddim --eta 2", "--eta"),
    sample("endless noise", "--last-noise inf", "for '--last-noise': inf is not a finite"),
    sample("guidance by no number", "--guidance nan", "for '--guidance': nan is not a finite"),
    sample("a label without classes", "--label 1", "label"),
    sample("guidance without classes", "--guidance 2", "guidance_scale must be 1 without labels"),
    sample("a text without texts", "--prompt cat", "texts"),
    sample("conditions that are not there", "--conditions {missing}", "--conditions", "missing"),
    sample("conditions that are no file of tensors", "--conditions {file}", "--conditions"),
    sample("latents of images", "--vae {empty}", "--vae", "is for a model of latents"),
    sample("what has no density, calibrated", "--covariance lanczos --calibrated", "no density"),
    train("data of no name", "--data letters", "error: data must be"),
    train("data that are not there", "--data {missing}", "missing"),
    train("a data set that is empty", "--data {empty}", "empty"),
    train("a data set that is a file", "--data {file}", "file"),
    train("a head of no name", "--head best", "--head", "'best'"),
    train("a schedule of no name", "--schedule sigmoid", "--schedule", "'sigmoid'"),
    train("a device of no name", "--device abacus", "error: --device abacus cannot be used here"),
    train("a VAE that is not there", "--vae {missing}", "path must be the folder of AutoencoderKL"),
    use(
        "train: a denoiser that is not there",
        "train --out {out} --device cpu --denoiser {missing}",
        "missing",
    ),
    use(
        "train: more images held back than the denoiser did",
        "train --out {out} --device cpu --denoiser {model} --hold-out 800",
        "--hold-out must be at most 150",
    ),
    train("a width for a denoiser that is there", "--denoiser {model} --width 16", "--width"),
    train("noise of a flow", "--schedule flow --prediction-type epsilon", "epsilon"),
    train("all images held back", "--hold-out 100000", "hold"),
    calibrate("more steps than timesteps", "--steps 1001", "K must lie in 1 .. 1000, got 1001"),
    calibrate("what has no density", "--covariance lanczos", "--covariance lanczos has no density"),
    calibrate("an untrained head", "--covariance npr", "covariance 'npr' needs a trained head"),
    calibrate("other data", "--data {missing}", "missing"),
    calibrate("a size without --vae", "--image-size 16", "--image-size 16 is for --vae"),
    evaluate("more steps than timesteps", "--steps 1001", "K must lie in 1 .. 1000, got 1001"),
    evaluate("what has no density", "--covariance lanczos", "covariance lanczos has no density"),
    evaluate("an untrained head", "--covariance npr", "covariance 'npr' needs a trained head"),
    evaluate("a covariance of no name", "--covariance gamma", "'gamma' is not one of"),
    evaluate("an endless error", "--tolerance inf", "for '--tolerance': inf is not a finite"),
    evaluate("an error of zero", "--tolerance 0", "--tolerance must be positive"),
    evaluate("more images than there are", "--num-images 298", "num_images must be at most 297"),
    evaluate("a decoder of no name", "--decoder best", "--decoder"),
    evaluate(
        "Inception weights that are not there",
        "--quality --inception {missing}",
        "missing' does not",
    ),
]
# Only what the network puts out tells.
LATE = sample("variance channels without any", "--covariance variance_channels", "variance")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of two steps, with one head."""
    from typer.testing import CliRunner

    from ocm.cli.app import app

    folder = tmp_path_factory.mktemp("model")
    sizes = ("--denoiser-steps", "2", "--head-steps", "2", "--batch-size", "4", "--width", "8")
    how = ("--device", "cpu", "--quiet", "--head", "ocm", "--head-kind", "simple")
    answer = CliRunner().invoke(app, ["train", "--out", str(folder), *sizes, *how])
    assert answer.exit_code == 0, answer.output
    return folder


# In /proc nothing can be made, by root neither; only Linux has it.
HERE = [
    case
    for case in (*NUMBERS, *USES, LATE)
    if sys.platform == "linux" or "/proc" not in case.arguments
]


@table(HERE)
def test_wrong_use_ends_in_one_line_before_the_work(case, model, tmp_path, capfd, monkeypatch):
    begun = mock.Mock(side_effect=AssertionError("the work has begun"))
    for module, name in () if case is LATE else WORK:
        monkeypatch.setattr(module, name, begun)
    places = {name: tmp_path / name for name in ("out", "empty", "missing", "file")}
    places["empty"].mkdir()
    places["file"].write_text("not what it should be", encoding="utf-8")
    before = contents(model)
    arguments = [text.format(model=model, **places) for text in case.arguments.split()]
    status, _, said = command(capfd, *arguments)
    assert status == 2, said
    for text in case.says:
        assert text in " ".join(said.split())
    assert "Traceback" not in said
    assert contents(model) == before
    assert contents(tmp_path) == {"file": b"not what it should be"}


@pytest.mark.parametrize(
    "options",
    [
        "--steps 1 --num-images 1 --batch-size 1",
        "--steps 1 --sampler ddim --eta 0 --covariance beta_tilde",
        "--steps 2 --sampler ddim --eta 1 --last-noise 0 --guidance 1",
        "--steps 1 --seed 9223372036854775806 --covariance lanczos --lanczos-probes 1",
    ],
)
def test_the_ends_of_what_is_right_work(options, model, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    arguments = ["sample", model, "--out", tmp_path, "--num-images", 2, "--device", "cpu"]
    status, _, said = command(capfd, *arguments, "--quiet", *options.split())
    assert status == 0, said
    images = load_file(tmp_path / "samples.safetensors")["images"]
    assert images.shape[1:] == (1, 8, 8)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
