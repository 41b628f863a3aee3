"""A table of every family and every wrapper: each cell says what the plain model says."""

import functools

import accelerate
import peft
import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.distributed.fsdp import fully_shard

import ocm
from hessdiag.compat import TORCH_VERSION, NotDifferentiableError

# Weights that fully_shard has spread, inside of a transform of torch.func.
GATHERED_IN_TRANSFORMS = TORCH_VERSION >= (2, 13)
UNITS = ocm.Parameterisation(0.7, positive=True)
# Which of them `make test` compiles; `make soak` takes the others too.
QUICK = ("UNet2DModel", "SD3Transformer2DModel")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def offloaded(model):
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def sharded(model):
    # A DiT looks into its first block from outside.
    if type(model).__name__ != "DiTTransformer2DModel":
        for child in model.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                fully_shard(block)
    return fully_shard(model)


def distributed(model):
    # Before a denoiser freezes it.
    return nn.parallel.DistributedDataParallel(model.requires_grad_(True))


def lora():
    names = ["to_q", "to_k", "to_v"]
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)


def injected(model):
    torch.manual_seed(3)
    return peft.inject_adapter_in_model(lora(), model).eval()


def wrapped_by_peft(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, lora()).eval()


WRAPPERS = {
    "compile": functools.partial(torch.compile, backend="aot_eager"),
    "cpu offload": offloaded,
    "distributed": distributed,
    "fully_shard": sharded,
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "LoRA injected": injected,
    "peft": wrapped_by_peft,
}
# Of a float of 11 and of 8 bits, through a dozen layers, relative to the largest number.
TOLERANCE = {"float16": 0.02, "bfloat16": 0.1}


def stated(family, denoiser):
    """What a denoiser says, in order: x0_hat, a diagonal by probes, and one of a head."""
    prediction = denoiser.predict(family.x_t(), 500, condition=family.condition(denoiser))
    head = ocm.make_head(denoiser, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    learned = ocm.OptimalCovarianceMatching(denoiser, head, UNITS)
    by_probes = ocm.Hutchinson(denoiser, 2, floor=None).at(prediction).diagonal()
    by_head = learned.at(denoiser.predict(family.x_t(), 500, condition=family.condition(denoiser)))
    return prediction.x0_hat.detach(), by_probes.detach(), by_head.diagonal().detach()


@functools.cache
def plain(name, adapted):
    family = FAMILIES[name]
    model = family.make()
    if adapted:  # merged into the weights, so that nothing of peft is left
        model = wrapped_by_peft(model).merge_and_unload()
    return stated(family, family.denoiser(model))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_wrapped_it_says_what_the_plain_model_says(name, wrapper):
    torch.compiler.reset()
    family, adapted = FAMILIES[name], wrapper in ("LoRA injected", "peft")
    denoiser = family.denoiser(WRAPPERS[wrapper](family.make()))
    assert denoiser.architecture.class_name == name
    if wrapper == "fully_shard" and not GATHERED_IN_TRANSFORMS:
        with pytest.raises(NotDifferentiableError, match="fully_shard"):
            stated(family, denoiser)
        return
    tolerance = TOLERANCE.get(wrapper, 1e-4)
    for ours, expected in zip(stated(family, denoiser), plain(name, adapted), strict=True):
        assert ours.dtype == torch.float32
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, atol=tolerance * scale, rtol=0)
    if adapted:
        assert not torch.allclose(plain(name, True)[0], plain(name, False)[0], atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in FAMILIES],
)
def test_attached_and_compiled_it_is_one_graph(name):
    torch.compiler.reset()
    family = FAMILIES[name]
    model = ocm.attach(family.make())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    calls = []

    def native(model):
        def call(*args, **kwargs):
            calls.append(model(*args, **kwargs)[0])
            return (calls[-1].chunk(2, dim=1)[0],)

        call.config = family.make().config
        labels = {} if family.classes is None else {"class_labels": family.labels()}
        given = family.tensors() | labels
        with torch.no_grad():
            return family.native(call, family.x_t(), torch.tensor(500.0), **given)

    native(compiled)
    native(model)
    torch.testing.assert_close(*calls, atol=1e-4, rtol=1e-4)
    assert calls[0].std() > 0


@pytest.mark.parametrize("name", ["UNet2DModel", "SD3Transformer2DModel"])
def test_a_sharded_backbone_is_attached_and_not_saved(name, tmp_path):
    family = FAMILIES[name]
    model = ocm.attach(sharded(family.make()))
    assert model.config.backbone_class == name
    with pytest.raises(ValueError, match="fully_shard has spread it over processes: save"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DModel", "SD3Transformer2DModel"])
def test_adapters_of_peft_are_merged_before_a_model_is_saved(name, tmp_path):
    family = FAMILIES[name]
    for wrapped in (injected(family.make()), wrapped_by_peft(family.make())):
        with pytest.raises(ValueError, match=r"backbone has adapters.*merge them by"):
            ocm.attach(wrapped).save_pretrained(tmp_path)


def test_a_dit_is_sharded_as_a_whole():
    family = FAMILIES["DiTTransformer2DModel"]
    model = family.make()
    fully_shard(model.transformer_blocks[0])
    denoiser = family.denoiser(fully_shard(model))
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel must be sharded as a whole"):
        denoiser.predict(family.x_t(), 500, condition=family.condition(denoiser)).output  # noqa: B018
