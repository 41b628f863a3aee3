"""ocm.attach: one pass, the right numbers, and the way to disk and back."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from small_backbone import ARCHITECTURE, small_backbone, small_head

import ocm
from ocm.integrations.attached import CovarianceModel

BACKBONES = ("unet", "dit", "dit with learned sigma")


def make_backbone(name):
    torch.manual_seed(0)
    if name == "unet":
        model = UNet2DModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            add_attention=False,
        )
    else:
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            out_channels=4 if "sigma" in name else 2,
            num_layers=1,
            sample_size=4,
            patch_size=2,
            norm_num_groups=4,
            num_embeds_ada_norm=5,
        )
    with torch.no_grad():  # some layers start at zero
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def attached(name, **options):
    model = ocm.attach(make_backbone(name), **options)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
    return model


def labels_for(name):
    return None if name == "unet" else torch.tensor([1, 4])


def inputs():
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["simple", "residual"])
def test_the_output_is_the_prediction_and_the_variance_in_its_unit(name, kind):
    """Against ocm.Denoiser and the covariance, by one pass through the backbone."""
    parameterisation = ocm.Parameterisation(data_std=0.7, positive=True)
    model = attached(name, kind=kind, parameterisation=parameterisation)
    x, labels, t = inputs(), labels_for(name), 300
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        output = model(x, t - 1, class_labels=labels).sample
    assert passes == [1]

    scheduler = DDPMScheduler()
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    condition = None if labels is None else denoiser.condition(labels)
    prediction = denoiser.predict(x, t, condition=condition)
    torch.testing.assert_close(output[:, :2], prediction.output)
    alpha_bar = scheduler.alphas_cumprod[t - 1].double()
    unit = (1 - alpha_bar) / (alpha_bar + (1 - alpha_bar) / 0.7**2)
    expected = covariance.at(prediction).diagonal()
    torch.testing.assert_close(output[:, 2:] * unit.float(), expected, atol=1e-5, rtol=1e-4)
    for timestep in (torch.tensor(t - 1), torch.tensor([t - 1]), torch.full((2,), t - 1)):
        again = model(x, timestep, labels, return_dict=False)[0]
        torch.testing.assert_close(again, output)


def config_of(model):
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public))


@pytest.mark.parametrize("name", BACKBONES)
def test_saved_and_loaded_it_is_the_same_model(name, tmp_path, caplog):
    model = attached(name, kind="residual", parameterisation=ocm.Parameterisation(0.7, True))
    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.parameterisation == ocm.Parameterisation(0.7, True)
    assert type(loaded.backbone) is type(model.backbone)
    assert config_of(loaded) == config_of(model)
    x, labels = inputs(), labels_for(name)
    assert torch.equal(loaded(x, 9, labels).sample, model(x, 9, labels).sample)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    half = CovarianceModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.backbone.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    for like in (x, x.bfloat16()):
        stated = half(like, 9, labels).sample
        assert stated.dtype == like.dtype
        torch.testing.assert_close(stated.float(), model(x, 9, labels).sample, atol=0.1, rtol=0.1)
    assert not caplog.records


def test_the_papers_unit_survives_json(tmp_path):
    attached("unet", parameterisation=ocm.PAPER).save_pretrained(tmp_path)
    loaded, info = CovarianceModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.parameterisation == ocm.PAPER
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("head.head.conv.weight"), "Missing key.*head.conv.weight"),
        (
            lambda weights: weights.update({"head.other": torch.zeros(1)}),
            "Unexpected key.*head.other",
        ),
    ],
)
def test_files_that_lack_weights_are_refused(tmp_path, change, message):
    attached("unet").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        CovarianceModel.from_pretrained(tmp_path)


def test_models_that_were_saved_before_keep_their_units(tmp_path):
    """Without entries that are new, as the version before wrote them."""
    attached("unet", parameterisation=ocm.PAPER).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["has_own_architecture"]
    file.write_text(json.dumps(config))
    assert CovarianceModel.from_pretrained(tmp_path).parameterisation == ocm.PAPER


def test_its_variance_is_bounded_unless_it_is_told_otherwise():
    model = ocm.attach(make_backbone("unet"))
    assert model.parameterisation == ocm.Parameterisation(data_std=0.5, positive=True)
    covariance = model.covariance(DDPMScheduler())
    variance = covariance.at(covariance.denoiser.predict(inputs(), 1000)).diagonal()
    torch.testing.assert_close(variance, torch.full_like(variance, 0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_gets_a_head_in_float32(dtype):
    model = ocm.attach(make_backbone("unet").to(dtype))
    assert {parameter.dtype for parameter in model.head.parameters()} == {torch.float32}
    assert model.dtype == dtype
    assert model(inputs(), 999.5).sample.dtype == torch.float32
    covariance = model.covariance(DDPMScheduler())
    assert ocm.sample(covariance.denoiser, covariance, (2, 2, 4, 4), 3).isfinite().all()


def test_compiled_it_is_one_graph():
    torch.compiler.reset()
    model = attached("unet")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x in (inputs(), inputs() + 1):
        torch.testing.assert_close(compiled(x, 9).sample, model(x, 9).sample)


def test_a_compiled_backbone_is_saved_as_what_it_was(tmp_path):
    torch.compiler.reset()
    backbone = make_backbone("unet")
    expected = ocm.attach(backbone)(inputs(), 9).sample
    model = ocm.attach(torch.compile(backbone, backend="eager"))
    called = model.backbone
    assert model.config.in_channels == 2
    torch.testing.assert_close(model(inputs(), 9).sample, expected)
    model.save_pretrained(tmp_path)
    assert model.backbone is called
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs(), 9).sample, expected)


def test_adapters_are_merged_before_a_model_is_saved(tmp_path):
    backbone = make_backbone("unet")
    layer = backbone.conv_in
    backbone.conv_in = torch.nn.Sequential()  # as peft has it: a layer around another
    backbone.conv_in.add_module("base_layer", layer)
    model = ocm.attach(backbone)
    model(inputs(), 9)
    with pytest.raises(ValueError, match=r"fuse_lora\(\) and backbone.unload_lora\(\)"):
        model.save_pretrained(tmp_path)
    backbone.conv_in = layer
    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs(), 9).sample, model(inputs(), 9).sample)


def _negated(backbone, x, time, labels):
    return -backbone(x, time).sample


def test_a_model_that_is_called_in_its_own_way(tmp_path):
    """Some backbones of diffusers put out the negative of what others do."""
    architecture = ocm.Architecture("Negated", "conv_norm_out", _negated)
    backbone = make_backbone("unet")
    head = ocm.make_head(ocm.Denoiser(backbone, ocm.linear()))
    model = ocm.attach(backbone, head, architecture=architecture)
    output = model(inputs(), 9).sample
    torch.testing.assert_close(output[:, :2], -backbone(inputs(), 9).sample)
    assert model.denoiser(ocm.linear()).architecture is architecture
    with pytest.raises(ValueError, match="give a head that fits its features"):
        ocm.attach(backbone, architecture=architecture)
    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path, architecture=architecture)
    assert torch.equal(loaded(inputs(), 9).sample, output)
    with pytest.raises(ValueError, match="architecture must be given to from_pretrained"):
        CovarianceModel.from_pretrained(tmp_path)(inputs(), 9)


def test_a_model_of_ones_own_is_attached_and_not_saved(tmp_path):
    model = ocm.attach(small_backbone(), small_head(), architecture=ARCHITECTURE)
    assert model(inputs(), 9).sample.shape == (2, 4, 4, 4)
    covariance = model.covariance(DDPMScheduler())
    assert ocm.sample(covariance.denoiser, covariance, (2, 2, 4, 4), 2).isfinite().all()
    with pytest.raises(ValueError, match="of a class of diffusers to be loaded again, got Small"):
        model.save_pretrained(tmp_path)


def test_what_pipelines_read():
    model = attached("unet")
    assert model.config.in_channels == 2
    assert model.config.sample_size == 4
    assert model.config.out_channels == 2
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert attached("dit").config.num_embeds_ada_norm == 5


def test_it_takes_the_model_itself_and_heads_of_three_kinds(tmp_path):
    backbone = make_backbone("unet")
    untrained = ocm.attach(backbone)
    assert untrained.backbone is backbone
    ratio = untrained(inputs(), 9).sample[:, 2:]
    assert torch.equal(ratio, torch.ones_like(ratio))

    head = ocm.make_head(ocm.Denoiser(backbone, ocm.linear()), "residual", seed=5)
    torch.nn.init.normal_(head.head.conv.weight)
    file = tmp_path / "head.safetensors"
    save_file(head.state_dict(), file)
    given = ocm.attach(backbone, head)
    assert given.head is head
    read = ocm.attach(backbone, file, kind="residual")
    assert torch.equal(read(inputs(), 9).sample, given(inputs(), 9).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": torch.nn.Linear(1, 1)}, "head_class one of CovarianceHead.*'Linear'"),
        ({"head": "nowhere.safetensors"}, "nowhere.safetensors cannot be read"),
        ({"kind": "huge"}, "kind must be one of simple, residual, got 'huge'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ocm.attach(make_backbone("unet"), **options)


def test_files_of_other_heads_and_other_models_are_refused(tmp_path):
    file = tmp_path / "head.safetensors"
    save_file(attached("dit").head.state_dict(), file)
    with pytest.raises(ValueError, match=r"head.safetensors is of another model"):
        ocm.attach(make_backbone("unet"), file)
    with pytest.raises(ValueError, match=r"backbone must be one of UNet2DModel.*got Linear"):
        ocm.attach(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="timestep must be one, or one for each of 2"):
        attached("unet")(inputs(), torch.zeros(3))


def test_gradients_of_the_variance_stay_in_the_head():
    model = attached("unet")
    model(inputs(), 9).sample[:, 2:].sum().backward()
    assert not any(parameter.grad.any() for parameter in model.backbone.parameters())
    assert all(parameter.grad.any() for parameter in model.head.parameters())


def test_its_head_can_be_trained_and_its_samples_drawn():
    """The covariance shares the head, so that training changes what the model puts out."""
    model = ocm.attach(make_backbone("unet"), parameterisation=ocm.Parameterisation(0.5))
    covariance = model.covariance(DDPMScheduler(prediction_type="sample"), num_probes=2)
    assert covariance.num_probes == 2
    assert covariance.denoiser.prediction_type == "sample"
    assert covariance.parameterisation == model.parameterisation
    before = model(inputs(), 9).sample
    settings = ocm.TrainingSettings(num_steps=3, batch_size=4, seed=0)
    ocm.train_head(covariance, torch.rand(8, 2, 4, 4) * 2 - 1, settings, progress=False)
    after = model(inputs(), 9).sample
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2:], before[:, 2:])
    images = ocm.sample(covariance.denoiser, covariance, (2, 2, 4, 4), [500, 1000])
    assert bool(torch.isfinite(images).all())
    plain = model.denoiser(ocm.linear())
    assert (plain.prediction_type, plain.schedule.num_timesteps) == ("epsilon", 1000)


@pytest.mark.parametrize("kind", ["simple", "residual"])
def test_heads_take_features_that_lie_channels_last(kind):
    """PyTorch's GroupNorm ends the process in its backward pass of such features."""
    head = attached("unet", kind=kind).head
    features = torch.randn(2, 8, 4, 4)
    expected = torch.autograd.grad(head(features).square().sum(), list(head.parameters()))
    last = features.contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(head(last).square().sum(), list(head.parameters()))
    torch.testing.assert_close(gradients, expected)


def test_what_ocm_has_and_has_not():
    """test_packaging.py imports ocm without diffusers."""
    assert all(hasattr(ocm, name) for name in ocm.__all__)
    with pytest.raises(AttributeError, match="module 'ocm' has no attribute 'nothing'"):
        ocm.nothing  # noqa: B018
