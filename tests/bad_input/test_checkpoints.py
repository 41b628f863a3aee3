"""Checkpoints and folders of models that are damaged or hostile: each ends in one clear error.

The parts of a table share a folder that is right, of which each case gets a copy to spoil.
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
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

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each kind that loads."""
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
    save_file(texts, root / "conditions" / "texts.safetensors")
    write_state(root / "state", {"losses": torch.zeros(3)}, {"seed": 0})
    return root


def to(*keys, value):
    """Return what sets an entry in the first file: to("ocm.json", "levels", value=1)."""
    file, *names, last = keys

    def change(folder):
        record = inner = json.loads((folder / file).read_text(encoding="utf-8"))
        for name in names:
            inner = inner[name]
        inner[last] = value
        (folder / file).write_text(json.dumps(record), encoding="utf-8")

    return change


def without(file, *keys):
    def change(folder):
        record = inner = json.loads((folder / file).read_text(encoding="utf-8"))
        for name in keys[:-1]:
            inner = inner[name]
        del inner[keys[-1]]
        (folder / file).write_text(json.dumps(record), encoding="utf-8")

    return change


def text(file, content):
    return lambda folder: (folder / file).write_text(content, encoding="utf-8")


def content(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def instead(file, make):
    def change(folder):
        (folder / file).unlink()
        make(folder / file)

    return change


def tensors(file, change):
    """Return what changes the tensors of a file."""

    def rewrite(folder):
        found = load_file(folder / file)
        save_file(change(found) or found, folder / file)

    return rewrite


def first(change):
    """Return what changes the first tensor of a file."""

    def rewrite(found):
        name = min(found)
        found[name] = change(found[name])

    return rewrite


def truncated(file):
    def change(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])

    return change


def pickled(file):
    """Return what puts weights as PyTorch pickles them in the place of a file."""

    def change(folder):
        torch.save(load_file(folder / file), (folder / file).with_suffix(".bin"))
        (folder / file).unlink()

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


def elsewhere(file):
    """Return what puts a link to the file, which is moved out of the folder, in its place."""

    def change(folder):
        other = folder.parent / "elsewhere"
        (folder / file).rename(other)
        (folder / file).symlink_to(other)

    return change


DEEP = '{"a":' * 100_000
UNET = f"denoiser/{WEIGHTS}"
CONFIG = "denoiser/config.json"
ENTRY = "ocm.json lacks or misstates an entry: "
TABLES = "tables.json lacks or misstates an entry: "
HEAD = "heads/ocm.safetensors"
NO_UNET = "denoiser holds no UNet2DModel that fits: "


def wrong(name, change, *says):
    """Return a case of a checkpoint."""

    def call(folder):
        change(folder)
        return checkpoints.load(folder)

    return Case(name, call, CheckpointError, says)


def entry(name, key, value, *says):
    return wrong(name, to("ocm.json", *key.split("."), value=value), ENTRY, *says)


