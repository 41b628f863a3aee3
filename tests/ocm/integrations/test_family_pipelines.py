"""Attached models in diffusers' own pipelines: what they hand the scheduler, and what they draw."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family_pipelines import PIPELINES, draw, make_pipeline, scheduler_of
from safetensors.torch import load_file

import ocm

HELPERS = Path(__file__).parents[2] / "helpers"


def attached(name, *, variance=True):
    """A model with a head of random weights, or one that states a variance of zero."""
    backbone = FAMILIES[PIPELINES[name][0]].make()
    model = ocm.attach(backbone, parameterisation=ocm.Parameterisation(1.0, positive=variance))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3) if variance else parameter.zero_()
        if not variance:
            list(model.head.parameters())[-1].fill_(-1.0)
    return model


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model_output has the")
        return function(*args, **options)


@pytest.mark.parametrize("name", PIPELINES)
def test_without_a_variance_they_draw_what_diffusers_scheduler_does(name):
    backbone, theirs = FAMILIES[PIPELINES[name][0]].make(), scheduler_of(name)
    expected = draw(name, make_pipeline(name, backbone, theirs))
    assert expected.isfinite().all()
    assert expected.flatten(1).std(dim=1).min() > 1e-3
    model = attached(name, variance=False)
    scheduler = model.scheduler(theirs)
    if name != "QwenImagePipeline":  # it divides by the length of each token, of a ratio too
        drawn = draw(name, make_pipeline(name, model, scheduler))
        torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)
    plain = quiet(draw, name, make_pipeline(name, backbone, scheduler))
    torch.testing.assert_close(plain, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_scheduler_is_handed_what_the_denoiser_states(name):
    """Guidance included; in units of the model's parameterisation."""
    family, model, w = FAMILIES[PIPELINES[name][0]], attached(name), 3.0
    scheduler = model.scheduler(scheduler_of(name))
    pipeline = make_pipeline(name, model, scheduler)
    handed, step = [], scheduler.step

    def recorded(output, t, sample, *args, **options):
        handed.append((output, float(t), sample))
        return step(output, t, sample, *args, **options)

    pipeline.scheduler.step = recorded
    assert draw(name, pipeline, scale=w, output_type="latent").isfinite().all()
    assert len(handed) == 3
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    condition = denoiser.condition(
        tensors=family.tensors(), null_tensors=family.tensors(seed=9), guidance_scale=w
    )
    for output, time, sample in handed:
        t = time if denoiser.schedule.is_continuous else int(time) + 1
        prediction, ratio = output.chunk(2, dim=1)
        x_t = unpacked_as(name, sample)
        stated = denoiser.predict(x_t, t, condition=condition)
        variance = covariance.at(stated).diagonal()
        unit = model.parameterisation.scale(denoiser.schedule, t).float()
        # Qwen-Image's pipeline gives every guided token the length of the plain one.
        if name == "QwenImagePipeline":
            continue
        torch.testing.assert_close(
            unpacked_as(name, prediction), stated.output, atol=1e-3, rtol=1e-3
        )
        torch.testing.assert_close(unpacked_as(name, ratio) * unit, variance, atol=1e-3, rtol=1e-3)


def unpacked_as(name, x):
    from diffusers import FluxPipeline, LTXPipeline

    if name in ("FluxPipeline", "QwenImagePipeline"):
        return FluxPipeline._unpack_latents(x, 4, 12, 2)
    if name == "LTXPipeline":
        return LTXPipeline._unpack_latents(x, 2, 1, 3)
    return x


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """What pipelines draw here, and in a process that loads them after importing ocm alone."""
    folder, here = tmp_path_factory.mktemp("pipelines"), {}
    for name in PIPELINES:
        model = attached(name)
        pipeline = make_pipeline(name, model, model.scheduler(scheduler_of(name)))
        here[name] = draw(name, pipeline)
        pipeline.save_pretrained(folder / name)
    out = folder / "drawn.safetensors"
    command = [sys.executable, HELPERS / "family_pipelines.py", folder, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return here, load_file(out)


@pytest.mark.parametrize("name", PIPELINES)
def test_saved_and_loaded_in_a_new_process_they_draw_the_same(name, loaded_elsewhere):
    here, there = loaded_elsewhere
    torch.testing.assert_close(there[name], here[name], atol=1e-4, rtol=1e-4)
    # The variance is not idle.
    backbone = FAMILIES[PIPELINES[name][0]].make()
    without = draw(name, make_pipeline(name, backbone, scheduler_of(name)))
    assert (without - here[name]).abs().max() > 1e-3
