"""Wrong use of the command line: one line of error, its status, and nothing written."""

import sys
from dataclasses import dataclass

import pytest
from bad_input import command, table
from safetensors.torch import load_file

SEED = 2**63
SMALL = "--denoiser-steps 1 --head-steps 1 --batch-size 4 --width 8 --device cpu --quiet"


@dataclass(frozen=True)
class Use:
    """One use of the command line.

    Attributes:
        name: What is wrong about it.
        arguments: In which ``{out}`` stands for a folder to write to, ``{model}`` for a checkpoint,
            ``{file}`` for a file and ``{missing}`` for what is not there.
        says: Texts that the error must have.
        status: Of the process.
    """

    name: str
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    status: int = 2


def use(name, arguments, *says, status=2):
    return Use(name, tuple(arguments.split()), says, status)


def sample(name, options, *says, status=2):
    return use(
        f"sample: {name}", f"sample {{model}} --out {{out}} --quiet {options}", *says, status=status
    )


def train(name, options, *says, status=2):
    return use(f"train: {name}", f"train --out {{out}} {SMALL} {options}", *says, status=status)


def calibrate(name, options, *says, status=2):
    return use(
        f"calibrate: {name}",
        f"calibrate {{model}} --out {{out}} --quiet {options}",
        *says,
        status=status,
    )


def evaluate(name, options, *says, status=2):
    return use(
        f"evaluate: {name}",
        f"evaluate {{model}} --out {{out}} --quiet {options}",
        *says,
        status=status,
    )


# Options that are numbers: those of integers with one that is out of range, those of floats too.
INTEGERS = {
    "sample": {
        "--steps": 0,
        "--num-images": 0,
        "--batch-size": 0,
        "--num-probes": 0,
        "--lanczos-probes": 0,
        "--seed": -1,
        "--label": -1,
    },
    "train": {
        "--denoiser-steps": 0,
        "--head-steps": 0,
        "--batch-size": 0,
        "--width": 7,
        "--limit": 0,
        "--workers": -1,
        "--image-size": 0,
        "--seed": -1,
    },
    "calibrate": {"--steps": 1, "--num-images": 1, "--num-probes": 0, "--seed": -1},
    "evaluate": {
        "--steps": 0,
        "--num-images": 0,
        "--fit-images": 1,
        "--num-samples": 7,
        "--batch-size": 0,
        "--num-probes": 0,
        "--seed": -1,
    },
}
FLOATS = {
    "sample": ("--eta", "--guidance", "--last-noise"),
    "train": ("--learning-rate", "--head-learning-rate"),
    "evaluate": ("--tolerance",),
}
COMMANDS = {"sample": sample, "train": train, "calibrate": calibrate, "evaluate": evaluate}

