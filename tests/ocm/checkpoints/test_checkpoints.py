"""Round trips, and an error that names the file for every way a checkpoint can be wrong."""

import json
import shutil

import pytest
import torch

import ocm
from ocm import checkpoints
from ocm.checkpoints.catalogue import build_covariance
from ocm.covariances.names import LEARNED
from ocm.diffusion.tables import Table
from ocm.training.small_unet import small_unet

NO_UNET = "denoiser holds no UNet2DModel that fits"


@pytest.fixture(scope="module")
def original():
    denoiser = ocm.Denoiser(small_unet((1, 4, 4)), ocm.cosine()).freeze()
    learned = {}
    for seed, (name, covariance) in enumerate(LEARNED.items()):
        head = ocm.make_head(denoiser, "residual" if name == "npr" else "simple", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        units = ocm.Parameterisation(0.5, positive=True) if name == "sn" else ocm.PAPER
        learned[name] = covariance(denoiser, head, units)
    table = Table({1: [0.1], 500: [0.7], 1000: [0.9]})
    weights = Table({1: [1.0, 0.0], 1000: [0.5, 0.1]})
    return checkpoints.Checkpoint(
        denoiser,
        (1, 4, 4),
        17,
        "digits",
        learned,
        {"analytic": ocm.Analytic(denoiser, table)},
        {"ocm": weights, "iddpm": Table({(3, 7): [0.5, 0.1]})},
        num_calibration=150,
        data_options={"limit": 300, "label_column": "label"},
    )


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
    assert torch.equal(before.output, after.output)
    for name in [*LEARNED, "analytic", "ocm_calibrated", "iddpm_calibrated"]:
        one, other = (
            build_covariance(name, checkpoint).at(prediction.towards(3)).diagonal()
            for checkpoint, prediction in ((original, before), (loaded, after))
        )
        assert torch.equal(one, other)
    assert loaded.learned["sn"].parameterisation == ocm.Parameterisation(0.5, positive=True)
    assert (loaded.x0_range, loaded.num_calibration) == ((-1.0, 1.0), 150)
    assert loaded.data_options == {"limit": 300, "label_column": "label"}
    assert torch.equal(
        original.denoiser.schedule.log_alpha_bar, loaded.denoiser.schedule.log_alpha_bar
    )
    assert (loaded.image_shape, loaded.levels, loaded.data) == ((1, 4, 4), 17, "digits")
    assert not loaded.denoiser.backbone.training
    assert not any(p.requires_grad for p in loaded.denoiser.backbone.parameters())


def test_nothing_is_pickled(saved):
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {
        ".json",
        ".safetensors",
    }


def test_without_a_head(original, tmp_path):
    checkpoints.save(
        checkpoints.Checkpoint(original.denoiser, (1, 4, 4), 17, "digits", x0_range=None), tmp_path
    )
    loaded = checkpoints.load(tmp_path)
    assert not loaded.learned
    assert loaded.x0_range is None


def test_schedules_of_other_betas_and_prediction_types(original, tmp_path):
    betas = torch.linspace(0.001, 0.05, 60, dtype=torch.float64)
    denoiser = ocm.Denoiser(original.denoiser.backbone, ocm.from_betas(betas), "v_prediction")
    checkpoints.save(checkpoints.Checkpoint(denoiser, (1, 4, 4), 17, "digits"), tmp_path)
    loaded = checkpoints.load(tmp_path).denoiser
    assert loaded.prediction_type == "v_prediction"
    torch.testing.assert_close(
        loaded.schedule.log_alpha_bar, denoiser.schedule.log_alpha_bar, rtol=1e-12, atol=0
    )


def test_the_denoiser_of_a_pipeline_of_diffusers(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(small_unet((1, 4, 4)), scheduler).save_pretrained(tmp_path)
    denoiser = checkpoints.load_denoiser(tmp_path)
    assert denoiser.prediction_type == "v_prediction"
    torch.testing.assert_close(
        denoiser.schedule.alpha_bar[1:], scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-8
    )
    x_t = torch.randn(2, 1, 4, 4)
    expected = small_unet((1, 4, 4)).eval()(x_t, 6).sample
    torch.testing.assert_close(denoiser.output(x_t, 7), expected)


@pytest.fixture(scope="module")
def sharded(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    checkpoints.save(original, path, max_shard_size="1MB")
    return path


def test_weights_over_several_files(original, saved, sharded, tmp_path):
    weights = sorted((sharded / "denoiser").glob("*.safetensors"))
    assert len(weights) > 1
    assert all(file.stat().st_size < 1.1e6 for file in weights)
    expected = original.denoiser.backbone.state_dict()

    def check(path):
        found = checkpoints.load(path).denoiser.backbone.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)

    check(sharded)
    both_ways = shutil.copytree(sharded, tmp_path / "both")
    checkpoints.save(original, both_ways)
    assert sorted(f.name for f in (both_ways / "denoiser").iterdir()) == sorted(
        f.name for f in (saved / "denoiser").iterdir()
    )
    check(both_ways)
    checkpoints.save(original, both_ways, max_shard_size="1MB")
    check(both_ways)


def test_weights_in_half_precision_are_read_into_float32(original, saved, tmp_path):
    checkpoints.save(original, tmp_path, dtype=torch.float16)
    name = "denoiser/diffusion_pytorch_model.safetensors"
    sizes = [(path / name).stat().st_size for path in (tmp_path, saved)]
    assert sizes[0] < 0.55 * sizes[1]
    weights = original.denoiser.backbone.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    found = checkpoints.load(tmp_path).denoiser.backbone.state_dict()
    for key, weight in found.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weights[key].half().float())


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            ".index.json",
            lambda file: file.write_text("{"),
            NO_UNET,
        ),
        (
            ".index.json",
            lambda file: file.write_text("{}"),
            NO_UNET,
        ),
        (
            ".index.json",
            lambda file: file.write_text('{"weight_map": {"a": "../ocm.json"}}'),
            NO_UNET,
        ),
        (
            "-00001-of",
            lambda file: file.unlink(),
            NO_UNET + ": .*-00001-of-0000",
        ),
        (
            "-00001-of",
            lambda file: file.write_bytes(b"12345678"),
            NO_UNET + ": .*-00001-of-0000",
        ),
        (
            ".index.json",
            lambda file: file.write_text(file.read_text().replace("-00001-of-", "-00002-of-")),
            NO_UNET + ": .*[Mm]issing key",
        ),
    ],
)
def test_damage_to_weights_over_several_files(sharded, tmp_path, name, damage, message):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (file,) = (file for file in (copy / "denoiser").iterdir() if name in file.name)
    damage(file)
    with pytest.raises(checkpoints.CheckpointError, match=f"(?s){message}"):
        checkpoints.load(copy)


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

        save_file(ocm.CovarianceHead(64, 1, 8).state_dict(), path / "heads" / "ocm.safetensors")

    def nan_weights(path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "heads" / "ocm.safetensors")
        tensors["conv.bias"].fill_(float("nan"))
        save_file(tensors, path / "heads" / "ocm.safetensors")

    weights = "diffusion_pytorch_model.safetensors"
    wide_head = {
        "head": "CovarianceHead",
        "config": {"in_channels": 64, "out_channels": 1, "num_groups": 8},
        "parameterisation": {"data_std": None, "positive": False},
    }
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
        "another prediction type": lambda path: edit(path / "ocm.json", prediction_type="x"),
        "an unknown head": lambda path: edit(path / "ocm.json", learned={"ocm": {"head": "x"}}),
        "a timestep that is text": lambda path: edit(
            path / "tables.json", analytic={"analytic": {"timesteps": ["x"], "values": [[1.0]]}}
        ),
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
        "no head": lambda path: (path / "heads" / "ocm.safetensors").unlink(),
        "truncated head": lambda path: truncate(path / "heads" / "ocm.safetensors"),
        "another head": other_head,
        "a head for other features": lambda path: (
            other_head(path),
            edit(path / "ocm.json", learned={"ocm": wide_head}),
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no directory", "no checkpoint at .*copy: .*ocm.json is missing"),
        ("no description", "no checkpoint at .*copy: .*ocm.json is missing"),
        ("truncated description", "ocm.json cannot be read as JSON"),
        ("another format", r"ocm.json must have .*, got \{'format': 'else'"),
        ("another version", r"ocm.json must have .*'version': 2\}, got .*'version': 99\}"),
        ("no schedule", "ocm.json .* entry: schedule must be an object, and is missing"),
        ("unknown schedule", "ocm.json .* entry: name must be one of linear, .* got 'x'"),
        ("negative timesteps", "ocm.json .* num_timesteps must be at least 1, got -5"),
        ("text for levels", r"ocm.json .* levels must be an int in \[2, 65536\], got 'x'"),
        ("images of another shape", "ocm.json .* image_shape has 3 channels, .* 1"),
        (
            "another prediction type",
            "ocm.json lacks or misstates .* prediction_type must be one of",
        ),
        ("an unknown head", "ocm.json .* entry: config must be an object, and is missing"),
        ("a timestep that is text", "tables.json lacks or misstates an entry"),
        ("a list for a configuration", "config.json must hold a JSON object, got list"),
        ("weights that are NaN", "heads/ocm.safetensors holds NaN or infinite values"),
        ("no denoiser", "denoiser/config.json cannot be read"),
        ("no weights", NO_UNET + ": .*single model file"),
        ("truncated weights", NO_UNET),
        ("another class", "denoiser must hold one of UNet2DModel, .* got 'AutoencoderKL'"),
        ("another model's weights", f"(?s){NO_UNET}: .*Unexpected key"),
        ("no head", "heads/ocm.safetensors cannot be read"),
        ("truncated head", "heads/ocm.safetensors cannot be read"),
        ("another head", "heads/ocm.safetensors is of another model"),
        (
            "a head for other features",
            "ocm.json .* learned.ocm must be of the denoiser .*: 32, .* got .*'in_channels': 64",
        ),
    ],
)
def test_a_wrong_checkpoint_raises_value_error(copy, name, message):
    damage(name)(copy)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(copy)


@pytest.mark.parametrize("schedule", [ocm.linear(1000, 0.00085, 0.012), ocm.cosine(50, 0.1)])
def test_a_schedule_of_other_arguments_stays_what_it_is(original, tmp_path, schedule):
    denoiser = ocm.Denoiser(original.denoiser.backbone, schedule)
    checkpoints.save(checkpoints.Checkpoint(denoiser, (1, 4, 4), 17, "digits"), tmp_path)
    loaded = checkpoints.load(tmp_path).denoiser.schedule
    torch.testing.assert_close(loaded.log_alpha_bar, schedule.log_alpha_bar, rtol=1e-12, atol=0)
