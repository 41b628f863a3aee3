"""Real architectures with random weights: every way is right, or says why not and what to do."""

import copy

import pytest
import torch
from timm_without_torchvision import vision_transformer_class
from torch import nn
from torch.utils.checkpoint import checkpoint

import hessdiag
from hessdiag import Jacobian
from hessdiag.compat import TORCH_VERSION, NotDifferentiableError

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]
IMAGES = (2, 2, 4, 4)


def randomised(module, std=0.2):
    """Give every parameter a random value: some models start with layers of zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def unet():
    from diffusers import UNet2DModel

    module = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    return lambda x: module(x, 9).sample


def checkpointed_unet():
    from diffusers import UNet2DModel

    module = UNet2DModel(
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
    module.enable_gradient_checkpointing()
    module.train()  # diffusers checkpoints in training mode only
    return lambda x: module(x, 9).sample


def conditional_unet():
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    ).eval()
    text = torch.randn(1, 3, 8)
    return lambda x: module(x, 9, encoder_hidden_states=text.to(x).expand(len(x), -1, -1)).sample


def dit():
    from diffusers import DiTTransformer2DModel

    module = randomised(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            num_layers=2,
            sample_size=4,
            patch_size=2,
            norm_num_groups=4,
            num_embeds_ada_norm=10,
        )
    ).eval()

    def score_fn(x):
        t, label = torch.full((len(x),), 9), torch.full((len(x),), 3)
        return module(x, timestep=t, class_labels=label).sample

    return score_fn


def vision_transformer():
    module = vision_transformer_class()(
        img_size=4, patch_size=2, in_chans=2, num_classes=32, embed_dim=16, depth=2, num_heads=2
    ).eval()
    return lambda x: module(x).reshape(x.shape)


def transformer(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).train(training)


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12))


def batch_norm(training):
    module = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 12))
    module[1].running_mean.normal_()
    return module.train(training)


def checkpointed(use_reentrant):
    module = mlp()
    return lambda x: checkpoint(module, x.sin(), use_reentrant=use_reentrant)


def compiled(backend):
    torch.compiler.reset()
    return torch.compile(mlp(), backend=backend, dynamic=False)


# Recorded on torch 2.11.
CHECKPOINTS_WITHOUT_JVP = {
    f"jvp {batching}": "_NoopSaveInputs.*use batching='loop'"
    if batching == "vmap"
    else "use the other one.*implement the jvp function"
    for batching in ("loop", "vmap", "fold")
}

# Name: how to make the function, shape of x, and the ways that must refuse, with what they say.
CASES = {
    "UNet2DModel": (unet, IMAGES, {"vjp vmap": "use batching='loop'"}),
    "UNet2DConditionModel": (conditional_unet, IMAGES, {}),
    "UNet2DModel, checkpointed": (
        checkpointed_unet,
        IMAGES,
        {"vjp vmap": "saved tensor hooks.*use batching='loop'"},
    ),
    "DiTTransformer2DModel": (dit, IMAGES, {}),
    "timm ViT": (vision_transformer, IMAGES, {}),
    "TransformerEncoder, eval": (lambda: transformer(False), (2, 4, 8), {}),
    "TransformerEncoder, train": (lambda: transformer(True), (2, 4, 8), {}),
    "MLP": (mlp, (3, 12), {}),
    "BatchNorm, eval": (lambda: batch_norm(False), (3, 12), {}),
    "BatchNorm, train": (
        lambda: batch_norm(True),
        (3, 12),
        {
            "vjp vmap": "BatchNorm in training mode.*mode='vjp' with batching='loop'",
            "vjp fold": "couples the samples.*BatchNorm in eval mode",
            "jvp loop": "BatchNorm in training mode.*eval mode, or use mode='vjp'",
            "jvp vmap": "BatchNorm in training mode.*eval mode, or use mode='vjp'",
            "jvp fold": "BatchNorm in training mode.*eval mode, or use mode='vjp'",
        },
    ),
    "dropout": (
        lambda: nn.Sequential(mlp(), nn.Dropout(0.5)),
        (2, 12),
        {
            "vjp fold": "draws random numbers.*eval mode",
            "jvp fold": "draws random numbers.*eval mode",
        },
    ),
    "checkpoint": (
        lambda: checkpointed(False),
        (2, 12),
        {"vjp vmap": "saved tensor hooks.*use batching='loop'"}
        | (CHECKPOINTS_WITHOUT_JVP if TORCH_VERSION == (2, 11) else {}),
    ),
    "reentrant checkpoint": (
        lambda: checkpointed(True),
        (2, 12),
        {f"{mode} {batching}": "use_reentrant=False" for mode, batching in WAYS},
    ),
    "activation in place": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(inplace=True), nn.Linear(16, 12)),
        (2, 12),
        {},
    ),
    "activation over what the derivative needs": (
        lambda: nn.Sequential(nn.Linear(12, 12), nn.Sigmoid(), nn.ReLU(inplace=True)),
        (2, 12),
        {
            f"vjp {batching}": "out of place, or use mode='jvp'"
            for batching in ("loop", "vmap", "fold")
        },
    ),
    "torch.compile, aot_eager": (lambda: compiled("aot_eager"), (2, 12), {}),
    "torch.compile, inductor": (lambda: compiled("inductor"), (2, 12), {}),
}


def joint_jacobian(score_fn, x, seed):
    """Central differences in float64 where that is possible: shape (B, D, B, D)."""
    point, step = x.double(), 1e-6
    rows = []
    for b in range(len(x)):
        for i in range(x[0].numel()):
            moved = []
            for sign in (1.0, -1.0):
                torch.manual_seed(seed)
                shifted = point.clone()
                shifted[b].view(-1)[i] += sign * step
                moved.append(score_fn(shifted).detach())
            rows.append((moved[0] - moved[1]) / (2 * step))
    size = (len(x), x[0].numel())
    return torch.stack(rows).reshape(*size, *size).permute(2, 3, 0, 1)


@pytest.fixture(scope="module")
def functions():
    """Make each function once, with its Jacobian by differences of a float64 copy."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            make, shape, _ = CASES[name]
            score_fn = make()
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            torch.manual_seed(0)
            made[name] = score_fn, x, joint_jacobian(in_float64(make), x, 5)
        return made[name]

    return get


