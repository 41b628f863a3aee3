"""Every family of diffusers, saved and loaded, against the whole Jacobian of its x0_hat.

The other side of each comparison is float64, by the calls of the family's own pipeline.
"""

import copy
import json
from functools import cache

import diffusers
import pytest
import torch
from families import FAMILIES, TEXT, WIDTH

import hessdiag
import ocm
from hessdiag.kernels import seed_tensor
from ocm.checkpoints import Checkpoint, load_denoiser
from ocm.checkpoints.catalogue import available, build_covariance
from ocm.diffusion import draws
from ocm.diffusion.backbones.architecture import packed, unpacked

FLOWS = [name for name, family in FAMILIES.items() if family.prediction_type != "epsilon"]
M = 6
# Both ends and the middle; at the end of a flow no signal is left, and no Jacobian speaks of x0.
TIMES = [(name, t) for name in FAMILIES for t in (1, 500, 999 if name in FLOWS else 1000)]


def scheduler_of(family):
    flow = family.prediction_type != "epsilon"
    return (diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDPMScheduler)()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a family's pipeline, written as its pipeline writes it."""

    @cache
    def folder_of(name):
        folder, family = tmp_path_factory.mktemp(name), FAMILIES[name]
        family.make().save_pretrained(folder / ("unet" if "UNet" in name else "transformer"))
        scheduler_of(family).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text("{}")
        return folder

    return folder_of


@cache
def truth(name, t):
    """x0_hat and Cov[x0 | x_t] of two samples, (2, D) and (2, D, D), in float64."""
    family = FAMILIES[name]
    model, x = family.make().double(), family.x_t().double()
    labels = family.labels()
    tensors = {key: value.double() for key, value in family.tensors().items()}

    def x0_hat(x):
        return family.x0_hat(model, x, t, labels, **tensors)[0]

    clean, factor = family.x0_hat(model, x, t, labels, **tensors)
    jacobian = torch.autograd.functional.jacobian(x0_hat, x)
    jacobian = jacobian.reshape(2, x[0].numel(), 2, x[0].numel())
    own = torch.stack([jacobian[i, :, i] for i in range(2)])
    return clean.flatten(1), factor * own


def relative(ours, expected):
    return ((ours.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("name", "t"), TIMES)
def test_covariances_are_those_of_the_whole_jacobian(name, t, saved):
    family, denoiser = FAMILIES[name], load_denoiser(saved(name))
    assert type(denoiser.backbone).__name__ == name
    x = family.x_t()
    prediction = denoiser.predict(x, t, condition=family.condition(denoiser))
    clean, C = truth(name, t)
    assert relative(prediction.x0_hat.flatten(1), clean) < 1e-5

    diagonal = C.diagonal(dim1=1, dim2=2)
    assert relative(ocm.Exact(denoiser).at(prediction).diagonal().flatten(1), diagonal) < 1e-5
    symmetric = (C + C.mT) / 2
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    expected = (symmetric @ z.double().flatten(1)[..., None])[..., 0]
    for whole in (
        ocm.Full(denoiser).at(prediction),
        ocm.Lanczos(denoiser, x[0].numel(), symmetric=True).at(prediction),
    ):
        assert relative(whole.multiply(z).flatten(1), expected) < 1e-5
    shown = C.mT if prediction.jacobian.mode == "vjp" else C
    for design in (hessdiag.Rademacher(), hessdiag.Coloring(M)):
        covariance = ocm.Hutchinson(denoiser, M, probes=design, floor=None)
        v = design.draw(
            (M, *x.shape),
            seed_tensor(0, x.device),
            probe_offset=draws.of_level(t) * M,
            sample_offset=0,
            dtype=x.dtype,
            device=x.device,
        )
        v = v.double().flatten(2)
        estimate = design.weight(tuple(x.shape[1:])) * design.block_size(tuple(x.shape[1:])) / M
        estimate = estimate * (v * torch.einsum("bij,mbj->mbi", shown, v)).sum(dim=0)
        assert relative(covariance.at(prediction).diagonal().flatten(1), estimate) < 1e-5


@pytest.mark.parametrize("name", FLOWS)
def test_without_signal_the_covariance_is_that_of_the_data(name):
    family = FAMILIES[name]
    denoiser = family.denoiser(family.make(), data_covariance=0.3)
    prediction = denoiser.predict(family.x_t(), 1000, condition=family.condition(denoiser))
    variance = ocm.Exact(denoiser).at(prediction).diagonal()
    torch.testing.assert_close(variance, torch.full_like(variance, 0.3))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_it_says_the_same_to_its_digits(name, saved):
    """2^-8 a rounding, through a dozen layers: a few percent of the largest variance."""
    family, denoiser = FAMILIES[name], load_denoiser(saved(name))
    denoiser.backbone.to(torch.bfloat16)
    prediction = denoiser.predict(family.x_t(), 500, condition=family.condition(denoiser))
    clean, C = truth(name, 500)
    assert prediction.x0_hat.dtype == torch.float32
    assert relative(prediction.x0_hat.flatten(1), clean) < 0.05
    diagonal = ocm.Exact(denoiser).at(prediction).diagonal()
    assert diagonal.dtype == torch.float32
    assert relative(diagonal.flatten(1), C.diagonal(dim1=1, dim2=2)) < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_reads_its_features_and_is_trained(name):
    family = FAMILIES[name]
    denoiser = family.denoiser(family.make(), data_covariance=1.0)
    condition = family.condition(denoiser)
    units = ocm.Parameterisation(1.0, positive=True)
    covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser), units)
    x0, t = family.x_t(seed=3), torch.tensor([300, 700])
    loss = covariance.loss(x0, t, seed=0, sample_offset=0, condition=condition)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in covariance.head.parameters())
    assert any(bool(p.grad.any()) for p in covariance.head.parameters())
    images = ocm.sample(denoiser, covariance, x0.shape, 2, condition=condition, x0_range=None)
    assert images.isfinite().all()