RANGE = "x0_range must be None or two finite numbers, the lower one first, got "
SHAPE = "image_shape must be three ints (C, H, W) in [1, 8192], got "
DESCRIPTIONS = [
    wrong("deep JSON", text("ocm.json", DEEP), "ocm.json cannot be read as JSON: ", "recursion"),
    wrong("JSON of a deep list", text("ocm.json", "[" * 100_000), "ocm.json cannot be read"),
    wrong("a list", text("ocm.json", "[]"), "ocm.json must hold a JSON object, got list"),
    wrong("an empty file", text("ocm.json", ""), "ocm.json cannot be read as JSON: Expecting"),
    wrong("bytes that are no UTF-8", content("ocm.json", b"\xff\xfe{}"), "ocm.json", "utf-8"),
    wrong(
        "a huge file",
        lambda folder: os.truncate(folder / "ocm.json", MOST_BYTES + 1),
        "ocm.json cannot be read as JSON: it must have at most 33554432 bytes",
    ),
    wrong(
        "an integer of 5000 digits",
        text("ocm.json", '{"levels": ' + "9" * 5000 + "}"),
        "ocm.json cannot be read as JSON: ",
        "4300 digits",
    ),
    wrong(
        "an entry twice",
        text("ocm.json", '{"levels": 2, "levels": 256}'),
        "ocm.json",
        "each entry once, got 'levels' twice",
    ),
    wrong(
        "a pipe",
        instead("ocm.json", os.mkfifo),
        "ocm.json cannot be read as JSON: it must be a regular file",
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
    wrong("no levels", without("ocm.json", "levels"), ENTRY, "levels must be", "is missing"),
    entry("a side of zero", "image_shape", [1, 0, 4], SHAPE + "[1, 0, 4]"),
    entry("a negative side", "image_shape", [1, 4, -4], SHAPE + "[1, 4, -4]"),
    entry("a huge side", "image_shape", [1, 4, 10**9], SHAPE),
    entry("a side that is no int", "image_shape", [1, 4, 4.0], SHAPE),
    entry("two sides", "image_shape", [1, 4], SHAPE),
    entry("a shape of text", "image_shape", "144", SHAPE + "'144'"),
    entry("a shape of objects", "image_shape", [{}, {}, {}], SHAPE),
    entry("negative images kept", "num_calibration", -1, "num_calibration must be an int", "-1"),
    entry("half an image kept", "num_calibration", 1.5, "num_calibration must be an int", "1.5"),
    entry("a number for data", "data", 3, "data must be a text, got 3"),
    entry("an unknown option", "data_options.cache_dir", "/", "data_options must be", "cache_dir"),
    entry("an option of another type", "data_options.limit", "x", "data_options must be", "'x'"),
    entry("a negative limit", "data_options.limit", -3, "data_options must be", "-3"),
    entry("a list of options", "data_options", ["limit"], "data_options must be", "['limit']"),
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
        "ocm.json",
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
    entry("betas of text", "schedule", {"name": "b", "betas": ["x"]}, "ocm.json"),
    entry("betas in lists", "schedule", {"name": "b", "betas": [[0.1], [0.1]]}, "betas must be"),
    entry("betas in a text", "schedule", {"name": "b", "betas": "0.1"}, "betas must be a list"),
    entry("a prediction of nothing", "prediction_type", "x0", "prediction_type must be one of"),
    entry("a list for a prediction", "prediction_type", [1], "prediction_type must be a text"),
    entry("heads in a list", "learned", ["ocm"], "learned must be an object, got ['ocm']"),
    entry("a head out of the folder", "learned", {"../../x": {}}, "learned must be", "'../../x'"),
    entry("an unknown head", "learned", {"best": {}}, "learned must be named iddpm, npr, sn"),
    entry("a head that is a text", "learned.ocm", "CovarianceHead", "ocm.json"),
    entry("a head of other channels", "learned.ocm.config.in_channels", 9, "learned.ocm must be"),
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


def config(name, key, value, *says):
    return wrong(
        name, to(CONFIG, key, value=value), NO_UNET, "config.json describes no model", *says
    )


SIZES = [
    config("3000 layers", "layers_per_block", 3000, "more weights than the "),
    config("layers without end", "layers_per_block", 10**15, "more weights than the "),
    config("3000 blocks", "down_block_types", ["DownBlock2D"] * 3000, "ValueError"),
    wrong(
        "layers of eight million channels",
        to(CONFIG, "block_out_channels", value=[8 * 10**6, 8 * 10**6]),
        NO_UNET,
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
        to(CONFIG, "_class_name", value=["UNet2DModel"]),
        "denoiser must hold one of UNet2DModel",
    ),
    wrong("a deep configuration", text(CONFIG, DEEP), "config.json cannot be read as JSON"),
    wrong(
        "a pipe for a configuration", instead(CONFIG, os.mkfifo), CONFIG, "must be a regular file"
    ),
    weights("other channels", to(CONFIG, "in_channels", value=2), "conv_in.weight' must be F16"),
    weights("weights of 8 bits", tensors(UNET, first(torch.Tensor.char)), "got I8 of shape"),
    weights("weights of 8-bit floats", tensors(UNET, first(to_float8)), "got F8_E4M3"),
    weights("complex weights", tensors(UNET, first(torch.Tensor.cfloat)), "got C64 of shape"),
    weights("weights of NaN", tensors(UNET, first(to_nan)), "NaN or infinite values in 'conv_in"),
    weights(
        "transposed weights",
        tensors(UNET, lambda t: {**t, "conv_in.weight": t["conv_in.weight"].mT.contiguous()[:4]}),
        "'conv_in.weight' must be",
    ),
    weights("truncated weights", truncated(UNET), "cannot be read"),
    weights("a tensor too many", tensors(UNET, lambda t: {**t, "x": torch.ones(1)}), "'x'"),
    weights("a lying size", content(UNET, header(shape=(10**12,))), "cannot be read", "invalid"),
    weights("a lying offset", content(UNET, header(offsets=(0, 2**60))), "cannot be read"),
    weights("offsets reversed", content(UNET, header(offsets=(8, 0))), "cannot be read"),
    weights("sizes that overflow", content(UNET, header(shape=(2**62, 8))), "cannot be read"),
    weights("a type of nothing", content(UNET, header(dtype="F7")), "cannot be read"),
    weights("an endless header", content(UNET, b"\xff" * 16), "cannot be read"),
    weights("an empty file of weights", content(UNET, b""), "cannot be read"),
    weights("a pipe for weights", instead(UNET, os.mkfifo), "it must be a regular file"),
    weights("a folder for weights", instead(UNET, os.mkdir), "it must be a regular file"),
    weights("pickled weights", pickled(UNET), "diffusion_pytorch_model.bin is never unpickled"),
    weights(
        "an index out of the folder",
        lambda folder: (
            (folder / UNET).unlink(),
            text(UNET + ".index.json", '{"weight_map": {"a": "../heads/ocm.safetensors"}}')(folder),
        ),
        "weight_map must name files .safetensors beside it, got '../heads/ocm.safetensors'",
    ),
    weights(
        "an index of pickles",
        lambda folder: (
            pickled(UNET)(folder),
            text(UNET + ".index.json", '{"weight_map": {"a": "diffusion_pytorch_model.bin"}}')(
                folder
            ),
        ),
        "weight_map must name files .safetensors",
    ),
    weights(
        "an index of numbers",
        lambda folder: (
            (folder / UNET).unlink(),
            text(UNET + ".index.json", '{"weight_map": {"a": 1}}')(folder),
        ),
        "index.json lacks or misstates an entry: TypeError",
    ),
    Case(
        "weights and description behind links",
        lambda folder: (elsewhere(UNET)(folder), checkpoints.load(folder))[1],
        check=lambda loaded: loaded.levels == 17,
    ),
]


def entry_of_table(name, kind, value, *says):
    return wrong(name, to("tables.json", kind, value=value), TABLES, *says)


def rows(values, places=(1, 9), kind="timesteps"):
    return {"ocm": {kind: list(places), "values": values}}


def variances(values):
    return {"analytic": {"timesteps": [1, 9], "values": values}}


FITTED = [
    wrong("no tables", lambda folder: (folder / "tables.json").unlink(), "tables.json cannot be"),
    wrong("deep tables", text("tables.json", DEEP), "tables.json cannot be read as JSON"),
    wrong("a pipe for tables", instead("tables.json", os.mkfifo), "tables.json", "regular file"),
    wrong("no calibrations", without("tables.json", "calibrations"), TABLES, "calibrations must"),
    entry_of_table("NaN", "calibrations", rows([[float("nan"), 0], [1, 0]]), "finite numbers"),
    entry_of_table(
        "a negative scale", "calibrations", rows([[-1, 0], [1, 0]]), "of at least 0", "-1"
    ),
    entry_of_table("a negative shift", "calibrations", rows([[1, 0], [1, -2]]), "of at least 0"),
    entry_of_table("three numbers", "calibrations", rows([[1, 0, 0]] * 2), "must have 2 numbers"),
    entry_of_table("rows of two lengths", "calibrations", rows([[1, 0], [1]]), "of one length"),
    entry_of_table("no rows", "calibrations", rows([], []), "of one length"),
    entry_of_table("a row too few", "calibrations", rows([[1, 0]]), "a row for each of 2 places"),
    entry_of_table("a place twice", "calibrations", rows([[1, 0]] * 2, (3, 3)), "once each"),
    entry_of_table("a negative time", "calibrations", rows([[1, 0]] * 2, (-1, 3)), "t >= 0"),
    entry_of_table("a time of text", "calibrations", rows([[1, 0]] * 2, ("a", 3)), "rows must be"),
    entry_of_table(
        "a step forwards", "calibrations", rows([[1, 0]], [[7, 3]], "steps"), "0 <= s < t"
    ),
    entry_of_table(
        "a step of three", "calibrations", rows([[1, 0]], [[1, 3, 7]], "steps"), "rows must be"
    ),
    entry_of_table("numbers in words", "calibrations", rows([["1", 0], [1, 0]]), "finite numbers"),
    entry_of_table("numbers beyond floats", "calibrations", rows([[10**400, 0]] * 2), "tables"),
    entry_of_table("a table in a list", "calibrations", {"ocm": [1]}, "TypeError"),
    entry_of_table("calibrations in a list", "calibrations", [], "calibrations must be an object"),
    entry_of_table(
        "calibrations of nothing", "calibrations", {"best": {}}, "calibrations must be named beta"
    ),
    entry_of_table(
        "a name out of the folder", "scaled_variances", {"../x": {}}, "must be named analytic"
    ),
    entry_of_table(
        "two variances", "scaled_variances", variances([[1, 2], [1, 2]]), "must have 1 numbers"
    ),
    wrong("a head of NaN", tensors(HEAD, first(to_nan)), HEAD, "NaN or infinite values in 'conv"),
    wrong(
        "a tensor too many for a head",
        tensors(HEAD, lambda t: {**t, "x": torch.ones(1)}),
        HEAD + " is of another model: Unexpected key(s) 'x'",
    ),
    wrong(
        "a head of another shape",
        tensors(HEAD, lambda t: {**t, "conv.bias": torch.zeros(2)}),
        HEAD + " is of another model: 'conv.bias' must be ",
        "of shape (1,), got F32 of shape (2,)",
    ),
    wrong("a head of ints", tensors(HEAD, first(torch.Tensor.int)), HEAD, "got I32"),
    wrong("a pipe for a head", instead(HEAD, os.mkfifo), HEAD, "it must be a regular file"),
    wrong("an empty head", content(HEAD, b""), HEAD + " cannot be read"),
    wrong(
        "a covariance of the data of NaN",
        tensors("data_covariance.safetensors", first(to_nan)),
        "data_covariance.safetensors holds NaN",
    ),
    wrong(
        "a negative variance of the data",
        tensors("data_covariance.safetensors", first(torch.neg)),
        "data_covariance must hold variances of at least 0",
    ),
    wrong(
        "a covariance of other data",
        tensors("data_covariance.safetensors", first(lambda x: x[..., :2].contiguous())),
        "data_covariance must be a number, or of shape (1, 4, 4) or (16, 16), got (1, 4, 2)",
    ),
    wrong(
        "a covariance of the data by another name",
        tensors("data_covariance.safetensors", lambda t: {"x": t["data_covariance"]}),
        "tensors must be named data_covariance, got 'x'",
    ),
    wrong(
        "a covariance of the data of 8 bits",
        tensors("data_covariance.safetensors", first(torch.Tensor.char)),
        "data_covariance.safetensors must hold F16, ",
        "got I8",
    ),
]


@table([*DESCRIPTIONS, *SIZES, *MODELS, *FITTED])
def test_a_checkpoint(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "checkpoint", tmp_path / "copy"))


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
def test_no_more_is_built_than_the_files_hold(case, built, originals, tmp_path):
    run(case, shutil.copytree(originals / "checkpoint", tmp_path / "copy"))
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
    to("config.json", key, value=value)(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config\.json asks for tables of [0-9]{10,} numbers"
    ):
        checkpoints.load_backbone(tmp_path)
    assert built["elsewhere"] == 0


def test_a_tensor_in_two_files_is_refused(originals, tmp_path):
    folder = shutil.copytree(originals / "checkpoint" / "denoiser", tmp_path / "denoiser")
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        shutil.copy(folder / WEIGHTS, folder / name)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": dict(zip("xy", names, strict=True))}
    text(WEIGHTS + ".index.json", json.dumps(index))(folder)
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds .*, and so does another file"):
        checkpoints.load_backbone(folder)


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


def places_in(record, before=()):
    """The keys that lead to each value of a record."""
    for name, value in record.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from places_in(value, (*before, name))


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
        to(name, *choice.choice(sorted(places_in(record))), value=value)(folder)
        # Whatever else is raised would end the test.
        with contextlib.suppress(CheckpointError):
            checkpoints.load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the user root")
@pytest.mark.parametrize("name", ["ocm.json", CONFIG, UNET, HEAD])
def test_a_file_that_may_not_be_read(name, originals, tmp_path):
    folder = shutil.copytree(originals / "checkpoint", tmp_path / "copy")
    (folder / name).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoints.load(folder)


SCHEDULER = "scheduler/scheduler_config.json"


def pipeline(name, change, *says):
    def call(folder):
        change(folder)
        return model_at(folder, CPU)

    return Case(name, call, CheckpointError, says)


def scheduler(name, key, value, *says):
    return pipeline(name, to(SCHEDULER, key, value=value), "scheduler_config.json", *says)


def size(name, value, *says):
    change = to("unet/config.json", "sample_size", value=value)
    return pipeline(name, change, "unet/config.json lacks or misstates an entry", *says)


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
    pipeline("a deep scheduler", text(SCHEDULER, DEEP), "cannot be read as JSON"),
    pipeline("a pipe for a scheduler", instead(SCHEDULER, os.mkfifo), "must be a regular file"),
    pipeline("no backbone", lambda f: shutil.rmtree(f / "unet"), "a folder unet or transformer"),
    pipeline("pickled weights", pickled(f"unet/{WEIGHTS}"), "never unpickled"),
    pipeline("3000 layers", to("unet/config.json", "layers_per_block", value=3000), "more weights"),
    size("a size of zero", 0, SHAPE + "(1, 0, 0)"),
    size("a huge size", 10**9, SHAPE),
    size("a size of text", "abc", "unpack"),
    size("three sizes", [1, 2, 3], "unpack"),
    size("a size of halves", [4.5, 4.5], SHAPE),
]


