"""What loading a file may do: nothing is unpickled, run or fetched."""

import ast
import io
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from bad_input import Case, command, run, table
from no_network import no_network
from no_pickle import UnpickledError, no_pickle
from PIL import Image
from safetensors.torch import load_file, save_file
from small_autoencoders import make_vae
from text_pipelines import stable_diffusion

import ocm
from ocm import checkpoints, data
from ocm.checkpoints.entries import CheckpointError
from ocm.cli.inputs import conditions_of, model_at
from ocm.evaluation import classifier
from ocm.integrations.attached import CovarianceModel
from ocm.integrations.latents import load_autoencoder
from ocm.integrations.texts import encode_by
from ocm.training.small_unet import small_unet
from ocm.training.state import read_state, write_state

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one of each kind that ocm loads."""
    from diffusers import DDPMPipeline, DDPMScheduler

    root = tmp_path_factory.mktemp("files")
    unet = small_unet((1, 8, 8), width=8)
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    head = ocm.make_head(denoiser)
    covariance = ocm.OptimalCovarianceMatching(denoiser, head)
    checkpoint = checkpoints.Checkpoint(denoiser, (1, 8, 8), 17, "digits", {"ocm": covariance})
    checkpoints.save(checkpoint, root / "checkpoint")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "pipeline")
    model = ocm.attach(unet)
    model.save_pretrained(root / "attached")
    scheduler = model.scheduler(DDPMScheduler())
    DDPMPipeline(model, scheduler).save_pretrained(root / "attached_pipeline")
    save_file(head.state_dict(), root / "head.safetensors")
    make_vae().save_pretrained(root / "vae")
    with torch.random.fork_rng():
        classifier.save(classifier.Classifier((1, 8, 8), 10, 4, 1, 1, 0), root / "classifier")
    stable_diffusion().save_pretrained(root / "texts")
    save_file({"encoder_hidden_states": torch.zeros(2, 3, 4)}, root / "conditions.safetensors")
    write_state(root / "state", {"losses": torch.zeros(3)}, {"seed": 0})
    (root / "images").mkdir()
    for index in range(4):
        Image.new("L", (8, 8), index).save(root / "images" / f"{index}.png")
    return root


LOADERS = {
    "a checkpoint": lambda root: checkpoints.load(root / "checkpoint"),
    "the denoiser of a checkpoint": lambda root: checkpoints.load_denoiser(root / "checkpoint"),
    "the denoiser of a pipeline": lambda root: checkpoints.load_denoiser(root / "pipeline"),
    "a pipeline with an attached head": lambda root: model_at(root / "attached_pipeline", CPU),
    "an attached model": lambda root: CovarianceModel.from_pretrained(root / "attached"),
    "a head": lambda root: ocm.attach(small_unet((1, 8, 8), width=8), root / "head.safetensors"),
    "an autoencoder": lambda root: load_autoencoder(root / "vae"),
    "a classifier": lambda root: classifier.load(root / "classifier"),
    "encoders of texts": lambda root: encode_by(root / "texts", ["a cat"], CPU),
    "conditions": lambda root: conditions_of(root / "conditions.safetensors", None, None, CPU),
    "the state of a training": lambda root: read_state(root / "state", {"seed": 0}),
    "the digits": lambda root: data.load("digits"),
    "a folder of images": lambda root: data.load(
        str(root / "images"), cache_dir=root / "cache"
    ).train[:],
}


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_is_unpickled_nor_fetched(name, files):
    with no_pickle(), no_network() as reached:
        assert LOADERS[name](files) is not None
    assert not reached


def test_no_command_unpickles_or_fetches(files, tmp_path, capfd):
    out, quiet = tmp_path / "model", ("--device", "cpu", "--quiet")
    few = ("--denoiser-steps", 1, "--head-steps", 1, "--batch-size", 2)
    with no_pickle(), no_network() as reached:
        for arguments in (
            ("train", "--out", out, *few),
            ("calibrate", out, "--num-images", 2, "--steps", 2),
            ("sample", out, "--out", tmp_path / "a", "--num-images", 2, "--steps", 2),
            (
                *("sample", files / "attached_pipeline", "--out", tmp_path / "b"),
                *("--num-images", 2, "--steps", 2),
            ),
            (
                *("evaluate", out, "--out", tmp_path / "c", "--covariance", "beta"),
                *("--num-images", 2, "--steps", 2),
            ),
        ):
            status, _, errors = command(capfd, *arguments, *quiet)
            assert status == 0, errors
    assert not reached


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_every_way_to_unpickle_is_noticed(tmp_path):
    """Else the tests above could not fail."""
    file = tmp_path / "weights.bin"
    torch.save({"x": torch.zeros(1)}, file)
    with no_pickle():
        for load in (
            lambda: torch.load(file, weights_only=False),
            lambda: torch.load(file, weights_only=True),
            lambda: pickle.loads(pickle.dumps(1)),
            lambda: pickle.load(io.BytesIO(b"N.")),
            lambda: pickle.Unpickler(io.BytesIO(b"N.")).load(),
            lambda: pickle._Unpickler(io.BytesIO(b"N.")).load(),
        ):
            with pytest.raises(UnpickledError):
                load()
    assert torch.load(file, weights_only=True)["x"] == 0


def test_a_reach_for_the_network_is_noticed():
    import urllib.request

    with no_network() as reached, pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)
    assert reached


def test_diffusers_itself_would_unpickle_what_is_refused(files, tmp_path):
    """That is what the refusals are for."""
    from diffusers import UNet2DModel

    folder = shutil.copytree(files / "pipeline" / "unet", tmp_path / "unet")
    torch.save(load_file(folder / WEIGHTS), (folder / WEIGHTS).with_suffix(".bin"))
    (folder / WEIGHTS).unlink()
    with no_pickle():
        with pytest.raises(UnpickledError):
            UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
        with pytest.raises(CheckpointError, match=r"model\.bin is never unpickled: convert it to"):
            checkpoints.load_backbone(folder)


def spoiled(name, change, *says):
    """Return a case of a pipeline of texts, under whose folder nothing may be unpickled or run."""

    def call(folder):
        evil = folder.parent / "evil"
        change(folder, evil)
        try:
            with no_pickle(), no_network() as reached:
                encode_by(folder, ["a cat"], CPU)
        finally:
            assert not evil.exists()
            assert not reached

    return Case(name, call, CheckpointError, says)


def index(**changes):
    def change(folder, evil):
        file = folder / "model_index.json"
        record = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps(record), encoding="utf-8")

    return change


def code(name, **changes):
    """Return what puts code into the folder."""

    def change(folder, evil):
        index(**changes)(folder, evil)
        source = f"open({str(evil)!r}, 'w')\nclass Evil:\n    pass\n"
        (folder / name).write_text(source, encoding="utf-8")

    return change


def weights(change):
    """Return what changes each of the encoder's weights, by its name, or leaves out a None."""

    def spoil(folder, evil):
        file = folder / "text_encoder" / "model.safetensors"
        changed = {name: change(name, x) for name, x in load_file(file).items()}
        file.unlink()
        kept = {name: x for name, x in changed.items() if x is not None}
        save_file(kept, file, metadata={"format": "pt"})

    return spoil


