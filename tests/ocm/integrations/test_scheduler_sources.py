"""From diffusers' schedulers to ours: the same meaning from memory and from disk, or an error."""

import inspect
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

import ocm
from ocm.integrations.scheduler import OCMDDIMScheduler, OCMScheduler

WITH_BETAS = [
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *(
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
    ),
    "UniPCMultistepScheduler",
]
OTHERS = [
    *("CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    *("DDPMWuerstchenScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
    *("IPNDMScheduler", "SCMScheduler", "ScoreSdeVeScheduler"),
]


@pytest.fixture
def model(unet):
    return ocm.attach(unet, parameterisation=ocm.Parameterisation(data_std=0.5))


def entries(scheduler):
    """What the constructor takes; the rest is diffusers' own notes."""
    names = inspect.signature(type(scheduler).__init__).parameters
    return {name: scheduler.config[name] for name in names if name != "self"}


@pytest.mark.parametrize("name", WITH_BETAS)
def test_a_scheduler_means_the_same_from_memory_and_from_disk(name, model, tmp_path, caplog):
    cls = getattr(diffusers, name)
    theirs = cls()
    ours = model.scheduler(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    others = [
        model.scheduler(cls.from_pretrained(tmp_path / "theirs")),
        model.scheduler(cls.load_config(tmp_path / "theirs")),
        type(ours).from_config(theirs),
        type(ours).from_pretrained(tmp_path / "theirs"),
        type(ours).from_pretrained(tmp_path / "ours"),
        type(ours).from_config(ours),
    ]
    for other in others:
        expected = entries(ours)
        if other.config.data_std is None:  # made without the model
            expected["data_std"] = None
        assert entries(other) == expected
    # Its own entries, whether they were given or left at its defaults.
    for entry in entries(ours).keys() & theirs.config.keys():
        assert ours.config[entry] == theirs.config[entry], entry
    assert ours.config.clip_sample == theirs.config.get("clip_sample", False)
    # A table of diffusers ends at 2^-24 where it would be 0.
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.to(torch.float32), atol=1e-6, rtol=1e-5
    )
    assert not caplog.records
    assert isinstance(ours, OCMDDIMScheduler if "DDIM" in name else OCMScheduler)


def test_what_a_configuration_leaves_out_is_as_its_class_has_it(model):
    """An old file of Stable Diffusion's, say, which has no timestep_spacing."""
    ours = model.scheduler({"_class_name": "EulerDiscreteScheduler", "beta_start": 0.001})
    assert ours.config.timestep_spacing == "linspace"
    assert ours.config.beta_start == 0.001
    assert ours.config.beta_end == 0.02


@pytest.mark.parametrize("name", ["DDPMScheduler", "UnCLIPScheduler"])
def test_the_variance_is_the_models_and_not_one_of_the_backbone(name, model):
    theirs = getattr(diffusers, name)(variance_type="learned_range")
    ours = model.scheduler(theirs)
    assert ours.config.variance_type == "fixed_small"
    assert OCMScheduler.from_config(theirs).config.variance_type == "learned_range"
    kept = model.scheduler(DDPMScheduler(variance_type="fixed_large"))
    assert kept.config.variance_type == "fixed_large"  # of steps without a variance


def test_and_back_to_diffusers():
    theirs = DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    ours = OCMDDIMScheduler.from_config(theirs)
    back = DDIMScheduler.from_config(OCMScheduler.from_config(ours).config)
    names = theirs.config.keys() - {"_use_default_values"}
    assert {name: back.config[name] for name in names} == {
        name: theirs.config[name] for name in names
    }
    assert {DDPMScheduler, DDIMScheduler} == set(ours.compatibles)


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_of_other_processes_are_refused(name, model):
    theirs = getattr(diffusers, name)()
    for source in (theirs, {"_class_name": name, **theirs.config}):
        message = rf"scheduler must be one of .*got {name}|has alphas_cumprod|of OCM.*got {name}"
        with pytest.raises(ValueError, match=message):
            model.scheduler(source)
        with pytest.raises(ValueError, match=message):
            OCMScheduler.from_config(source)
    if "CogVideoX" not in name:  # whose configuration states betas, and another shift of them
        with pytest.raises(
            ValueError, match=r"scheduler must be .* states its betas and .*, got one of"
        ):
            OCMScheduler.from_config(theirs.config)


def test_the_shift_of_a_configuration_without_a_class_is_refused():
    theirs = diffusers.CogVideoXDDIMScheduler()
    with pytest.raises(ValueError, match=r"scheduler must .*snr_shift_scale"):
        OCMDDIMScheduler.from_config(theirs.config)


def test_what_is_no_scheduler_is_refused(model):
    for nothing in (None, "folder", 3, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="scheduler must be one of diffusers"):
            OCMScheduler.from_config(nothing)
    with pytest.raises(ValueError, match="options must be arguments of OCMScheduler, got eta"):
        model.scheduler(DDPMScheduler(), eta=0.5)


@pytest.mark.parametrize(
    "option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
)
def test_other_noise_levels_are_refused_by_the_name_of_the_option(option, model, tmp_path):
    theirs = diffusers.DPMSolverMultistepScheduler(**{option: True})
    theirs.save_pretrained(tmp_path)
    message = rf"{option} must be False.*from_config\(scheduler, {option}=False\)"
    for source in (theirs, theirs.config, type(theirs).load_config(tmp_path)):
        with pytest.raises(ValueError, match=message):
            OCMScheduler.from_config(source)
        ours = OCMScheduler.from_config(source, **{option: False})
        assert not ours.config.get(option)
    ours = model.scheduler(theirs, **{option: False})
    assert type(ours).from_config(ours).config.timestep_spacing == "linspace"


def test_other_betas_may_be_asked_for():
    ours = OCMDDIMScheduler.from_config(
        DDIMScheduler(), rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert ours.alphas_cumprod[-1] == 0
    made, unused = OCMScheduler.from_config(
        DDPMScheduler(), return_unused_kwargs=True, beta_end=0.03, nothing=1
    )
    assert made.config.beta_end == 0.03
    assert unused["nothing"] == 1


def test_a_pipeline_loads_in_a_process_that_imports_ocm_alone(model, tmp_path):
    pipeline = DDPMPipeline(model, model.scheduler(DDIMScheduler(), eta=0.5))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    code = f"""
import sys
import ocm
assert "diffusers" not in sys.modules
from diffusers import DDPMPipeline
import numpy, torch
pipeline = DDPMPipeline.from_pretrained({str(tmp_path)!r})
generator = torch.Generator().manual_seed(0)
images = pipeline(1, generator, num_inference_steps=3, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
print(type(pipeline.unet).__name__, type(pipeline.scheduler).__name__)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.stdout.split() == ["CovarianceModel", "OCMDDIMScheduler"], answer.stderr
    generator = torch.Generator().manual_seed(0)
    images = pipeline(1, generator, num_inference_steps=3, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), images, atol=1e-4)
