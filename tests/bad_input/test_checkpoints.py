"""Checkpoints and folders of models that are damaged or hostile: each ends in one clear error.

A case changes a copy of a folder that loads, and loads it.
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from bad_input import Case, run, table
from families import FAMILIES
from hypothesis import given, strategies
from safetensors.torch import load_file, save_file
from small_autoencoders import make_vae
from text_pipelines import unet as small_conditional_unet
from torch.nn.modules.module import register_module_parameter_registration_hook

import ocm
from ocm import checkpoints
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.entries import MOST_BYTES, CheckpointError
from ocm.cli.inputs import check_conditions, conditions_of, model_at
from ocm.diffusion.tables import Table
from ocm.evaluation import classifier
from ocm.integrations.attached import CovarianceModel
from ocm.integrations.latents import load_autoencoder
from ocm.training.small_unet import small_unet
from ocm.training.state import TrainingStateError, read_state, write_state

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET, INDEX = f"denoiser/{WEIGHTS}", f"denoiser/{WEIGHTS}.index.json"
CONFIG = "denoiser/config.json"
HEAD, DATA = "heads/ocm.safetensors", "data_covariance.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
TEXTS = "texts.safetensors"
STATE = "training-state-00000003"

LOADS = {
    "checkpoint": checkpoints.load,
    "pipeline": lambda folder: model_at(folder, CPU),
    "attached": CovarianceModel.from_pretrained,
    "vae": load_autoencoder,
    "classifier": classifier.load,
    "conditions": lambda folder: conditions_of(
        next(folder.glob("*.bin"), folder / TEXTS), None, None, CPU
    ),
    "state": lambda folder: read_state(folder, {"seed": 0}),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each kind in ``LOADS``."""
    root = tmp_path_factory.mktemp("originals")
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = small_unet((1, 4, 4), width=8)
    values = torch.ones(1, 4, 4)
    denoiser = ocm.Denoiser(unet, ocm.cosine(), data_covariance=values).freeze()
    covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser, "simple"))
    checkpoints.save(
        Checkpoint(
            denoiser,
            (1, 4, 4),
            17,
            "digits",
            {"ocm": covariance},
            {"analytic": ocm.Analytic(denoiser, Table({1: [0.1], 1000: [0.9]}))},
            {"ocm": Table({(3, 7): [0.5, 0.1]})},
            num_calibration=150,
            data_options={"limit": 300},
        ),
        root / "checkpoint",
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "pipeline")
    ocm.attach(unet).save_pretrained(root / "attached")
    make_vae().save_pretrained(root / "vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier.save(classifier.Classifier((1, 8, 8), 3, 4, 1, 1, 0), root / "classifier")
    (root / "conditions").mkdir()
    texts = {"encoder_hidden_states": torch.zeros(2, 3, 4)}
    save_file(texts, root / "conditions" / TEXTS)
    write_state(root / "state", {"losses": torch.zeros(3)}, {"seed": 0})
    return root


@pytest.fixture
def copied(originals, tmp_path):
    """Return a function that copies the folder of a kind, and says where it is."""
    return lambda kind: shutil.copytree(originals / kind, tmp_path / "copy")


MISSING = object()


def to(file, path, value):
    """Return what sets an entry of JSON, or removes it: to("ocm.json", "schedule.name", "x")."""
    *outer, last = path.split(".")

    def change(folder):
        record = inner = json.loads((folder / file).read_text(encoding="utf-8"))
        for name in outer:
            inner = inner[name]
        inner[last] = value
        if value is MISSING:
            del inner[last]
        (folder / file).write_text(json.dumps(record), encoding="utf-8")

    return change


def content(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def removed(name):
    """Return what removes a file, or a folder; "" is that which is loaded."""
    return lambda folder: (os.remove if (folder / name).is_file() else shutil.rmtree)(folder / name)


def instead(file, make):
    return lambda folder: ((folder / file).unlink(), make(folder / file))


def truncated(file):
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def tensors(file, change):
    """Return what changes the tensors of a file."""
    return lambda folder: save_file(change(load_file(folder / file)), folder / file)


def first(file, change):
    """Return what changes the first tensor of a file."""
    return tensors(file, lambda found: found | {min(found): change(found[min(found)])})


def pickled(file):
    """Return what puts weights as PyTorch pickles them in the place of a file."""

    def change(folder):
        torch.save(load_file(folder / file), (folder / file).with_suffix(".bin"))
        (folder / file).unlink()

    return change


def split(*named, then=lambda folder: None):
    """Return what takes the weights apart into a and b.safetensors; the index is of these names."""

    def change(folder):
        found = load_file(folder / UNET)
        (folder / UNET).unlink()
        some = {name: found.pop(name) for name in sorted(found)[:4]}
        save_file(some, folder / "denoiser" / "a.safetensors")
        save_file(found, folder / "denoiser" / "b.safetensors")
        index = json.dumps({"weight_map": dict(enumerate(named))})
        (folder / INDEX).write_text(index, encoding="utf-8")
        then(folder)

    return change


def header(*, dtype="F32", shape=(2,), offsets=(0, 8), size=8):
    """A safetensors file of one tensor with any header."""
    entry = {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}
    described = json.dumps(entry).encode()
    return struct.pack("<Q", len(described)) + described + b"\0" * size


def to_float8(x):
    return x.to(torch.float8_e4m3fn)


def to_nan(x):
    return torch.full_like(x, float("nan"))


def spoiled(kind, name, change, *says, error=CheckpointError):
    """Return a case of a folder that is changed, and then loaded."""

    def call(copied):
        folder = copied(kind)
        change(folder)
        return LOADS[kind](folder)

    return Case(f"{kind}: {name}", call, error, says)


def entries(kind, file, *always):
    """Return what makes a case of an entry of a file, whose error always says some texts."""

    def case(name, path, value, *says):
        return spoiled(kind, name, to(file, path, value), *always, *says)

    return case


DEEP = b'{"a":' * 100_000
ENTRY = "lacks or misstates an entry: "
NO_UNET = "denoiser holds no UNet2DModel that fits: "
NOT_UNPICKLED = f"{Path(WEIGHTS).stem}.bin is never unpickled: convert it to safetensors"

# What is read alike, wherever it is. Beside files of tensors: what is said where a pickle lies in
# their place, and then of whatever is wrong.
RECORDS = [
    ("checkpoint", "ocm.json"),
    ("checkpoint", "tables.json"),
    ("checkpoint", CONFIG),
    ("pipeline", SCHEDULER),
    ("attached", "config.json"),
    ("vae", "config.json"),
    ("classifier", "config.json"),
]
TENSORS = [
    ("checkpoint", UNET, NOT_UNPICKLED, NO_UNET),
    ("checkpoint", HEAD, f"{HEAD} cannot be read"),
    ("checkpoint", DATA, f"{DATA} cannot be read"),
    ("pipeline", f"unet/{WEIGHTS}", NOT_UNPICKLED),
    ("attached", WEIGHTS, NOT_UNPICKLED),
    ("vae", WEIGHTS, NOT_UNPICKLED),
    ("classifier", "model.safetensors", "model.safetensors cannot be read"),
    ("conditions", TEXTS, "texts.bin cannot be read: it is never unpickled", "--conditions "),
]
FILES = [
    *(
        spoiled(kind, f"{name} for {file}", change(file), f"{file} cannot be read as JSON: {says}")
        for kind, file in RECORDS
        for name, change, says in (
            ("deep JSON", partial(content, data=DEEP), "maximum recursion"),
            ("a pipe", partial(instead, make=os.mkfifo), "it must be a regular file"),
        )
    ),
    *(
        spoiled(kind, f"{name} for {file}", change(file), *always, *says)
        for kind, file, refused, *always in TENSORS
        for name, change, *says in (
            ("a pipe", partial(instead, make=os.mkfifo), file, "it must be a regular file"),
            ("a folder", partial(instead, make=os.mkdir), file, "it must be a regular file"),
            ("a cut file", truncated, f"{file} cannot be read"),
            ("a pickle", pickled, refused),
            ("NaN", partial(first, change=to_nan), "NaN or infinite "),
            ("8 bits", partial(first, change=torch.Tensor.char), file, " F16", "got I8"),
            ("complex", partial(first, change=torch.Tensor.cfloat), file, " F16", "got C64"),
        )
    ),
]

wrong = partial(spoiled, "checkpoint")
entry = entries("checkpoint", "ocm.json", f"ocm.json {ENTRY}")
RANGE = "x0_range must be None or two finite numbers, the lower one first, got "
SHAPE = "image_shape must be three ints (C, H, W) in [1, 8192], got "
DESCRIPTIONS = [
    wrong("no folder", removed(""), "no checkpoint at ", "copy: ", "ocm.json is missing"),
    wrong("no description", removed("ocm.json"), "no checkpoint at ", "ocm.json is missing"),
    wrong("another format", to("ocm.json", "format", "else"), "must have", "got {'format': 'else'"),
    wrong("another version", to("ocm.json", "version", 9), "'version': 2}, got", "'version': 9}"),
    wrong("JSON of a deep list", content("ocm.json", b"[" * 100_000), "ocm.json cannot be read"),
    wrong("a list", content("ocm.json", b"[]"), "ocm.json must hold a JSON object, got list"),
    wrong("an empty file", content("ocm.json", b""), "ocm.json cannot be read as JSON: Expecting"),
    wrong("half a file", truncated("ocm.json"), "ocm.json cannot be read as JSON"),
    wrong("bytes that are no UTF-8", content("ocm.json", b"\xff\xfe{}"), "ocm.json", "utf-8"),
    wrong(
        "a huge file",
        lambda folder: os.truncate(folder / "ocm.json", MOST_BYTES + 1),
        "ocm.json cannot be read as JSON: it must have at most 33554432 bytes",
    ),
    wrong(
        "an integer of 5000 digits",
        content("ocm.json", b'{"levels": ' + b"9" * 5000 + b"}"),
        "ocm.json cannot be read as JSON: ",
        "4300 digits",
    ),
    wrong(
        "an entry twice after many",
        content(
            "ocm.json", b"{%s}" % b",".join(b'"%d": 0' % min(n, 10**5) for n in range(10**5 + 2))
        ),
        "ocm.json",
        "each entry once, got '100000' twice",
    ),
    wrong(
        "a device",
        instead("ocm.json", lambda file: file.symlink_to("/dev/zero")),
        "ocm.json cannot be read as JSON: it must be a regular file",
    ),
    wrong("a folder", instead("ocm.json", os.mkdir), "ocm.json cannot be read", "a regular file"),
    wrong(
        "a link to itself",
        instead("ocm.json", lambda file: file.symlink_to(file)),
        "no checkpoint at ",
        "ocm.json is missing",
    ),
    entry("one number for a range", "x0_range", [1], RANGE + "[1]"),
    entry("a range of three", "x0_range", [0, 1, 2], RANGE),
    entry("a reversed range", "x0_range", [1.0, -1.0], RANGE + "[1.0, -1.0]"),
    entry("an empty range", "x0_range", [1.0, 1.0], RANGE),
    entry("a range of NaN", "x0_range", [float("nan"), 1.0], RANGE + "[nan, 1.0]"),
    entry("a range without end", "x0_range", [-1.0, float("inf")], RANGE),
    entry("a range of text", "x0_range", "-1", RANGE + "'-1'"),
    entry("one level", "levels", 1, "levels must be an int in [2, 65536], got 1"),
    entry("a level that is no int", "levels", 1e30, "levels must be an int", "got 1e+30"),
    entry("endless levels", "levels", 10**40, "levels must be an int in [2, 65536], got 1000"),
    entry("levels that are true", "levels", True, "levels must be an int", "got True"),
    entry("levels of text", "levels", "x", "levels must be an int in [2, 65536], got 'x'"),
    entry("no levels", "levels", MISSING, "levels must be", "is missing"),
    entry("a side of zero", "image_shape", [1, 0, 4], SHAPE + "[1, 0, 4]"),
    entry("a negative side", "image_shape", [1, 4, -4], SHAPE + "[1, 4, -4]"),
    entry("a huge side", "image_shape", [1, 4, 10**9], SHAPE),
    entry("a side that is no int", "image_shape", [1, 4, 4.0], SHAPE),
    entry("two sides", "image_shape", [1, 4], SHAPE),
    entry("a shape of text", "image_shape", "144", SHAPE + "'144'"),
    entry("a shape of objects", "image_shape", [{}, {}, {}], SHAPE),
    wrong(
        "images of other channels",
        lambda folder: (
            to("ocm.json", "data_covariance", False)(folder),
            to("ocm.json", "image_shape", [3, 4, 4])(folder),
        ),
        f"ocm.json {ENTRY}image_shape has 3 channels, the denoiser beside it 1",
    ),
    entry("negative images kept", "num_calibration", -1, "num_calibration must be an int", "-1"),
    entry("false images kept", "num_calibration", False, "num_calibration must be an int", "False"),
    entry("half an image kept", "num_calibration", 1.5, "num_calibration must be an int", "1.5"),
    entry("a number for data", "data", 3, "data must be a text, got 3"),
    entry("an unknown option", "data_options.cache_dir", "/", "data_options must be", "cache_dir"),
    entry("an option of another type", "data_options.limit", "x", "data_options must be", "'x'"),
    entry("a negative limit", "data_options.limit", -3, "data_options must be", "-3"),
    entry("a list of options", "data_options", ["limit"], "data_options must be", "['limit']"),
    entry("no schedule", "schedule", MISSING, "schedule must be an object, and is missing"),
    entry("an unknown schedule", "schedule.name", "x", "name must be one of linear, ", "got 'x'"),
    entry("a schedule in a list", "schedule", ["cosine"], "schedule must be an object, got"),
    entry("an unhashable schedule", "schedule.name", [], "name must be one of linear, cosine"),
    entry(
        "a thousand million timesteps",
        "schedule.num_timesteps",
        10**9,
        "num_timesteps must be in [2, 1000000], got 1000000000",
    ),
    entry(
        "timesteps that are no int", "schedule.num_timesteps", 1e9, "num_timesteps must be an int"
    ),
    entry("one timestep", "schedule.num_timesteps", 1, "num_timesteps must be in [2, 1000000]"),
    entry("negative timesteps", "schedule.num_timesteps", -5, "num_timesteps must be", "got -5"),
    entry(
        "an unknown argument of a schedule",
        "schedule.options",
        {"kind": 3},
        "TypeError: ",
        "unexpected keyword argument 'kind'",
    ),
    entry("an offset of NaN", "schedule.options", {"offset": float("nan")}, "betas must be"),
    entry("an offset of text", "schedule.options", {"offset": "x"}, "TypeError: "),
    entry("an offset beyond floats", "schedule.options", {"offset": 10**400}, "OverflowError: "),
    entry("options in a list", "schedule.options", [1], "options must be an object, got [1]"),
    entry(
        "a path without end",
        "schedule",
        {"name": "vp", "num_timesteps": 9, "options": {"beta_max": float("inf")}},
        "beta_max must be positive and finite, got inf",
    ),
    entry(
        "an infinite noise level",
        "schedule",
        {"name": "edm", "num_timesteps": 9, "options": {"sigma_max": float("inf")}},
        "sigma_max must be positive and finite, got inf",
    ),
    entry(
        "noise levels beyond floats",
        "schedule",
        {"name": "edm", "num_timesteps": 9, "options": {"rho": 1e-9}},
    ),
    entry(
        "a spread of NaN",
        "schedule",
        {"name": "trigflow", "num_timesteps": 9, "options": {"data_std": float("nan")}},
        "data_std must be positive and finite, got nan",
    ),
    entry("betas above 1", "schedule", {"name": "b", "betas": [0.1, 2.0]}, "betas must be", "2.0"),
    entry("negative betas", "schedule", {"name": "b", "betas": [-0.1]}, "betas must be", "-0.1"),
    entry("no betas", "schedule", {"name": "b", "betas": []}, "betas must be 1 to 1000000"),
    entry("betas of text", "schedule", {"name": "b", "betas": ["x"]}),
    entry("betas in lists", "schedule", {"name": "b", "betas": [[0.1], [0.1]]}, "betas must be"),
    entry("betas in a text", "schedule", {"name": "b", "betas": "0.1"}, "betas must be a list"),
    entry("a prediction of nothing", "prediction_type", "x0", "prediction_type must be one of"),
    entry("a list for a prediction", "prediction_type", [1], "prediction_type must be a text"),
    entry("heads in a list", "learned", ["ocm"], "learned must be an object, got ['ocm']"),
    entry("a head out of the folder", "learned", {"../../x": {}}, "learned must be", "'../../x'"),
    entry("an unknown head", "learned", {"best": {}}, "learned must be named iddpm, npr, sn"),
    entry("a head that is a text", "learned.ocm", "CovarianceHead"),
    entry("half a head", "learned.ocm.config", MISSING, "config must be an object, and is missing"),
    entry(
        "a head of other channels",
        "learned.ocm.config.in_channels",
        9,
        "learned.ocm must be of the denoiser beside it, one of ",
        "'in_channels': 8",
        "'in_channels': 9",
    ),
    entry("a head of no groups", "learned.ocm.config.num_groups", 0, "learned.ocm must be"),
    entry("a huge head", "learned.ocm.config.out_channels", 10**9, "learned.ocm must be"),
    entry(
        "a negative spread",
        "learned.ocm.parameterisation.data_std",
        -1.0,
        "data_std must be positive, got -1.0",
    ),
    entry(
        "a spread that is NaN",
        "learned.ocm.parameterisation.data_std",
        float("nan"),
        "data_std must be positive, got nan",
    ),
    entry(
        "a sign in words",
        "learned.ocm.parameterisation.positive",
        "no",
        "positive True or False, got",
    ),
]


def weights(name, change, *says):
    return wrong(name, change, NO_UNET, *says)


config = entries("checkpoint", CONFIG, NO_UNET, "config.json describes no model")
SIZES = [
    config("3000 layers", "layers_per_block", 3000, "more weights than the "),
    config("layers without end", "layers_per_block", 10**15, "more weights than the "),
    config("3000 blocks", "down_block_types", ["DownBlock2D"] * 3000, "ValueError"),
    weights(
        "layers of eight million channels",
        to(CONFIG, "block_out_channels", [8 * 10**6, 8 * 10**6]),
        "is of another model: Unexpected key(s) 'down_blocks.1.resnets.0.conv_shortcut.bias'",
    ),
]
MODELS = [
    config("no groups", "norm_num_groups", 0, "ZeroDivisionError"),
    config("another number of groups", "norm_num_groups", 7, "ValueError"),
    config("unknown blocks", "down_block_types", ["X", "Y"], "ValueError", "does not exist"),
    config("blocks that are numbers", "down_block_types", [1, 2]),
    config("negative channels", "block_out_channels", [-8, -16]),
    config("channels of text", "block_out_channels", "8, 16"),
    config("an unknown activation", "act_fn", "exec"),
    config("channels beyond 64 bits", "in_channels", 2**70),
    wrong(
        "a class in a list",
        to(CONFIG, "_class_name", ["UNet2DModel"]),
        "denoiser must hold one of UNet2DModel",
    ),
    wrong(
        "another class",
        to(CONFIG, "_class_name", "AutoencoderKL"),
        "denoiser must hold one of UNet2DModel",
        "got 'AutoencoderKL'",
    ),
    wrong("no denoiser", removed("denoiser"), f"{CONFIG} cannot be read"),
    wrong("a list for a model", content(CONFIG, b"[1]"), "must hold a JSON object, got list"),
    weights("no weights", removed(UNET), f"neither a single model file {WEIGHTS} nor an index"),
    weights("other channels", to(CONFIG, "in_channels", 2), "conv_in.weight' must be F16"),
    weights(
        "one NaN", first(UNET, to_nan), f"{UNET} holds NaN or infinite values in 'conv_in.bias'"
    ),
    weights("weights of 8-bit floats", first(UNET, to_float8), "got F8_E4M3"),
    weights(
        "transposed weights",
        tensors(UNET, lambda t: t | {"conv_in.weight": t["conv_in.weight"].mT.contiguous()[:4]}),
        "'conv_in.weight' must be",
    ),
    weights("a tensor too many", tensors(UNET, lambda t: t | {"x": torch.ones(1)}), "'x'"),
    weights("a lying size", content(UNET, header(shape=(10**12,))), "cannot be read", "invalid"),
    weights("a lying offset", content(UNET, header(offsets=(0, 2**60))), "cannot be read"),
    weights("offsets reversed", content(UNET, header(offsets=(8, 0))), "cannot be read"),
    weights("sizes that overflow", content(UNET, header(shape=(2**62, 8))), "cannot be read"),
    weights("a type of nothing", content(UNET, header(dtype="F7")), "cannot be read"),
    weights("an endless header", content(UNET, b"\xff" * 16), "cannot be read"),
    weights("an empty file of weights", content(UNET, b""), "cannot be read"),
    weights(
        "an index of one file of two", split("b.safetensors"), "Missing key(s) 'conv_in.weight'"
    ),
    weights(
        "an index of a file too many",
        split("a.safetensors", "c.safetensors"),
        "c.safetensors cannot be read: No such file",
    ),
    weights(
        "one of two files damaged",
        split("a.safetensors", "b.safetensors", then=truncated("denoiser/b.safetensors")),
        "b.safetensors cannot be read",
    ),
    weights(
        "a tensor in two files",
        split(
            "a.safetensors",
            "b.safetensors",
            then=lambda folder: shutil.copy(
                folder / "denoiser" / "a.safetensors", folder / "denoiser" / "b.safetensors"
            ),
        ),
        "b.safetensors holds ",
        ", and so does another file",
    ),
    weights("an index of nothing", split(), "weight_map must name a file, got none"),
    weights(
        "an index out of the folder",
        split("../heads/ocm.safetensors"),
        "weight_map must name files .safetensors beside it, got '../heads/ocm.safetensors'",
    ),
    weights("an index of pickles", split("a.bin"), "weight_map must name files .safetensors"),
    weights("an index of numbers", split(1), f"index.json {ENTRY}TypeError"),
    weights("half an index", split(then=truncated(INDEX)), "index.json cannot be read as JSON"),
    weights(
        "an index without files",
        split(then=content(INDEX, b"{}")),
        "weight_map must be an object, and is missing",
    ),
]

in_tables = entries("checkpoint", "tables.json", f"tables.json {ENTRY}")


def rows(values, places=(1, 9), kind="timesteps"):
    return {"ocm": {kind: list(places), "values": values}}


def variances(values):
    return {"analytic": {"timesteps": [1, 9], "values": values}}


FITTED = [
    wrong("no tables", removed("tables.json"), "tables.json cannot be"),
    in_tables("no calibrations", "calibrations", MISSING, "calibrations must be", "is missing"),
    in_tables("an earlier version", "analytic", {}, "are those of an earlier version: remove"),
    in_tables("NaN", "calibrations", rows([[float("nan"), 0], [1, 0]]), "finite numbers"),
    in_tables("a negative scale", "calibrations", rows([[-1, 0], [1, 0]]), "of at least 0", "-1"),
    in_tables("a negative shift", "calibrations", rows([[1, 0], [1, -2]]), "of at least 0"),
    in_tables("three numbers", "calibrations", rows([[1, 0, 0]] * 2), "must have 2 numbers"),
    in_tables("rows of two lengths", "calibrations", rows([[1, 0], [1]]), "of one length"),
    in_tables("no rows", "calibrations", rows([], []), "of one length"),
    in_tables("a row too few", "calibrations", rows([[1, 0]]), "a row for each of 2 places"),
    in_tables("a place twice", "calibrations", rows([[1, 0]] * 2, (3, 3)), "once each"),
    in_tables("a negative time", "calibrations", rows([[1, 0]] * 2, (-1, 3)), "t >= 0"),
    in_tables("a time of text", "calibrations", rows([[1, 0]] * 2, ("a", 3)), "rows must be"),
    in_tables("a step forwards", "calibrations", rows([[1, 0]], [[7, 3]], "steps"), "0 <= s < t"),
    in_tables(
        "a step of three", "calibrations", rows([[1, 0]], [[1, 3, 7]], "steps"), "rows must be"
    ),
    in_tables("numbers in words", "calibrations", rows([["1", 0], [1, 0]]), "finite numbers"),
    in_tables("numbers beyond floats", "calibrations", rows([[10**400, 0]] * 2), "finite numbers"),
    in_tables("a table in a list", "calibrations", {"ocm": [1]}, "TypeError"),
    in_tables("calibrations in a list", "calibrations", [], "calibrations must be an object"),
    in_tables(
        "calibrations of nothing", "calibrations", {"best": {}}, "calibrations must be named beta"
    ),
    in_tables(
        "a name out of the folder", "scaled_variances", {"../x": {}}, "must be named analytic"
    ),
    in_tables(
        "two variances", "scaled_variances", variances([[1, 2], [1, 2]]), "must have 1 numbers"
    ),
    wrong("no head", removed(HEAD), f"{HEAD} cannot be read"),
    wrong(
        "a tensor too many for a head",
        tensors(HEAD, lambda t: t | {"x": torch.ones(1)}),
        HEAD + " is of another model: Unexpected key(s) 'x'",
    ),
    wrong(
        "a head of another shape",
        tensors(HEAD, lambda t: t | {"conv.bias": torch.zeros(2)}),
        HEAD + " is of another model: 'conv.bias' must be ",
        "of shape (1,), got F32 of shape (2,)",
    ),
    wrong("a head of ints", first(HEAD, torch.Tensor.int), HEAD, "got I32"),
    wrong("an empty head", content(HEAD, b""), f"{HEAD} cannot be read"),
    wrong(
        "a negative variance of the data",
        first(DATA, torch.neg),
        "data_covariance must hold variances of at least 0",
    ),
    wrong(
        "a covariance of other data",
        first(DATA, lambda x: x[..., :2].contiguous()),
        "data_covariance must be a number, or of shape (1, 4, 4) or (16, 16), got (1, 4, 2)",
    ),
    wrong(
        "a covariance of the data by another name",
        tensors(DATA, lambda t: {"x": t["data_covariance"]}),
        "tensors must be named data_covariance, got 'x'",
    ),
]

scheduler = entries("pipeline", SCHEDULER, "scheduler_config.json")
of_unet = entries("pipeline", "unet/config.json")
PIPELINES = [
    scheduler("no end of timesteps", "num_train_timesteps", 10**9, "must be in [2, 1000000]"),
    scheduler("negative timesteps", "num_train_timesteps", -5, "num_timesteps must be at least 1"),
    scheduler("timesteps of text", "num_train_timesteps", "9", "num_timesteps must be an int"),
    scheduler("a beta of NaN", "beta_end", float("nan"), "betas must be"),
    scheduler("a beta above 1", "beta_end", 3.0, "betas must be"),
    scheduler("betas of text", "trained_betas", ["x"], "scheduler has no configuration of a DDPM"),
    scheduler("betas in lists", "trained_betas", [[0.1, 0.2]], "betas must be"),
    scheduler("an unknown schedule", "beta_schedule", "x", "scheduler has no configuration of a"),
    scheduler("a model for a scheduler", "_class_name", "UNet2DModel", "must be one of diffusers"),
    scheduler("a module for a scheduler", "_class_name", "os", "scheduler must be one of diffuser"),
    scheduler("a class in a list", "_class_name", ["DDPMScheduler"], "must be one of diffusers"),
    scheduler("an unknown prediction", "prediction_type", "x", "prediction_type must be one of"),
    scheduler("a prediction in a list", "prediction_type", [], "scheduler_config.json"),
    spoiled("pipeline", "no backbone", removed("unet"), "a folder unet or transformer"),
    of_unet("3000 layers", "layers_per_block", 3000, "more weights"),
    of_unet("a size of zero", "sample_size", 0, f"config.json {ENTRY}", SHAPE + "(1, 0, 0)"),
    of_unet("a huge size", "sample_size", 10**9, f"config.json {ENTRY}", SHAPE),
    of_unet("a size of text", "sample_size", "abc", f"config.json {ENTRY}", "unpack"),
    of_unet("three sizes", "sample_size", [1, 2, 3], f"config.json {ENTRY}", "unpack"),
    of_unet("a size of halves", "sample_size", [4.5, 4.5], f"config.json {ENTRY}", SHAPE),
]

model = entries("attached", "config.json")
ATTACHED = [
    model("an unknown backbone", "backbone_class", "X", "backbone_class must be one of diffusers"),
    model("a pipeline for a backbone", "backbone_class", "DiffusionPipeline", "backbone_class"),
    model("a number for a backbone", "backbone_class", 3, "config.json describes no model"),
    model("an unknown head", "head_class", "X", "head_class one of CovarianceHead"),
    model("3000 layers", "backbone_config.layers_per_block", 3000, "more weights than the "),
    model("a huge head", "head_config.in_channels", 8 * 10**6, "is of another model"),
    model("a head of no groups", "head_config.num_groups", 0, "config.json describes no model"),
    model("another argument of the head", "head_config.x", 0, "config.json describes no model"),
    model("a negative spread", "data_std", -1.0, "data_std must be positive, got -1.0"),
    model("a sign in words", "positive", "no", "positive True or False"),
    Case(
        "attached: pickles asked for",
        lambda copied: CovarianceModel.from_pretrained(copied("attached"), use_safetensors=False),
        ValueError,
        ("use_safetensors must be True, got False", "convert them to safetensors"),
    ),
]

autoencoder = entries("vae", "config.json")
judge = entries("classifier", "config.json")
state = partial(spoiled, "state", error=TrainingStateError)
OTHERS = [
    autoencoder("another model", "_class_name", "UNet2DModel", "AutoencoderKL"),
    autoencoder("3000 layers", "layers_per_block", 3000, "more weights"),
    autoencoder("no groups", "norm_num_groups", 0, "describes no model"),
    spoiled("vae", "ints", first(WEIGHTS, torch.Tensor.long), "got I64"),
    judge("a huge layer", "num_features", 10**12, "of another model"),
    judge("huge images", "image_shape", [10**12, 8, 8], "of another model"),
    judge("images of text", "image_shape", "8", "describes no model"),
    judge("classes below zero", "num_classes", -1, "num_classes must be"),
    judge("another argument", "x", 1, "describes no model", "'x'"),
    spoiled("conditions", "no file", removed(TEXTS), "--conditions ", TEXTS, "No such file"),
    spoiled(
        "conditions", "a lying size", content(TEXTS, header(shape=(10**12,))), "cannot be read"
    ),
    state("a list", content(f"{STATE}/state.json", b"[]"), "state.json is damaged"),
    state("an empty object", content(f"{STATE}/state.json", b"{}"), "state.json is damaged"),
    state("files in a text", to(f"{STATE}/state.json", "files", "x"), "state.json is damaged"),
    state("another version", to(f"{STATE}/state.json", "version", []), "state", "has version []"),
    state("a cut file", truncated(f"{STATE}/state.safetensors"), "state.safetensors is damaged"),
    state("another seed", to(f"{STATE}/state.json", "run.seed", 1), "is of another training"),
]


@table([*FILES, *DESCRIPTIONS, *MODELS, *FITTED, *PIPELINES, *ATTACHED, *OTHERS])
def test_what_is_spoiled_is_refused(case, copied):
    run(case, copied)


def test_files_behind_links_are_read(copied):
    folder = copied("checkpoint")
    for file in ("ocm.json", UNET):
        place = (folder / file).rename(folder.parent / Path(file).name)
        (folder / file).symlink_to(place)
    assert checkpoints.load(folder).levels == 17


@pytest.fixture
def built():
    """Numbers of the parameters that modules are given, on the device "meta" and elsewhere."""
    counts = {"meta": 0, "elsewhere": 0}

    def register(module, name, parameter):
        counts["meta" if parameter.is_meta else "elsewhere"] += 1

    handle = register_module_parameter_registration_hook(register)
    yield counts
    handle.remove()


@table(SIZES)
def test_no_more_is_built_than_the_files_hold(case, built, originals, copied):
    run(case, copied)
    assert built["elsewhere"] == 0
    count = len(load_file(originals / "checkpoint" / UNET))
    assert built["meta"] <= 2 * count + 65


def test_what_is_right_loads_and_is_built_once(built, originals):
    assert checkpoints.load(originals / "checkpoint").levels == 17
    count = len(load_file(originals / "checkpoint" / UNET))
    assert count <= built["meta"] <= 2 * count + 64
    assert built["elsewhere"] > count


POSITIONS = {
    "DiTTransformer2DModel": ("sample_size", 10**5),
    "PixArtTransformer2DModel": ("sample_size", 10**5),
    "WanTransformer3DModel": ("rope_max_seq_len", 10**9),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_tables_of_positions_are_bounded(name, built, tmp_path):
    FAMILIES[name].make().save_pretrained(tmp_path)
    built["elsewhere"] = 0
    key, value = POSITIONS[name]
    to("config.json", key, value)(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config\.json asks for tables of [0-9]{10,} numbers"
    ):
        checkpoints.load_backbone(tmp_path)
    assert built["elsewhere"] == 0


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**70), 2**70)
    | strategies.floats()
    | strategies.text(max_size=8),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places_in(record, before=""):
    """The path to each value of a record."""
    for name, value in record.items():
        yield before + name
        if isinstance(value, dict):
            yield from places_in(value, f"{before}{name}.")


@given(
    name=strategies.sampled_from(["ocm.json", "tables.json", CONFIG]),
    choice=strategies.randoms(use_true_random=False),
    value=VALUES,
)
def test_any_value_of_any_entry_loads_or_is_named(name, choice, value, originals):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "copy")
        shutil.copytree(originals / "checkpoint", folder)
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        to(name, choice.choice(sorted(places_in(record))), value)(folder)
        # Whatever else is raised would end the test.
        with contextlib.suppress(CheckpointError):
            checkpoints.load(folder)


