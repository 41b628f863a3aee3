"""Text-to-image models on the command line: heads from captions, samples of prompts."""

import json
import subprocess
import sys

import pytest
import text_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from two_processes import free_port
from typer.testing import CliRunner

import ocm
from ocm import checkpoints, data
from ocm.cli import app as cli
from ocm.integrations.texts import encode_texts

QUIET = ("--device", "cpu", "--quiet")
HEADS = ("--head", "ocm", "--head", "npr", "--head-kind", "simple")
CAPTIONS = [f"{'light' if i > 6 else 'dark'} {i}" for i in range(14)]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fourteen grey images with captions, and no test split."""
    path = tmp_path_factory.mktemp("images")
    for i in range(14):
        Image.new("L", (8, 8), 18 * i).save(path / f"{i:02}.png")
    lines = [json.dumps({"file_name": f"{i:02}.png", "text": CAPTIONS[i]}) for i in range(14)]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A pipeline, and the same with a head of random weights attached."""
    plain, attached = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("attached")
    pipeline = text_pipelines.stable_diffusion()
    pipeline.save_pretrained(plain)
    model = ocm.attach(pipeline.unet)
    torch.nn.init.normal_(model.head.head.conv.weight, std=0.3)
    scheduler = model.scheduler(pipeline.scheduler)
    text_pipelines.stable_diffusion(model, scheduler).save_pretrained(attached)
    return plain, attached


@pytest.fixture(scope="module")
def embeddings(pipelines, tmp_path_factory):
    """The embeddings of all captions, as the files of the images lie."""
    file = tmp_path_factory.mktemp("embeddings") / "texts.safetensors"
    save_file(encode_texts(text_pipelines.stable_diffusion(), CAPTIONS), file)
    return file


def train(folder, denoiser, out, *options):
    sizes = ("--head-steps", 4, "--batch-size", 8, "--hold-out", 2, "--out", out)
    return invoke("train", "--data", folder, "--denoiser", denoiser, *sizes, *options, *QUIET)