@table(PIPELINES)
def test_a_pipeline(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "pipeline", tmp_path / "copy"))


def attached(name, change, *says):
    def call(folder):
        change(folder)
        return CovarianceModel.from_pretrained(folder)

    return Case(name, call, CheckpointError, says)


def model(name, keys, value, *says):
    return attached(name, to("config.json", *keys.split("."), value=value), *says)


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
    attached("a deep configuration", text("config.json", DEEP), "config.json cannot be read"),
    attached("a pipe", instead("config.json", os.mkfifo), "config.json cannot be read", "regular"),
    attached("NaN", tensors(WEIGHTS, first(to_nan)), "holds NaN or infinite weights"),
    attached("weights of 8 bits", tensors(WEIGHTS, first(torch.Tensor.char)), "got I8"),
    attached("truncated weights", truncated(WEIGHTS), WEIGHTS + " cannot be read"),
    attached("pickled weights", pickled(WEIGHTS), "diffusion_pytorch_model.bin is never unpickled"),
    Case(
        "pickles asked for",
        lambda folder: CovarianceModel.from_pretrained(folder, use_safetensors=False),
        ValueError,
        ("use_safetensors must be True, got False", "convert them to safetensors"),
    ),
]


@table(ATTACHED)
def test_an_attached_model(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "attached", tmp_path / "copy"))