NUMBERS = [
    *(
        COMMANDS[name](f"{option} {value}", f"{option} {value}", option)
        for name, options in INTEGERS.items()
        for option, least in options.items()
        for value in (least, "1.5", "many")
    ),
    *(
        COMMANDS[name](f"--seed {seed}", f"--seed {seed}", "--seed")
        for name in COMMANDS
        for seed in (SEED, 2**64)
    ),
    *(
        COMMANDS[name](
            f"{option} {value}",
            f"{option} {value}" + (" --sampler ddim" if option == "--eta" else ""),
            option.strip("-").split("-")[-1],
        )
        for name, options in FLOATS.items()
        for option in options
        for value in ("nan", "inf", "-1", "half")
        if not (option == "--guidance" and value == "-1")
    ),
]
USES = [
    use("a command of no name", "draw", "No such command 'draw'"),
    use("an option of no name", "sample {model} --output {out}", "No such option", "--output"),
    use("sample of nothing", "sample --out {out}", "Missing argument"),
    *(
        use(f"{name} of what is not there", f"{name} {{missing}} --out {{out}}", "missing")
        for name in ("sample", "calibrate", "evaluate")
    ),
    *(
        use(f"{name} of a file", f"{name} {{file}} --out {{out}}", "file")
        for name in ("sample", "calibrate", "evaluate")
    ),
    *(
        use(f"{name} of an empty folder", f"{name} {{empty}} --out {{out}}", "empty")
        for name in ("sample", "calibrate", "evaluate")
    ),
    *(
        use(
            f"{name} {what}",
            f"{name} {{model}} {{place}} --device {device}".replace("{place}", "--out {out}"),
            "--device",
        )
        for name in ("sample", "calibrate", "evaluate")
        for what, device in (
            ("on a device of no name", "tpu9"),
            ("on a device without a number", "cuda:x"),
            ("on a GPU that is not there", "cuda:99"),
        )
    ),
    *(
        use(
            f"{name} into a file",
            f"{name} {{model}} --out {{file}}",
            "--out",
            "must be a directory",
        )
        for name in ("sample", "calibrate", "evaluate")
    ),
    *(
        use(
            f"{name} below a file",
            f"{name} {{model}} --out {{file}}/a",
            "--out",
            "must be a directory",
        )
        for name in ("sample", "calibrate", "evaluate")
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
    sample("a covariance of no name", "--covariance best", "--covariance", "'best'"),
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
    sample("a label without classes", "--label 1", "label"),
    sample("guidance without classes", "--guidance 2", "guidance"),
    sample("a text without texts", "--prompt cat", "texts"),
    sample("conditions that are not there", "--conditions {missing}", "--conditions", "missing"),
    sample("conditions that are no file of tensors", "--conditions {file}", "--conditions"),
    sample("latents of images", "--vae {empty}", "--vae", "is for a model of latents"),
    sample("variance channels without any", "--covariance variance_channels", "variance"),
    train("data that are not there", "--data {missing}", "missing"),
    train("a data set that is empty", "--data {empty}", "empty"),
    train("a data set that is a file", "--data {file}", "file"),
    train("a head of no name", "--head best", "--head", "'best'"),
    train("a schedule of no name", "--schedule sigmoid", "--schedule", "'sigmoid'"),
    use(
        "train: a denoiser that is not there",
        "train --out {out} --device cpu --denoiser {missing}",
        "missing",
    ),
    train("a width for a denoiser that is there", "--denoiser {model} --width 16", "--width"),
    train("noise of a flow", "--schedule flow --prediction-type epsilon", "epsilon"),
    train("a width that is no multiple of 8", "--width 12", "width"),
    train("all images held back", "--hold-out 100000", "hold"),
    calibrate("more steps than timesteps", "--steps 1001", "1000"),
    calibrate("what has no density", "--covariance lanczos", "--covariance lanczos has no density"),
    calibrate("a head that was not trained", "--covariance npr", "npr"),
    calibrate("other data", "--data {missing}", "missing"),
    evaluate("more steps than timesteps", "--steps 1001", "1000"),
    evaluate("what has no density", "--covariance lanczos", "lanczos"),
    evaluate("a head that was not trained", "--covariance npr", "npr"),
    evaluate("a decoder of no name", "--decoder best", "--decoder"),
    evaluate("Inception weights that are not there", "--quality --inception {missing}", "missing"),
]


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


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# In /proc nothing can be made, by root neither; only Linux has it.
HERE = [
    case
    for case in (*NUMBERS, *USES)
    if sys.platform == "linux" or not any("/proc" in text for text in case.arguments)
]


@table(HERE)
def test_wrong_use_ends_in_one_line_and_writes_nothing(case, model, tmp_path, capfd):
    places = {name: tmp_path / name for name in ("out", "empty", "missing", "file")}
    places["empty"].mkdir()
    places["file"].write_text("not what it should be", encoding="utf-8")
    before = contents(model)
    arguments = [text.format(model=model, **places) for text in case.arguments]
    status, _, said = command(capfd, *arguments)
    assert status == case.status, said
    for text in case.says:
        assert text in said
    assert "Traceback" not in said
    assert contents(model) == before
    assert contents(tmp_path) == {places["file"]: b"not what it should be"}


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
