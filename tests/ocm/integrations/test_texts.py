"""Texts as conditions: what diffusers' own pipelines hand their backbones."""

import pytest
import text_pipelines
import torch
from text_pipelines import PIPELINES, WIDTH, random_weights

import ocm
from ocm.integrations.texts import RETURNED, encode_by, encode_texts, takes_texts, without_null

TEXTS = ["a red cat", "dog", "two"]
# How each is called for a small image or video; guidance and its scale.
CALLS = {
    "stable_diffusion": {"height": 64, "width": 64, "guidance_scale": 3.0},
    "stable_diffusion_3": {"height": 64, "width": 64, "guidance_scale": 3.0},
    "flux": {"height": 64, "width": 64, "true_cfg_scale": 3.0, "negative_prompt": ["", "", ""]},
    "pixart": {"height": 64, "width": 64, "use_resolution_binning": False},
    "sana": {"height": 64, "width": 64, "use_resolution_binning": False},
    "qwen": {"height": 64, "width": 64, "true_cfg_scale": 3.0, "negative_prompt": ["", "", ""]},
    "wan": {"height": 64, "width": 64, "num_frames": 5},
    "ltx": {"height": 64, "width": 64, "num_frames": 9},
}


def backbone_of(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


def handed(pipeline, **options):
    """What the backbone is handed in the one step of a call, by name."""
    calls = []

    def forward(sample=None, *_, hidden_states=None, **given):
        calls.append(given)
        return (torch.zeros_like(sample if hidden_states is None else hidden_states),)

    pipeline.set_progress_bar_config(disable=True)
    backbone_of(pipeline).forward = forward
    pipeline(TEXTS, num_inference_steps=1, output_type="latent", **options)
    return calls


@pytest.mark.parametrize("name", PIPELINES)
def test_conditions_are_what_the_pipeline_hands_its_backbone(name):
    """In both branches of its guidance, whether they are one batch or two calls."""
    pipeline = PIPELINES[name]()
    assert type(backbone_of(pipeline)).__name__ in RETURNED
    with torch.no_grad():
        conditions, nulls = without_null(encode_texts(pipeline, TEXTS, batch_size=2))
    assert conditions.keys() == nulls.keys()
    calls = handed(pipeline, **CALLS[name])
    assert len(calls) == (2 if name in ("flux", "qwen", "wan") else 1)
    for key, rows in conditions.items():
        null = nulls[key].expand(3, *nulls[key].shape[1:])
        assert not torch.equal(rows[0], null[0]) or "mask" in key
        pair = [call[key] for call in calls]
        theirs, without = pair if len(pair) == 2 else pair[0].chunk(2)[::-1]
        if without is None:  # Qwen leaves out a mask that leaves out nothing
            without = torch.ones(null.shape[:1] + calls[1]["encoder_hidden_states"].shape[1:2])
        for mine, given in ((rows, theirs), (null, without)):
            # Alone in its batch an empty text needs less filling up.
            length = given.shape[1] if name == "qwen" else mine.shape[1]
            torch.testing.assert_close(mine[:, :length].to(given), given, rtol=1e-4, atol=1e-5)
            assert not mine[:, length:].any()


def test_every_backbone_that_takes_texts_is_tried():
    assert {type(backbone_of(make())).__name__ for make in PIPELINES.values()} == set(RETURNED)


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart", "stable_diffusion_3"])
def test_a_pipeline_on_the_disk_encodes_without_its_backbone(name, tmp_path):
    pipeline = PIPELINES[name]() if name != "stable_diffusion_3" else PIPELINES[name](third=False)
    pipeline.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = encode_texts(pipeline, TEXTS)
    for file in tmp_path.glob("*/diffusion_pytorch_model.safetensors"):
        file.unlink()
    found = encode_by(tmp_path, TEXTS, "cpu")
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows)


def test_an_attached_pipeline_encodes_as_its_backbone_does(tmp_path):
    plain = text_pipelines.stable_diffusion()
    expected = encode_texts(plain, TEXTS)
    model = ocm.attach(plain.unet)
    attached = text_pipelines.stable_diffusion(model, model.scheduler(plain.scheduler))
    attached.save_pretrained(tmp_path)
    for found in (encode_texts(attached, TEXTS), encode_by(tmp_path, TEXTS, "cpu")):
        assert found.keys() == expected.keys()
        for key, rows in expected.items():
            torch.testing.assert_close(found[key], rows)


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart"])
def test_a_head_is_trained_on_texts(name):
    pipeline = PIPELINES[name]()
    denoiser = ocm.Denoiser(
        random_weights(backbone_of(pipeline)), ocm.from_scheduler(pipeline.scheduler)
    )
    assert takes_texts(denoiser)
    conditions, nulls = without_null(encode_texts(pipeline, ["a cat", "a dog"] * 4))
    covariance = ocm.OptimalCovarianceMatching(
        denoiser, ocm.make_head(denoiser), ocm.Parameterisation(0.5, positive=True)
    )
    settings = ocm.TrainingSettings(3, batch_size=4)
    given = {"conditions": conditions, "null_conditions": nulls}
    losses = ocm.train_head(covariance, torch.rand(8, 1, 8, 8), settings, progress=False, **given)
    assert len(losses) == 3
    assert list(covariance.head.parameters())[-2].abs().max() > 0  # which starts at 0


def test_texts_that_cannot_be_encoded_are_refused():
    pipeline = text_pipelines.stable_diffusion()
    with pytest.raises(ValueError, match="texts must be at least one, got none"):
        encode_texts(pipeline, [])
    with pytest.raises(ValueError, match=r"backbone must be one of .*, got UNet2DModel"):
        encode_texts(pipeline, TEXTS, backbone="UNet2DModel")
    four = (torch.zeros(1, 2, WIDTH),) * 4
    pipeline.encode_prompt = lambda prompt: four
    with pytest.raises(ValueError, match="returns 4 embeddings for 2: those of SDXL"):
        encode_texts(pipeline, TEXTS)