# How they are called


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].conditions])
def test_guidance_by_a_batch_of_two_and_by_two_calls(name):
    """A shorter text for no condition cannot be a part of the same batch."""
    family, w = FAMILIES[name], 3.0
    denoiser, x = family.denoiser(family.make()), family.x_t()
    calls = []
    denoiser.backbone.register_forward_hook(lambda *_: calls.append(1))
    tensors = family.tensors()
    for length, expected_calls in ((TEXT, 1), (TEXT - 2, 2)):
        nothing = family.tensors(1, seed=9)
        nothing["encoder_hidden_states"] = torch.randn(1, length, WIDTH)
        condition = denoiser.condition(tensors=tensors, null_tensors=nothing, guidance_scale=w)
        calls.clear()
        prediction = denoiser.predict(x, 500, condition=condition)
        ours = prediction.x0_hat
        assert len(calls) == expected_calls
        given = family.x0_hat(denoiser.backbone, x, 500, **tensors)[0]
        both = {name: value.expand(2, *value.shape[1:]) for name, value in nothing.items()}
        without = family.x0_hat(denoiser.backbone, x, 500, **both)[0]
        torch.testing.assert_close(ours, (1 - w) * without + w * given, atol=1e-4, rtol=1e-4)
        apart = [
            (1 - w, denoiser.condition(tensors=both)),
            (w, denoiser.condition(tensors=tensors)),
        ]
        variance = sum(
            weight * ocm.Exact(denoiser).at(denoiser.predict(x, 500, condition=one)).diagonal()
            for weight, one in apart
        )
        torch.testing.assert_close(
            ocm.Exact(denoiser).at(prediction).diagonal(), variance, atol=1e-3, rtol=1e-3
        )
        assert len(prediction.branches) == 2
        assert prediction.branches[0][1].features.shape == prediction.features.shape


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].conditions])
def test_what_is_missing_is_named(name):
    family = FAMILIES[name]
    denoiser = family.denoiser(family.make())
    for missing in family.conditions:
        tensors = {"other": torch.zeros(2)} | {
            key: value for key, value in family.tensors().items() if key != missing
        }
        condition = denoiser.condition(tensors=tensors)
        with pytest.raises(ValueError, match=f"{name} needs {missing} for each sample"):
            denoiser.predict(family.x_t(), 500, condition=condition).output  # noqa: B018


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "SD3Transformer2DModel",
            (2, 5, 6),
            r"multiples of \(2, 2\).* \(1, 2, 5, 6\)",
        ),
        ("FluxTransformer2DModel", (2, 4, 4, 4), r"must have 2 dimensions behind its channels"),
        ("WanTransformer3DModel", (2, 4, 4), r"must have 3 dimensions behind its channels"),
        ("DiTTransformer2DModel", (2, 4, 6), r"x_t must be square for DiT"),
    ],
)
def test_samples_of_other_shapes_are_refused(name, shape, message):
    family = FAMILIES[name]
    denoiser = family.denoiser(family.make())
    condition = family.condition(denoiser, batch=1)
    with pytest.raises(ValueError, match=message):
        denoiser.predict(torch.zeros(1, *shape), 500, condition=condition).features  # noqa: B018