@pytest.fixture(scope="module")
def trained(folder, pipelines, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    answer = train(folder, pipelines[0], out, "--caption-column", "text", *HEADS)
    assert answer.exit_code == 0, answer.output
    return out


def weights(checkpoint):
    return checkpoints.load(checkpoint).learned["npr"].head.conv.weight


def test_captions_and_their_embeddings_train_the_same_head(
    folder, pipelines, embeddings, trained, tmp_path
):
    """Those of the file lie as the images' files do, which training shuffles; so must they."""
    answer = train(folder, pipelines[0], tmp_path / "a", "--conditions", embeddings, *HEADS)
    assert answer.exit_code == 0, answer.output
    torch.testing.assert_close(weights(tmp_path / "a"), weights(trained))
    assert json.loads((tmp_path / "a" / "train.json").read_text())["conditions"] == str(embeddings)
    other = {name: rows.flip(0) for name, rows in load_file(embeddings).items()}
    save_file({k: v.contiguous() for k, v in other.items()}, tmp_path / "other.safetensors")
    given = ("--conditions", tmp_path / "other.safetensors")
    answer = train(folder, pipelines[0], tmp_path / "b", *given, *HEADS)
    assert answer.exit_code == 0, answer.output
    # Of the weights Adam's first steps tell little but the signs of their gradients.
    losses = [
        json.loads((path / "train.json").read_text())["head_loss"]["npr"]
        for path in (trained, tmp_path / "a", tmp_path / "b")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)

    record = json.loads((trained / "train.json").read_text())
    assert (record["trained_on"], record["data_options"]) == (11, {"caption_column": "text"})
    loaded = checkpoints.load(trained)
    images = data.load(str(folder), **loaded.data_options)
    covariance = ocm.NPR(
        loaded.denoiser,
        ocm.make_head(loaded.denoiser, "simple"),
        loaded.learned["npr"].parameterisation,
    )
    texts = encode_texts(text_pipelines.stable_diffusion(), images.train_captions[:11])
    settings = ocm.TrainingSettings(4, batch_size=8, learning_rate=3e-3, seed=1)
    null = texts.pop("null.encoder_hidden_states")
    own = ocm.train_head(
        covariance, images.first(11).train, settings, conditions=texts,
        null_conditions={"encoder_hidden_states": null}, progress=False,
    )  # fmt: skip
    assert sum(own) / 4 == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(covariance.head.conv.weight, weights(trained))


def test_an_attached_pipeline_is_trained_and_sampled(folder, pipelines, tmp_path):
    answer = train(folder, pipelines[1], tmp_path, "--caption-column", "text", "--head", "npr")
    assert answer.exit_code == 0, answer.output
    assert set(checkpoints.load(tmp_path).learned) == {"ocm", "npr"}
    assert drawn(pipelines[1], tmp_path / "drawn", "--prompt", "dark").shape == (4, 1, 8, 8)


def drawn(model, out, *options):
    small = ("--steps", 2, "--num-images", 4, "--out", out)
    answer = invoke("sample", model, *small, *options, *QUIET)
    assert answer.exit_code == 0, answer.output
    return load_file(out / "samples.safetensors")["images"]


def test_samples_of_prompts_and_of_their_embeddings(pipelines, trained, tmp_path):
    prompts = ("--prompt", "dark 1", "--prompt", "light 9")
    texts = encode_texts(text_pipelines.stable_diffusion(), ["dark 1", "light 9"])
    save_file(texts, tmp_path / "texts.safetensors")
    for guidance in (1, 3):
        options = ("--guidance", guidance)
        by_prompt = drawn(trained, tmp_path / "a", *prompts, "--encoders", pipelines[0], *options)
        given = ("--conditions", tmp_path / "texts.safetensors")
        torch.testing.assert_close(drawn(trained, tmp_path / "b", *given, *options), by_prompt)
        loaded = checkpoints.load(trained)
        denoiser = loaded.denoiser
        name = "encoder_hidden_states"
        condition = denoiser.condition(
            guidance_scale=guidance,
            tensors={name: texts[name].repeat(2, 1, 1)},
            null_tensors={name: texts[f"null.{name}"]},
        )
        steps = ocm.trailing_timesteps(denoiser.schedule, 2)
        expected = ocm.sample(
            denoiser, loaded.learned["ocm"], (4, 1, 8, 8), steps, condition=condition
        )
        torch.testing.assert_close(by_prompt, expected, rtol=1e-3, atol=1e-3)
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["prompts"] == ["dark 1", "light 9"]


def test_what_does_not_fit_is_one_sentence(folder, pipelines, embeddings, trained, tmp_path):
    plain, out = pipelines[0], ("--out", tmp_path)
    short = tmp_path / "short.safetensors"
    save_file({"encoder_hidden_states": torch.zeros(12, 12, 8)}, short)
    (tmp_path / "broken.safetensors").write_text("no tensors")
    ours = ("--data", folder, "--denoiser")
    for arguments, message in (
        (("train", *ours, plain), "the denoiser takes texts, and none were given"),
        (("sample", trained), "the denoiser takes texts, and none were given"),
        (("sample", trained, "--prompt", "a"), "texts need a pipeline with text encoders"),
        (("train", "--data", folder, "--caption-column", "text"), "are for a --denoiser that"),
        (
            ("train", *ours, plain, "--caption-column", "text", "--conditions", embeddings),
            "must not both be given",
        ),
        (("train", *ours, plain, "--conditions", short), "each of 14 rows of the train split"),
        (
            ("train", *ours, plain, "--conditions", tmp_path / "broken.safetensors"),
            "broken.safetensors cannot be read",
        ),
        (("train", *ours, trained, "--caption-column", "text"), "texts need a pipeline"),
        (("evaluate", trained), "neither calibrated nor evaluated here"),
        (("calibrate", trained), "neither calibrated nor evaluated here"),
    ):
        answer = invoke(*arguments, *out, *QUIET)
        assert message in str(answer.exception), arguments


@pytest.mark.soak
def test_two_processes_train_on_a_sharded_denoiser(
    folder, pipelines, embeddings, trained, tmp_path
):
    """Each with a part of it; the checkpoint holds all of it, and the head of one process."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(free_port()), "-m", "ocm", "train", "--data", folder, "--denoiser", pipelines[0],
        "--head-steps", "4", "--batch-size", "8", "--hold-out", "2", "--out", out, "--conditions",
        embeddings, *HEADS, "--shard", *QUIET,
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=300)
    torch.testing.assert_close(weights(out), weights(trained), rtol=1e-3, atol=1e-5)
    one, two = (
        json.loads((path / "train.json").read_text())["head_loss"] for path in (trained, out)
    )
    assert two == pytest.approx(one, rel=1e-4)
    name = "denoiser/diffusion_pytorch_model.safetensors"
    expected, whole = load_file(trained / name), load_file(out / name)
    assert expected.keys() == whole.keys()
    assert all(torch.equal(whole[key], value) for key, value in expected.items())
    answer = train(folder, pipelines[0], tmp_path / "b", "--conditions", embeddings, "--shard")
    assert "over several processes, and there is one" in str(answer.exception)
    answer = invoke("train", "--data", folder, "--shard", "--out", tmp_path / "c")
    assert "--shard is for a --denoiser" in str(answer.exception)


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_transformers_are_trained_on_captions_and_sampled_with_guidance(name, folder, tmp_path):
    """Tokens that are packed, and a backbone that learned a variance of its own."""
    pipeline = getattr(text_pipelines, name)()
    pipeline.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "trained"
    answer = train(folder, tmp_path / "pipeline", out, "--caption-column", "text", *HEADS)
    assert answer.exit_code == 0, answer.output
    loaded = checkpoints.load(out)
    assert type(loaded.denoiser.backbone) is type(pipeline.transformer)
    assert set(loaded.learned) == {"ocm", "npr"}
    assert loaded.image_shape == (1, 8, 8)
    encoders = ("--encoders", tmp_path / "pipeline", "--prompt", "dark", "--guidance", 2)
    assert drawn(out, tmp_path / "drawn", *encoders, "--covariance", "npr").isfinite().all()
