"""The path of every scheduler of diffusers is that of its own noising, or it is refused."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from path_denoiser import SHAPE, gaussian, path_denoiser

import ocm
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of

# Of NumPy's conversions within diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

BETAS = [
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
FLOW = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
]
EDM = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]
KNOWN = {
    **dict.fromkeys(BETAS, "betas"),
    **dict.fromkeys(FLOW, "flow"),
    **dict.fromkeys(EDM, "edm"),
}
KNOWN["SCMScheduler"] = "trigflow"


def made(name):
    """A scheduler with its defaults, or None where diffusers cannot make one here."""
    if not hasattr(diffusers, name):  # of another version
        return None
    try:
        return getattr(diffusers, name)()
    except (ImportError, TypeError):  # another package, or arguments without defaults
        return None


def every_scheduler():
    names = [name for name in vars(diffusers.schedulers) if name.endswith("Scheduler")]
    listed = diffusers._import_structure["schedulers"]
    return sorted({*names, *(name for name in listed if name.endswith("Scheduler"))})


@pytest.mark.parametrize("name", every_scheduler())
def test_a_scheduler_is_known_or_refused(name):
    scheduler = made(name)
    if scheduler is None:
        assert name not in KNOWN
    elif name in KNOWN:
        assert from_scheduler(scheduler).name == KNOWN[name]
    else:
        with pytest.raises(ValueError, match=r"scheduler (must be one of|has alphas_cumprod)"):
            from_scheduler(scheduler)


@pytest.mark.parametrize("name", [name for name in BETAS if made(name) is not None])
def test_its_alpha_bar_is_that_of_its_own_table(name):
    scheduler = made(name)
    schedule = from_scheduler(scheduler)
    for t in (1, 500, 991):
        alpha_bar = scheduler.alphas_cumprod[t - 1].double().item()
        assert schedule.alpha_bar[t].item() == pytest.approx(alpha_bar, rel=1e-4)
        assert schedule.time(torch.tensor(t)).item() == t - 1


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_its_noising_is_its_own(name):
    scheduler = made(name)
    schedule = from_scheduler(scheduler)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for index in (10, 500, 990):
        time = scheduler.timesteps[index : index + 1]
        if name.startswith("Flow"):
            t = time.item()
            alpha, sigma = (
                scheduler.scale_noise(data, time, noise)
                for data, noise in ((one, zero), (zero, one))
            )
        else:
            t = ocm.timesteps_at(schedule, [(4 * time.double()).exp().item()])[0]
            alpha, sigma = (
                scheduler.add_noise(data, noise, time) for data, noise in ((one, zero), (zero, one))
            )
        assert schedule.alpha(t).item() == pytest.approx(alpha.item(), rel=1e-5)
        assert schedule.sigma(t).item() == pytest.approx(sigma.item(), rel=1e-5)
        told = schedule.time(torch.tensor(t, dtype=torch.float64))
        assert told.item() == pytest.approx(time.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDPMScheduler(prediction_type="v_prediction"), "v_prediction"),
        (DDIMScheduler(), "epsilon"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "flow_prediction"),
        (diffusers.EDMEulerScheduler(), "edm"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "trigflow"),
        (
            diffusers.UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            "flow_prediction",
        ),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "sample"),
    ],
)
def test_prediction_types(scheduler, expected):
    assert prediction_type_of(scheduler) == expected


def test_a_configuration_from_disk_is_the_scheduler_from_memory(tmp_path):
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.EDMEulerScheduler(sigma_max=40.0, sigma_data=1.0),
        diffusers.LCMScheduler(),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True),
    ):
        scheduler.save_pretrained(tmp_path)
        loaded = type(scheduler).from_pretrained(tmp_path)
        for other in (loaded, loaded.config, type(scheduler).load_config(tmp_path)):
            one, two = from_scheduler(scheduler), from_scheduler(other)
            assert (one.name, one.data_std) == (two.name, two.data_std)
            assert torch.equal(one.log_alpha_bar, two.log_alpha_bar)


def test_zero_terminal_snr():
    for kind in (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler):
        schedule = from_scheduler(kind(rescale_betas_zero_snr=True))
        assert not schedule.has_signal(1000)
        assert schedule.has_signal(999)


def test_tables_of_its_own_are_refused():
    scheduler = DDPMScheduler()
    changed = DDPMScheduler()
    changed.__class__ = type("Changed", (DDPMScheduler,), {})
    assert torch.equal(from_scheduler(changed).alpha_bar, from_scheduler(scheduler).alpha_bar)
    with pytest.raises(ValueError, match="has alphas_cumprod of its own"):
        from_scheduler(diffusers.CogVideoXDDIMScheduler())
    with pytest.raises(ValueError, match="invert_sigmas must be False"):
        from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, "has no configuration of a VQDiffusionScheduler"),
        ({"_class_name": "KarrasVeScheduler"}, "scheduler must be one of .*got KarrasVeScheduler"),
        ({"_class_name": "MyScheduler"}, "scheduler must be one of diffusers, got MyScheduler"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "spline"},
            "no configuration of a DDPMScheduler",
        ),
        ({"shift": 3.0}, "names its class or states its betas .*got one of shift"),
        (diffusers.FlowMatchEulerDiscreteScheduler().config, "names its class or states its betas"),
        ("DDPMScheduler", "scheduler must be one of diffusers or its configuration"),
    ],
)
def test_what_is_no_scheduler(given, message):
    with pytest.raises(ValueError, match=message):
        from_scheduler(given)


def test_the_exact_velocity_samples_the_data():
    """With the linear betas of DDPM in its place samples had 1.8 times the standard deviation."""
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    taken = ocm.Denoiser(
        denoiser.backbone, from_scheduler(scheduler), prediction_type_of(scheduler),
        denoiser.architecture, denoiser.data_covariance,
    )  # fmt: skip
    x = ocm.sample(
        taken, ocm.Full(taken), (5000, *SHAPE), 3, x0_range=None, noise_at_end=True
    ).flatten(1)
    expected = gaussian().covariance.trace().sqrt()
    assert x.double().var(0).sum().sqrt().item() == pytest.approx(expected.item(), rel=0.02)