def pickled(folder, evil):
    file = folder / "text_encoder" / "model.safetensors"
    file.unlink()
    torch.save(Evil(evil), file.with_name("pytorch_model.bin"))


PIPELINES = [
    spoiled("code of its own", code("evil.py", _class_name=["evil", "Evil"]), "evil.py is code"),
    spoiled("code that no entry names", code("None.py"), "None.py is code, which is never run"),
    spoiled(
        "code for an encoder",
        code("text_encoder/evil.py", text_encoder=["evil", "Evil"]),
        "evil.py is code",
    ),
    spoiled("a list for a class", index(_class_name=["a", "b"]), "_class_name must be a text"),
    spoiled("an unknown class", index(_class_name="X"), "_class_name must be a pipeline of diffus"),
    spoiled("a model for a pipeline", index(_class_name="UNet2DModel"), "must be a pipeline of"),
    spoiled(
        "a library of the system", index(text_encoder=["os", "system"]), "text_encoder must be"
    ),
    spoiled(
        "an encoder of three parts", index(tokenizer=["a", "b", "c"]), "tokenizer must be a cl"
    ),
    spoiled("a number for a class", index(tokenizer=["transformers", 3]), "tokenizer must be a cl"),
    spoiled("a part out of the folder", index(**{"../x": ["diffusers", "X"]}), "../x must be a cl"),
    spoiled(
        "an unknown encoder",
        index(text_encoder=["transformers", "X"]),
        "whose parts load: ",
        "attribute X",
    ),
    spoiled("pickled weights of an encoder", pickled, "holds no pipeline whose parts load: "),
    spoiled(
        "a weight of an encoder too few",
        weights(lambda name, x: None if name.endswith("token_embedding.weight") else x),
        "lacks weights",
        "token_embedding",
    ),
    spoiled(
        "an encoder of another shape",
        weights(lambda name, x: x[..., :4].contiguous()),
        "holds no pipeline whose parts load: ",
    ),
    spoiled("an encoder of NaN", weights(lambda name, x: x * math.nan), "NaN or infinite"),
    spoiled(
        "a deep list of parts",
        lambda folder, evil: (folder / "model_index.json").write_text(
            "[" * 10**5, encoding="utf-8"
        ),
        "model_index.json cannot be read as JSON",
    ),
    spoiled(
        "no encoder",
        lambda folder, evil: shutil.rmtree(folder / "text_encoder"),
        "holds no pipeline whose parts load: ",
    ),
]


@table(PIPELINES)
def test_a_pipeline_of_texts(case, files, tmp_path):
    run(case, shutil.copytree(files / "texts", tmp_path / "copy"))


def test_no_source_asks_for_remote_code_or_pickles():
    """But for Inception's weights, which PyTorch's restricted reader looks at first."""
    asked = []
    for package in ("ocm", "hessdiag", "kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg in (
                    "trust_remote_code",
                    "torch_dtype",
                ):
                    asked.append((file.name, node.arg))
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                    asked.append((file.name, "torch.load"))
                if isinstance(node, (ast.Import, ast.ImportFrom)) and "pickle" in ast.unparse(node):
                    asked.append((file.name, "pickle"))
    assert asked == [("features.py", "torch.load")]