def in_float64(make):
    """Return the same function with the same weights in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        torch.manual_seed(0)
        function = make()
    finally:
        torch.set_default_dtype(default)
    for module in modules_of(function):
        module.double()
    return function


def modules_of(function):
    if isinstance(function, nn.Module):
        return [function]
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return [cell for cell in cells if isinstance(cell, nn.Module)]


# What writes C++ and compiles it takes half a minute.
NAMES = [
    pytest.param(name, marks=pytest.mark.soak) if "inductor" in name else name for name in CASES
]


@pytest.mark.parametrize(("mode", "batching"), WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_products_agree_with_differences_or_are_refused(functions, name, mode, batching):
    score_fn, x, J = functions(name)
    refused = CASES[name][2].get(f"{mode} {batching}")
    v = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(2))

    def products():
        torch.manual_seed(5)
        return Jacobian(copy.copy(score_fn), x, mode=mode, batching=batching).products(v)

    if refused:
        with pytest.raises(ValueError, match=refused):
            products()
        return
    result, flat = products().double().flatten(2), v.double().flatten(2)
    equation = "mbi,bicj->mcj" if mode == "vjp" else "mcj,bicj->mbi"
    expected = torch.einsum(equation, flat, J)
    assert (result - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_exact_in_auto_mode(functions, name):
    score_fn, x, J = functions(name)
    torch.manual_seed(5)
    if name == "BatchNorm, train":
        with pytest.raises(ValueError, match=r"couples the samples of a batch.*eval mode"):
            hessdiag.exact(score_fn, x)
        return
    if name == "reentrant checkpoint":
        with pytest.raises(NotDifferentiableError, match="use_reentrant=False"):
            hessdiag.exact(score_fn, x)
        return
    if name == "activation over what the derivative needs":
        with pytest.warns(UserWarning, match="out of place, or use mode='jvp'"):
            result = hessdiag.exact(score_fn, x)
    else:
        result = hessdiag.exact(score_fn, x)
    expected = torch.einsum("bibi->bi", J).reshape(x.shape)
    assert (result - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.soak
def test_a_module_compiled_and_trained_before():
    """Its backward pass may overwrite the activations: PyTorch raises, so it is forward mode."""
    torch.compiler.reset()
    module = torch.compile(mlp())
    x = torch.randn(8, 12, requires_grad=True)
    module(x).sum().backward()
    x = x.detach()
    with pytest.raises(NotDifferentiableError, match=r"donated_buffer = False.*or use mode='jvp'"):
        hessdiag.exact(module, x, mode="vjp", batching="loop")
    result = hessdiag.estimate(module, x, max_probes=12, probes="auto", batching="loop")
    assert result.mode == "jvp"
    assert "donated_buffer" in result.note
    torch.testing.assert_close(result.diagonal, hessdiag.exact(module, x, mode="jvp"))