@contextlib.contextmanager
def bound_by_permissions():
    """Act as nobody in place of root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["ocm.json", CONFIG, UNET, HEAD])
def test_a_file_that_may_not_be_read(name, originals):
    with tempfile.TemporaryDirectory() as root:  # the folder of a test is its user's alone
        folder = Path(root, "copy")
        shutil.copytree(originals / "checkpoint", folder)
        for path in (Path(root), *Path(root).rglob("*")):
            path.chmod(0o755)
        checkpoints.load(folder)  # which imports what nobody may not read
        with bound_by_permissions():
            checkpoints.load(folder)
        (folder / name).chmod(0)
        with (
            bound_by_permissions(),
            pytest.raises(CheckpointError, match="Permission denied") as raised,
        ):
            checkpoints.load(folder)
        assert Path(name).name in str(raised.value)


@pytest.mark.parametrize("name", ["return_dict", "sample", "x", "class_labels"])
def test_conditions_by_other_names_are_refused(name):
    denoiser = ocm.Denoiser(small_conditional_unet(), ocm.cosine())
    check_conditions(denoiser, {"encoder_hidden_states": torch.zeros(2, 3, 8)})
    with pytest.raises(ValueError, match=f"--conditions must be arguments .* got '{name}'"):
        check_conditions(denoiser, {name: torch.zeros(2)})