def test_packing_is_that_of_diffusers():
    x = torch.randn(2, 3, 4, 6)
    theirs = diffusers.FluxPipeline._pack_latents(x, 2, 3, 4, 6)
    assert torch.equal(packed(x, (2, 2)), theirs)
    video = torch.randn(2, 3, 4, 4, 6)
    theirs = diffusers.LTXPipeline._pack_latents(video, 2, 1)
    assert torch.equal(packed(video, (1, 2, 2)), theirs)
    assert torch.equal(unpacked(theirs, (4, 2, 3), (1, 2, 2)), video)


# Guidance that was distilled into the model


def distilled(name):
    family = FAMILIES[name]
    changed = type(family)(**{**vars(family), "config": {**family.config, "guidance_embeds": True}})
    return changed, changed.denoiser(changed.make(), data_covariance=1.0)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SanaTransformer2DModel"])
def test_a_distilled_model_states_no_covariance_by_its_jacobian(name):
    family, denoiser = distilled(name)
    x = family.x_t()
    with pytest.raises(ValueError, match="needs guidance for each sample"):
        denoiser.predict(x, 500, condition=family.condition(denoiser)).output  # noqa: B018
    tensors = {**family.tensors(), "guidance": torch.full((2,), 3.5)}
    condition = denoiser.condition(tensors=tensors)
    prediction = denoiser.predict(x, 500, condition=condition)
    head, t = ocm.make_head(denoiser), torch.tensor([300, 700])
    for covariance in (
        ocm.Exact(denoiser),
        ocm.Hutchinson(denoiser, 2),
        ocm.Lanczos(denoiser),
    ):
        with pytest.raises(ValueError, match=r"guidance_embeds = True was distilled.*ocm.NPR"):
            covariance.at(prediction)
    for learned in (ocm.OptimalCovarianceMatching(denoiser, head), ocm.SN(denoiser, head)):
        with pytest.raises(ValueError, match="was distilled from a guided model"):
            learned.loss(x, t, seed=0, sample_offset=0, condition=condition)
    with pytest.raises(ValueError, match="was distilled from a guided model"):
        ocm.fit_analytic(denoiser, x, [500])
    # Its squared errors are what they are.
    units = ocm.Parameterisation(1.0, positive=True)
    npr = ocm.NPR(denoiser, head, units)
    assert npr.loss(x, t, seed=0, sample_offset=0, condition=condition).isfinite()
    assert npr.at(prediction).diagonal().shape == x.shape


