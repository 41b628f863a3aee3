"""What is read from a checkpoint is what was written, to the last option."""

import shutil
from functools import partial

import pytest
import torch

import ocm
from ocm import checkpoints
from ocm.checkpoints.catalogue import build_covariance
from ocm.covariances.names import LEARNED
from ocm.diffusion.tables import Table
from ocm.training.small_unet import small_unet

NETWORK = small_unet((1, 4, 4), width=8)
PATHS = {
    "linear": (ocm.linear(1000, 0.00085, 0.012), "epsilon"),
    "cosine": (ocm.cosine(50, 0.1), "sample"),
    "betas": (ocm.from_betas([0.001 + 0.0008 * t for t in range(60)]), "v_prediction"),
    "vp": (ocm.vp(beta_max=12.0), "epsilon"),
    "edm": (ocm.edm(sigma_max=50.0, rho=5.0, data_std=0.3), "edm"),
    "trigflow": (ocm.trigflow(data_std=0.3), "trigflow"),
    "flow": (ocm.flow(500), "flow_prediction"),
}


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
        learned[name] = covariance(denoiser, head.train(), units)
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
        x0_range=(-2.0, 3.0),
        num_calibration=150,
        data_options={"limit": 300, "label_column": "label"},
    )


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoints.save(original, path)
    return path


def written_and_read(path, denoiser, **options):
    checkpoints.save(checkpoints.Checkpoint(denoiser, (1, 4, 4), 17, "digits", **options), path)
    return checkpoints.load(path)


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
        if name in LEARNED:
            units = original.learned[name].parameterisation
            assert loaded.learned[name].parameterisation == units
    assert (loaded.x0_range, loaded.num_calibration) == ((-2.0, 3.0), 150)
    assert loaded.data_options == {"limit": 300, "label_column": "label"}
    assert torch.equal(
        original.denoiser.schedule.log_alpha_bar, loaded.denoiser.schedule.log_alpha_bar
    )
    assert (loaded.image_shape, loaded.levels, loaded.data) == ((1, 4, 4), 17, "digits")
    for module in (loaded.denoiser.backbone, *(c.head for c in loaded.learned.values())):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_nothing_is_pickled(saved):
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {
        ".json",
        ".safetensors",
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_path_with_its_options(path, tmp_path):
    schedule, kind = PATHS[path]
    denoiser = ocm.Denoiser(NETWORK, schedule, kind)
    found = written_and_read(tmp_path, denoiser, x0_range=None)
    assert not found.learned
    assert found.x0_range is None
    loaded = found.denoiser
    assert (loaded.schedule.name, loaded.prediction_type) == (path, kind)
    t = torch.linspace(1, schedule.num_timesteps, 50)
    t = t if schedule.is_continuous else t.round()
    # Other betas than usual are written as they are, and rounded once more.
    rounding = 0.0 if schedule.is_continuous else 1e-12
    same = partial(torch.testing.assert_close, rtol=rounding, atol=0)
    same(loaded.schedule.log_alpha_bar, schedule.log_alpha_bar)
    same(loaded.schedule.alpha(t), schedule.alpha(t))
    same(loaded.schedule.sigma(t), schedule.sigma(t))
    same(loaded.coefficients(t).q, denoiser.coefficients(t).q)


def test_the_covariance_of_the_data(tmp_path):
    """And none where there is none any more."""
    variances = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    for given in (variances, None):
        denoiser = ocm.Denoiser(NETWORK, ocm.flow(), "flow_prediction", data_covariance=given)
        loaded = written_and_read(tmp_path, denoiser).denoiser.data_covariance
        assert loaded is None if given is None else torch.equal(loaded, given)


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