def autoencoder(name, change, *says):
    def call(folder):
        change(folder)
        return load_autoencoder(folder)

    return Case(name, call, CheckpointError, says)


AUTOENCODERS = [
    autoencoder(
        "another model", to("config.json", "_class_name", value="UNet2DModel"), "AutoencoderKL"
    ),
    autoencoder("3000 layers", to("config.json", "layers_per_block", value=3000), "more weights"),
    autoencoder("no groups", to("config.json", "norm_num_groups", value=0), "describes no model"),
    autoencoder("a deep configuration", text("config.json", DEEP), "cannot be read as JSON"),
    autoencoder("a pipe", instead("config.json", os.mkfifo), "config.json"),
    autoencoder("pickled weights", pickled(WEIGHTS), "never unpickled: convert it to safetensors"),
    autoencoder("NaN", tensors(WEIGHTS, first(to_nan)), "NaN or infinite values"),
    autoencoder("ints", tensors(WEIGHTS, first(torch.Tensor.long)), "got I64"),
]


@table(AUTOENCODERS)
def test_an_autoencoder(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "vae", tmp_path / "copy"))


def judge(name, change, *says):
    def call(folder):
        change(folder)
        return classifier.load(folder)

    return Case(name, call, CheckpointError, says)


CLASSIFIERS = [
    judge("a huge layer", to("config.json", "num_features", value=10**12), "of another model"),
    judge("huge images", to("config.json", "image_shape", value=[10**12, 8, 8]), "another model"),
    judge("images of text", to("config.json", "image_shape", value="8"), "describes no model"),
    judge("classes below zero", to("config.json", "num_classes", value=-1), "num_classes must be"),
    judge("another argument", to("config.json", "x", value=1), "describes no model", "'x'"),
    judge("a deep configuration", text("config.json", DEEP), "cannot be read as JSON"),
    judge("a pipe", instead("config.json", os.mkfifo), "it must be a regular file"),
    judge("a pipe for weights", instead("model.safetensors", os.mkfifo), "a regular file"),
    judge("pickled weights", pickled("model.safetensors"), "model.safetensors cannot be read"),
    judge("complex weights", tensors("model.safetensors", first(torch.Tensor.cfloat)), "got C64"),
]