# Variances that were learned beside the prediction


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_variance_channels_are_those_of_diffusers_learned_range(guidance_scale):
    """The step's variance against DDPMScheduler's, which reads the same channels."""
    family = FAMILIES["PixArtTransformer2DModel"]
    denoiser = family.denoiser(family.make())
    options = {}
    if guidance_scale != 1.0:
        options = {"guidance_scale": guidance_scale, "null_tensors": family.tensors(1, seed=9)}
    x, t = family.x_t(), 400
    prediction = denoiser.predict(x, t, condition=family.condition(denoiser, **options))
    covariance = ocm.VarianceChannels(denoiser)
    assert covariance.depends_on_s
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")

    def theirs(tensors):
        raw = family.native(denoiser.backbone, x, torch.tensor(t - 1), **tensors)
        log_variance = scheduler._get_variance(t - 1, raw[:, 2:], "learned_range")
        alpha_bar, before = scheduler.alphas_cumprod[[t - 1, t - 2]].double()
        beta = 1 - alpha_bar / before
        # sigma^2 = beta_tilde + (alpha_bar_s beta^2 / beta_bar_t^2) Var
        rest = log_variance.double().exp() - (1 - before) / (1 - alpha_bar) * beta
        return rest * (1 - alpha_bar) ** 2 / (before * beta**2)

    expected = theirs(family.tensors())
    if guidance_scale != 1.0:
        nothing = {k: v.expand(2, *v.shape[1:]) for k, v in family.tensors(1, seed=9).items()}
        expected = (1 - guidance_scale) * theirs(nothing) + guidance_scale * expected
    ours = covariance.at(prediction).diagonal().double()
    assert relative(ours, expected) < 1e-3  # a small difference of float32 tables


def test_by_name_a_checkpoint_has_it_where_its_backbone_does():
    for name, has in (("PixArtTransformer2DModel", True), ("SD3Transformer2DModel", False)):
        denoiser = FAMILIES[name].denoiser(FAMILIES[name].make())
        checkpoint = Checkpoint(denoiser, FAMILIES[name].shape, 256, "")
        assert denoiser.states_variance is has
        assert ("variance_channels" in available(checkpoint)) is has
    made = build_covariance("variance_channels", checkpoint)
    assert isinstance(made, ocm.VarianceChannels)


def test_a_backbone_without_a_variance_of_its_own_is_told():
    family = FAMILIES["SD3Transformer2DModel"]
    denoiser = family.denoiser(family.make())
    prediction = denoiser.predict(family.x_t(), 500, condition=family.condition(denoiser))
    with pytest.raises(ValueError, match=r"variance beside its prediction.* 4 channels, got 2"):
        ocm.VarianceChannels(denoiser).at(prediction)


def test_outputs_of_another_shape_are_refused():
    denoiser = ocm.Denoiser(lambda x, time: x[:, :1], ocm.linear())
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 4\) for \(2, 2, 4, 4\)"):
        denoiser.predict(torch.zeros(2, 2, 4, 4), 500).output  # noqa: B018


# Heads of tokens


