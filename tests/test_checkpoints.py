"""Round trips, and an error that names the file for every way a checkpoint can be wrong."""

import json
import shutil

import pytest
import torch

import ocm
from ocm import checkpoints
from ocm.backbones import small_unet


@pytest.fixture(scope="module")
def original():
    denoiser = ocm.Denoiser(small_unet((1, 4, 4)), ocm.cosine()).freeze()
    head = ocm.CovarianceHead.for_denoiser(denoiser).requires_grad_(False)
    torch.nn.init.normal_(head.conv.weight)
    return checkpoints.Checkpoint(denoiser, head, (1, 4, 4), 17, "digits")


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(original, path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_round_trip(original, saved):
    loaded = checkpoints.load(saved)
    x_t = torch.randn(2, 1, 4, 4)
    before, after = (c.denoiser.predict(x_t, 7) for c in (original, loaded))
    assert torch.equal(before.epsilon, after.epsilon)
    assert torch.equal(original.head(before.features), loaded.head(after.features))
    assert torch.equal(
        original.denoiser.schedule.log_alpha_bar, loaded.denoiser.schedule.log_alpha_bar
    )
    assert (loaded.image_shape, loaded.levels, loaded.data) == ((1, 4, 4), 17, "digits")
    assert not loaded.denoiser.unet.training
    assert not any(p.requires_grad for p in loaded.denoiser.unet.parameters())


def test_nothing_is_pickled(saved):
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {
        ".json",
        ".safetensors",
    }


def test_without_a_head(original, tmp_path):
    checkpoints.save(
        checkpoints.Checkpoint(original.denoiser, None, (1, 4, 4), 17, "digits"), tmp_path
    )
    assert checkpoints.load(tmp_path).head is None


def damage(name):
    """Return a function that spoils a checkpoint in the way called ``name``."""

    def edit(file, **changes):
        entries = json.loads(file.read_text())
        for key, value in changes.items():
            if value is None:
                del entries[key]
            else:
                entries[key] = value
        file.write_text(json.dumps(entries))

    def truncate(file):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])

    def other_unet(path):
        from diffusers import UNet2DModel

        UNet2DModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            norm_num_groups=8,
        ).save_pretrained(path / "other")
        weights = "diffusion_pytorch_model.safetensors"
        shutil.copy(path / "other" / weights, path / "denoiser" / weights)

    def other_head(path):
        from safetensors.torch import save_file

        save_file(ocm.CovarianceHead(64, 1, 8).state_dict(), path / "head.safetensors")

    def nan_weights(path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "head.safetensors")
        tensors["conv.bias"].fill_(float("nan"))
        save_file(tensors, path / "head.safetensors")

    weights = "diffusion_pytorch_model.safetensors"
    return {
        "no directory": lambda path: shutil.rmtree(path),
        "no description": lambda path: (path / "ocm.json").unlink(),
        "truncated description": lambda path: truncate(path / "ocm.json"),
        "another format": lambda path: edit(path / "ocm.json", format="else"),
        "another version": lambda path: edit(path / "ocm.json", version=99),
        "no schedule": lambda path: edit(path / "ocm.json", schedule=None),
        "unknown schedule": lambda path: edit(
            path / "ocm.json", schedule={"name": "x", "num_timesteps": 10}
        ),
        "negative timesteps": lambda path: edit(
            path / "ocm.json", schedule={"name": "cosine", "num_timesteps": -5}
        ),
        "text for levels": lambda path: edit(path / "ocm.json", levels="x"),
        "images of another shape": lambda path: edit(path / "ocm.json", image_shape=[3, 4, 4]),
        "another feature layer": lambda path: edit(path / "ocm.json", feature_layer="nowhere"),
        "a list for a configuration": lambda path: (path / "denoiser" / "config.json").write_text(
            "[1]"
        ),
        "weights that are NaN": nan_weights,
        "no denoiser": lambda path: shutil.rmtree(path / "denoiser"),
        "no weights": lambda path: (path / "denoiser" / weights).unlink(),
        "truncated weights": lambda path: truncate(path / "denoiser" / weights),
        "another class": lambda path: edit(
            path / "denoiser" / "config.json", _class_name="AutoencoderKL"
        ),
        "another model's weights": other_unet,
        "no head": lambda path: (path / "head.safetensors").unlink(),
        "truncated head": lambda path: truncate(path / "head.safetensors"),
        "another head": other_head,
        "a head for other features": lambda path: (
            other_head(path),
            edit(
                path / "ocm.json",
                head={"in_channels": 64, "out_channels": 1, "num_groups": 8},
            ),
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no directory", "no checkpoint at .*copy: .*ocm.json is missing"),
        ("no description", "no checkpoint at .*copy: .*ocm.json is missing"),
        ("truncated description", "ocm.json cannot be read as JSON"),
        ("another format", 'ocm.json is no checkpoint of ocm: "format" must be'),
        ("another version", "ocm.json has version 99, this ocm reads 1"),
        ("no schedule", "ocm.json lacks or misstates an entry: KeyError"),
        ("unknown schedule", "ocm.json lacks or misstates an entry: KeyError"),
        ("negative timesteps", "ocm.json .* num_timesteps must be at least 1, got -5"),
        ("text for levels", "ocm.json .* levels must be an int, got 'x'"),
        ("images of another shape", "ocm.json .* image_shape has 3 channels, .* 1"),
        ("another feature layer", "feature_layer must name a submodule of unet, got 'nowhere'"),
        ("a list for a configuration", "config.json is no configuration of a model"),
        ("weights that are NaN", "head.safetensors holds NaN or infinite weights"),
        ("no denoiser", "denoiser/config.json cannot be read"),
        ("no weights", "diffusion_pytorch_model.safetensors cannot be read"),
        ("truncated weights", "diffusion_pytorch_model.safetensors cannot be read"),
        ("another class", "denoiser must hold a UNet2DModel, got 'AutoencoderKL'"),
        ("another model's weights", "diffusion_pytorch_model.safetensors is of another model"),
        ("no head", "head.safetensors cannot be read"),
        ("truncated head", "head.safetensors cannot be read"),
        ("another head", "head.safetensors is of another model"),
        (
            "a head for other features",
            "ocm.json is of another model: head.in_channels has 64 .* 32",
        ),
    ],
)
def test_a_wrong_checkpoint_raises_value_error(copy, name, message):
    damage(name)(copy)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(copy)