@table(CLASSIFIERS)
def test_a_classifier(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "classifier", tmp_path / "copy"))


TEXTS = "texts.safetensors"


def embeddings(name, change, *says, file=TEXTS):
    def call(folder):
        change(folder)
        return conditions_of(folder / file, None, None, CPU)

    return Case(name, call, CheckpointError, ("--conditions ", file, *says))


CONDITIONS = [
    embeddings("NaN", tensors(TEXTS, first(to_nan)), "NaN or infinite values in 'encoder_hidden"),
    embeddings("complex numbers", tensors(TEXTS, first(torch.Tensor.cfloat)), "got C64"),
    embeddings("bytes", tensors(TEXTS, first(torch.Tensor.char)), "got I8"),
    embeddings("a pipe", instead(TEXTS, os.mkfifo), "it must be a regular file"),
    embeddings("a folder", instead(TEXTS, os.mkdir), "it must be a regular file"),
    embeddings("no file", lambda folder: (folder / TEXTS).unlink(), "No such file"),
    embeddings("a cut file", truncated(TEXTS), "cannot be read"),
    embeddings("a lying header", content(TEXTS, header(shape=(10**12,))), "cannot be read"),
    embeddings("a pickle", pickled(TEXTS), "it is never unpickled", file="texts.bin"),
]