def test_heads_of_before_are_those_of_squares(tmp_path):
    """A number for the patch, and its weights in the same order."""
    family = FAMILIES["DiTTransformer2DModel"]
    denoiser = family.denoiser(family.make())
    head = ocm.make_head(denoiser, "simple")
    assert head.config == {"width": 16, "out_channels": 2, "patch_size": 2, "residual": False}
    torch.nn.init.normal_(head.out.weight)
    tokens = torch.randn(1, 2, 3, 16)
    patches = head.out(torch.nn.functional.silu(head.norm(tokens)))
    expected = patches.reshape(1, 2, 3, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(1, 2, 4, 6)
    torch.testing.assert_close(head(tokens), expected)
    assert json.loads(json.dumps(head.config)) == head.config
    wan = FAMILIES["WanTransformer3DModel"]
    made = ocm.make_head(wan.denoiser(wan.make()), "residual")
    assert made.config["patch_size"] == [1, 2, 2]
    again = ocm.TokenHead(**copy.deepcopy(made.config))
    assert again.state_dict().keys() == made.state_dict().keys()


# What differs between the branches of a guidance, and what does not fit


def test_branches_that_differ_in_anything_are_evaluated_apart():
    def call(backbone, x, time, labels, text, scale, extra):
        return x * text.reshape(-1, 1, 1, 1) * scale + extra["bias"]

    architecture = ocm.Architecture("Scaled", None, call)
    denoiser = ocm.Denoiser(torch.nn.Identity(), ocm.linear(), architecture=architecture)
    x, w, text = torch.randn(2, 1, 2, 2), 3.0, torch.tensor([1.0, 2.0])
    for null, scale in ((5.0, 2.0), (torch.tensor(5.0), torch.tensor(2.0))):
        condition = denoiser.condition(
            tensors={"text": text, "scale": scale, "extra": {"bias": 1.0, "unused": text}},
            null_tensors={"text": text, "scale": null, "extra": {"bias": 4.0}},
            guidance_scale=w,
        )
        given, without = (x * text.reshape(-1, 1, 1, 1) * s + b for s, b in ((2, 1), (5, 4)))
        output = denoiser.predict(x, 500, condition=condition).output
        torch.testing.assert_close(output, (1 - w) * without + w * given)


def test_a_mask_belongs_to_its_text():
    family = FAMILIES["PixArtTransformer2DModel"]
    denoiser = family.denoiser(family.make())
    tensors = {**family.tensors(), "encoder_attention_mask": torch.ones(2, TEXT)}
    with pytest.raises(ValueError, match="null_tensors must have encoder_attention_mask too"):
        denoiser.condition(
            tensors=tensors, null_tensors=family.tensors(1, seed=9), guidance_scale=2.0
        )


def test_rows_are_one_for_each_sample_or_one_for_all():
    family = FAMILIES["SanaTransformer2DModel"]
    denoiser = family.denoiser(family.make())
    condition = family.condition(denoiser)
    with pytest.raises(ValueError, match="or one for all, got 2 for 4 samples"):
        denoiser.predict(family.x_t(4), 500, condition=condition)
    assert denoiser.predict(
        family.x_t(1), 500, condition=family.condition(denoiser, 1)
    ).output.any()


def test_another_denoiser_of_the_same_network_speaks_for_itself():
    family = FAMILIES["UNet2DModel"]
    backbone, x = family.make(), family.x_t()
    noise = family.denoiser(backbone)
    velocity = ocm.Denoiser(backbone, noise.schedule, "v_prediction")
    expected = ocm.Exact(velocity).at(velocity.predict(x, 500)).diagonal()
    found = ocm.Exact(velocity).at(noise.predict(x, 500)).diagonal()
    torch.testing.assert_close(found, expected)


def test_copies_of_a_denoiser_have_heads_too():
    for name in ("SD3Transformer2DModel", "LTXVideoTransformer3DModel"):
        denoiser = copy.deepcopy(FAMILIES[name].denoiser(FAMILIES[name].make()))
        assert isinstance(ocm.make_head(denoiser), ocm.TokenHead)


def test_packed_models_with_further_inputs_are_refused():
    """FLUX.1-Fill and its kin see a masked image beside x_t."""
    family = FAMILIES["FluxTransformer2DModel"]
    model = type(family)(**{**vars(family), "config": {**family.config, "out_channels": 4}}).make()
    with pytest.raises(ValueError, match="in_channels = 8, out_channels = 4"):
        ocm.attach(model)


def test_sana_sprint_is_shown_and_read_as_its_pipeline_does():
    family, _ = distilled("SanaTransformer2DModel")
    model, sigma_data = family.make(), 0.5
    schedule = ocm.from_scheduler(diffusers.SCMScheduler())
    denoiser = ocm.Denoiser(model, schedule, "trigflow")
    tensors = {**family.tensors(), "guidance": torch.full((2,), 0.45)}
    x, t = family.x_t(), 600
    prediction = denoiser.predict(x, t, condition=denoiser.condition(tensors=tensors))
    # The lines of SanaSprintPipeline.
    timestep = schedule.time(torch.tensor(float(t)).double()).float().expand(2)
    scm = torch.sin(timestep) / (torch.cos(timestep) + torch.sin(timestep))
    wide = scm.view(-1, 1, 1, 1)
    shown = x / sigma_data * torch.sqrt(wide**2 + (1 - wide) ** 2)
    noise = model(shown, timestep=scm, return_dict=False, **tensors)[0]
    noise = ((1 - 2 * wide) * shown + (1 - 2 * wide + 2 * wide**2) * noise) / torch.sqrt(
        wide**2 + (1 - wide) ** 2
    )
    torch.testing.assert_close(prediction.output, noise, atol=1e-5, rtol=1e-5)
    s = timestep.view(-1, 1, 1, 1)
    x0_hat = torch.cos(s) * x - torch.sin(s) * sigma_data * noise
    torch.testing.assert_close(prediction.x0_hat, x0_hat, atol=1e-5, rtol=1e-5)
