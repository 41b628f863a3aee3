"""Backbones as users have them: half precision, offloaded, compiled, distributed, with adapters."""

import copy
import functools

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import UNet2DModel
from torch import nn

import ocm
from ocm.diffusion.backbones.families import UNET
from ocm.diffusion.backbones.wrappers import device_of, has_adapters, unwrapped
from ocm.diffusion.noise import condition_of

SHAPE = (2, 2, 4, 4)


def make_unet():
    torch.manual_seed(0)
    unet = UNet2DModel(
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
    return unet.eval()


def denoiser_of(backbone, **options):
    return ocm.Denoiser(backbone, ocm.cosine(), **options).freeze()


def covariances_of(denoiser):
    head = ocm.make_head(denoiser)
    nn.init.normal_(head.head.conv.weight, std=0.1)
    return [
        ocm.OptimalCovarianceMatching(denoiser, head, ocm.Parameterisation(0.5, positive=True)),
        ocm.Hutchinson(denoiser, num_probes=4),
        ocm.Exact(denoiser),
        ocm.Lanczos(denoiser),
        ocm.Beta(denoiser),
    ]


def x_t():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_backbones_do_all_that_others_do(dtype):
    plain, half = denoiser_of(make_unet()), denoiser_of(make_unet().to(dtype))
    x0 = ocm.quantise(x_t().tanh())
    expected = ocm.sample(plain, ocm.Beta(plain), SHAPE, 4)
    images = ocm.sample(half, ocm.Beta(half), SHAPE, 4)
    assert images.dtype == torch.float32
    # bfloat16 has 8 bits; the samples lie in [-1, 1].
    torch.testing.assert_close(images, expected, atol=0.05, rtol=0)
    for covariance in covariances_of(half):
        own = half.predict(x_t(), 400)
        assert own.x0_hat.dtype == torch.float32
        assert covariance.at(own).diagonal().dtype == torch.float32
        assert ocm.sample(half, covariance, SHAPE, 2).isfinite().all()
        if not isinstance(covariance, ocm.Lanczos):
            assert ocm.bits_per_dim(half, covariance, x0, 2).total.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_of_half_precision_from_a_backbone_of_float32(dtype):
    denoiser = denoiser_of(make_unet())
    expected = ocm.sample(denoiser, ocm.Beta(denoiser), SHAPE, 4)
    for covariance in (ocm.Beta(denoiser), *covariances_of(denoiser)):
        images = ocm.sample(denoiser, covariance, SHAPE, 4, dtype=dtype)
        assert images.dtype == dtype
        if isinstance(covariance, ocm.Beta):
            torch.testing.assert_close(images.float(), expected, atol=0.05, rtol=0)


def test_a_head_on_a_half_precision_backbone_is_trained_in_float32():
    settings = ocm.TrainingSettings(num_steps=3, batch_size=2, seed=0)
    images = torch.rand(4, *SHAPE[1:], generator=torch.Generator().manual_seed(2))
    losses = []
    for unet in (make_unet(), make_unet().half()):
        denoiser = denoiser_of(unet)
        covariance = ocm.OptimalCovarianceMatching(
            denoiser, ocm.make_head(denoiser), ocm.Parameterisation(0.5, positive=True)
        )
        losses.append(ocm.train_head(covariance, images, settings, progress=False))
        assert {p.dtype for p in covariance.head.parameters()} == {torch.float32}
    # float16 has 11 bits, and a product with J goes through a dozen layers.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
def test_what_a_half_precision_network_is_told_of_the_time_keeps_its_digits(x_type):
    """999.5 is 1000 in bfloat16."""
    told = []

    def call(backbone, x, time, labels):
        told.append(time)
        return backbone(x)

    network = nn.Conv2d(2, 2, 1).bfloat16()
    architecture = ocm.Architecture("Conv2d", None, call)
    denoiser = ocm.Denoiser(network, ocm.flow(), "flow_prediction", architecture)
    denoiser.predict(x_t().to(x_type), 999.5).x0_hat  # noqa: B018
    assert told[0].tolist() == [999.5, 999.5]


# Offloaded by accelerate


def offloaded():
    unet = make_unet()
    accelerate.cpu_offload(unet, execution_device="cpu")
    assert next(unet.parameters()).device.type == "meta"
    return unet


def test_offloaded_backbones_are_evaluated_where_their_weights_go():
    plain, denoiser = denoiser_of(make_unet()), denoiser_of(offloaded())
    assert denoiser.device == torch.device("cpu")
    for expected, covariance in zip(covariances_of(plain), covariances_of(denoiser), strict=True):
        if isinstance(expected, ocm.OptimalCovarianceMatching):
            covariance.head.load_state_dict(expected.head.state_dict())
        torch.testing.assert_close(
            covariance.at(denoiser.predict(x_t(), 400)).diagonal(),
            expected.at(plain.predict(x_t(), 400)).diagonal(),
        )
        torch.testing.assert_close(
            ocm.sample(denoiser, covariance, SHAPE, 2), ocm.sample(plain, expected, SHAPE, 2)
        )


def test_a_head_is_trained_on_an_offloaded_backbone_and_resumed_by_its_weights(tmp_path):
    settings = ocm.TrainingSettings(num_steps=2, batch_size=2, seed=0)
    images = torch.rand(4, *SHAPE[1:])

    def train(unet):
        covariance = covariances_of(denoiser_of(unet))[0]
        return ocm.train_head(covariance, images, settings, directory=tmp_path, progress=False)

    losses = train(make_unet())
    # The same weights, so the training is taken as finished.
    assert train(offloaded()) == losses
    other = make_unet()
    nn.init.ones_(other.conv_in.bias)
    accelerate.cpu_offload(other, execution_device="cpu")
    with pytest.raises(ValueError, match="denoiser"):
        train(other)


def test_the_device_is_that_of_the_hook():
    """Where a whole model is moved at each call, as by enable_model_cpu_offload."""
    unet = make_unet()
    add_hook_to_module(unet, CpuOffload(execution_device="meta"))
    assert ocm.Denoiser(unet, ocm.cosine()).device == torch.device("meta")
    # diffusers' own hooks tell the model, which tells where its groups are taken.
    grouped = nn.Conv2d(2, 2, 1)
    grouped._diffusers_hook, grouped.device = object(), torch.device("meta")
    assert device_of(grouped) == torch.device("meta")


# Wrapped


class AdapterModel(nn.Module):
    """What peft's PeftModel is to ocm: it calls the model inside, and gives it out."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)

    def get_base_model(self):
        return self.inside


class Adapted(nn.Module):
    """What a LoRA layer of peft is to ocm: a layer around another, of which it adds to."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.Conv2d(layer.in_channels, 1, 1, bias=False)
        self.lora_B = nn.Conv2d(1, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapted():
    unet = make_unet().requires_grad_(False)
    unet.conv_in = Adapted(unet.conv_in)
    return unet


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_in_place(unet, called):
    unet.compile(backend="aot_eager")
    if called:
        unet(x_t(), 3)
    return unet


def compiled_blocks(unet):
    unet.mid_block.compile(backend="aot_eager")
    return unet


WRAPPERS = {
    "peft": AdapterModel,
    "compile": functools.partial(torch.compile, backend="aot_eager"),
    "compile in place": functools.partial(compiled_in_place, called=False),
    "called after compile in place": functools.partial(compiled_in_place, called=True),
    "compiled blocks": compiled_blocks,
    "distributed": nn.parallel.DistributedDataParallel,
    "peft, compiled": lambda unet: torch.compile(AdapterModel(unet), backend="aot_eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("one_process", "compiled_anew")
def test_wrapped_backbones_are_known_and_called_as_they_are(name):
    plain, wrapped = denoiser_of(make_unet()), WRAPPERS[name](make_unet())
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    denoiser = denoiser_of(wrapped)
    assert denoiser.architecture is UNET
    assert isinstance(unwrapped(wrapped), UNet2DModel)
    for expected, covariance in zip(covariances_of(plain), covariances_of(denoiser), strict=True):
        if isinstance(expected, ocm.OptimalCovarianceMatching):
            covariance.head.load_state_dict(expected.head.state_dict())
        for mode in range(2):  # a second call goes through what was compiled in the first
            torch.testing.assert_close(
                covariance.at(denoiser.predict(x_t() + mode, 400)).diagonal(),
                expected.at(plain.predict(x_t() + mode, 400)).diagonal(),
                atol=1e-4,
                rtol=1e-4,
            )
    if "compile" not in name:
        assert calls
    torch.testing.assert_close(
        denoiser.jacobian(x_t(), 400, mode="jvp").products(x_t()[None]),
        plain.jacobian(x_t(), 400, mode="jvp").products(x_t()[None]),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.usefixtures("compiled_anew")
def test_features_of_a_backbone_that_was_compiled_before():
    """PyTorch does not look at hooks again: what is not heard is an error, not a guess."""
    wrapped = torch.compile(make_unet().requires_grad_(False), backend="eager")
    with torch.no_grad():
        wrapped(x_t(), torch.tensor([399, 399]))
        prediction = denoiser_of(wrapped).predict(x_t(), 400)
        assert prediction.output.shape == SHAPE
        with pytest.raises(ValueError, match=r"call torch.compiler.reset\(\) once"):
            prediction.features  # noqa: B018
        torch.compiler.reset()
        prediction = denoiser_of(wrapped).predict(x_t(), 400)
        expected = denoiser_of(make_unet()).predict(x_t(), 400).features
        torch.testing.assert_close(prediction.features, expected, atol=1e-4, rtol=1e-4)


def test_copies_of_a_backbone_hear_their_own_features():
    unet = make_unet()
    denoiser = denoiser_of(unet)
    copied = denoiser_of(copy.deepcopy(unet))
    nn.init.ones_(copied.backbone.conv_in.bias)
    assert not torch.equal(
        copied.predict(x_t(), 400).features, denoiser.predict(x_t(), 400).features
    )


# Adapters


def test_training_a_denoiser_with_adapters_leaves_the_weights_below_as_they_are():
    unet = adapted()
    assert has_adapters(unet)
    before = copy.deepcopy(unet.state_dict())
    settings = ocm.TrainingSettings(num_steps=3, batch_size=2, seed=0)
    images = torch.rand(4, *SHAPE[1:])
    denoiser = ocm.Denoiser(unet, ocm.cosine())
    ocm.train_denoiser(denoiser, images, settings, progress=False)
    changed = {name for name, value in unet.state_dict().items() if (value != before[name]).any()}
    assert changed == {"conv_in.lora_A.weight", "conv_in.lora_B.weight"}
    # It is frozen now, and says nothing of what was to be trained.
    with pytest.raises(ValueError, match=r"adapters .* requires_grad_"):
        ocm.train_denoiser(denoiser, images, settings, progress=False)


def test_a_denoiser_that_is_frozen_throughout_is_trained_throughout():
    denoiser = denoiser_of(make_unet())
    before = copy.deepcopy(denoiser.backbone.state_dict())
    settings = ocm.TrainingSettings(num_steps=3, batch_size=2, seed=0)
    ocm.train_denoiser(denoiser, torch.rand(4, *SHAPE[1:]), settings, progress=False)
    after = denoiser.backbone.state_dict()
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]


# Modules of one's own, and functions


def test_a_function_is_a_backbone_without_features():
    """The noise of standard normal data: x0_hat = sqrt(alpha_bar) x_t, and Cov = beta_bar I."""
    schedule = ocm.cosine()

    def noise(x, time):
        return x * schedule.beta_bar[time + 1].sqrt().to(x)[:, None, None, None]

    denoiser = ocm.Denoiser(noise, schedule).freeze()
    assert denoiser.device == torch.device("cpu")
    alpha_bar, beta_bar = schedule.alpha_bar[400].item(), schedule.beta_bar[400].item()
    prediction = denoiser.predict(x_t(), 400)
    torch.testing.assert_close(prediction.x0_hat, alpha_bar**0.5 * x_t())
    torch.testing.assert_close(
        ocm.Exact(denoiser).at(prediction).diagonal(), torch.full(SHAPE, beta_bar)
    )
    assert ocm.sample(denoiser, ocm.Hutchinson(denoiser, 4), SHAPE, 3).isfinite().all()
    with pytest.raises(ValueError, match="feature_layer for a head to read, got None"):
        prediction.features  # noqa: B018
    with pytest.raises(ValueError, match="give a head that fits its features"):
        ocm.make_head(denoiser)
    with pytest.raises(TypeError, match="backbone must be a module or a function, got int"):
        ocm.Denoiser(3, schedule)


def test_a_module_without_parameters_is_where_its_buffers_are():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1, device="meta"))

    architecture = ocm.Architecture("Buffered", None, lambda net, x, time, labels: net.scale * x)
    denoiser = ocm.Denoiser(Buffered(), ocm.cosine(), architecture=architecture)
    assert denoiser.device == torch.device("meta")


# Conditions


class Conditioned(nn.Module):
    """Of a text (B, 2, 4) and a nested scale (B,), with an output that tells samples apart."""

    def forward(self, x, time, text, extra, flag):
        assert flag == "as it is"
        weight = text.sum(dim=(1, 2)) * extra["scale"]
        return x.sin() * weight[:, None, None, None].to(x)


def conditioned():
    architecture = ocm.Architecture(
        "Conditioned", None, lambda net, x, time, labels, **given: net(x, time, **given)
    )
    return denoiser_of(Conditioned(), architecture=architecture)


def text_of(seed, batch=2):
    return torch.rand(batch, 2, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
def test_tensors_condition_each_sample_in_both_branches_and_for_every_probe(batching):
    denoiser, w = conditioned(), 3.0
    text, nothing, scale = text_of(1), text_of(2, 1), torch.tensor([1.0, -2.0]).double()
    condition = denoiser.condition(
        tensors={"text": text, "extra": {"scale": scale}, "flag": "as it is"},
        null_tensors={"text": nothing},
        guidance_scale=w,
    )
    weight = ((1 - w) * nothing.sum() + w * text.sum(dim=(1, 2))) * scale.float()
    weight = weight[:, None, None, None]
    prediction = denoiser.predict(x_t(), 400, condition=condition)
    torch.testing.assert_close(prediction.output, weight * x_t().sin())
    v = torch.randn(3, *SHAPE)
    J = denoiser.jacobian(x_t(), 400, condition, batching=batching)
    torch.testing.assert_close(J.products(v), v * weight * x_t().cos())


def test_conditions_by_name_are_those_of_a_nested_dictionary():
    """A null branch changes what is given for it, and leaves the other entries as they are."""
    denoiser, w = conditioned(), 3.0
    text, scale = text_of(1), torch.tensor([1.0, -2.0])
    rows = {"text": text, "extra.scale": scale, "extra.unused": scale}
    rows["labels"] = torch.tensor([1, 1])
    nulls = {"extra.scale": torch.tensor([5.0]), "labels": torch.tensor([9])}
    condition = condition_of(denoiser, rows, nulls, w)
    assert condition.null_label == 9
    branches = zip(condition.arguments(x_t()), (torch.full((2,), 5.0), scale), strict=True)
    for is_given, ((labels, given), expected) in enumerate(branches):
        assert labels.tolist() == ([1, 1] if is_given else [9, 9])
        assert torch.equal(given["text"], text)
        assert torch.equal(given["extra"]["scale"], expected)
        assert torch.equal(given["extra"]["unused"], scale)
    assert condition_of(denoiser, {}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "labels or tensors must be given"),
        ({"tensors": {"text": 1}, "guidance_scale": 2.0}, "null_tensors must be given"),
        ({"tensors": {"text": 1}, "null_tensors": {"txt": 1}}, r"named as tensors are, got \['txt"),
    ],
)
def test_conditions_that_say_too_little_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conditioned().condition(**options)


def test_tensors_that_do_not_fit_the_batch_are_refused():
    denoiser = conditioned()
    condition = denoiser.condition(tensors={"text": text_of(1, 3)})
    with pytest.raises(ValueError, match="got 3 for 2 samples"):
        denoiser.predict(x_t(), 400, condition=condition)