@table(CONDITIONS)
def test_a_file_of_conditions(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "conditions", tmp_path / "copy"))


@pytest.mark.parametrize("name", ["return_dict", "sample", "x", "class_labels"])
def test_conditions_by_other_names_are_refused(name):
    denoiser = ocm.Denoiser(small_conditional_unet(), ocm.cosine())
    check_conditions(denoiser, {"encoder_hidden_states": torch.zeros(2, 3, 8)})
    with pytest.raises(ValueError, match=f"--conditions must be arguments .* got '{name}'"):
        check_conditions(denoiser, {name: torch.zeros(2)})


def state(name, change, *says):
    def call(folder):
        (inner,) = folder.iterdir()
        change(inner)
        return read_state(folder, {"seed": 0})

    return Case(name, call, TrainingStateError, ("state", *says))


STATES = [
    state("a list", text("state.json", "[]"), "state.json is damaged"),
    state("an empty object", text("state.json", "{}"), "state.json is damaged"),
    state("files in a text", to("state.json", "files", value="x"), "state.json is damaged"),
    state("another version", to("state.json", "version", value=[]), "has version []"),
    state("a cut file", truncated("state.safetensors"), "state.safetensors is damaged"),
    state("another seed", to("state.json", "run", "seed", value=1), "is of another training"),
]


@table(STATES)
def test_the_state_of_a_training(case, originals, tmp_path):
    run(case, shutil.copytree(originals / "state", tmp_path / "copy"))
