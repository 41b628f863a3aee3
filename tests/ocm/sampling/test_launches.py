"""What a sampling step asks of a GPU, with the device "meta" in its place: launches and waiting."""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from one_device import one_device
from torch import nn

import ocm
from ocm.diffusion.tables import OnDevices, Table
from ocm.integrations.attached import _on_device
from ocm.sampling import samplers, transitions

SHAPE = (3, 2, 8, 8)
STEPS = [1, 100, 200, 300, 400, 1000]


class Unchanged(nn.Module):
    """A backbone whose output and features are its input: nothing is launched for it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.features(x)


ARCHITECTURE = ocm.Architecture("Unchanged", "features", lambda module, x, time, labels: module(x))


class FrequencyHead(nn.Module):
    def forward(self, features, energies, log_snr):
        return energies


def denoiser(device="meta", schedule=None, prediction_type="epsilon"):
    schedule = ocm.cosine() if schedule is None else schedule
    module = Unchanged().to(device)
    return ocm.Denoiser(module, schedule, prediction_type, ARCHITECTURE).freeze()


def learned(kind):
    return lambda denoiser: kind(denoiser, nn.Identity())


def calibrated(denoiser):
    table = Table({1: [0.5, 0.1], 1000: [1.0, 0.2]})
    return ocm.Calibrated((learned(ocm.OptimalCovarianceMatching)(denoiser),), table)


def frequencies(denoiser):
    device = denoiser.device
    return ocm.FrequencyLikelihood(
        denoiser,
        FrequencyHead(),
        variances=torch.ones(2, 8, 8, device=device),
        colours=torch.eye(2, device=device),
    )


# With the launches of a step: one each for the network's time, and for the step itself.
COVARIANCES = {
    "beta": (ocm.Beta, 3),  # and one for the variance
    "beta_tilde": (ocm.BetaTilde, 3),
    "analytic": (lambda denoiser: ocm.Analytic(denoiser, Table({1: [0.5], 1000: [1.0]})), 3),
    "ocm": (learned(ocm.OptimalCovarianceMatching), 5),  # 3 for unit * softplus(o + 1)
    "npr": (learned(ocm.NPR), 5),
    "ml": (learned(ocm.MaximumLikelihood), 5),
    "sn": (learned(ocm.SN), 12),
    "iddpm": (learned(ocm.ImprovedDDPM), 7),
    "calibrated": (calibrated, 9),
    "frequencies": (frequencies, 72),
}
# With those that they need beside DDPM's.
SAMPLERS = {
    "ddpm": (ocm.ddpm, 0),
    "ddim": (partial(ocm.ddim, eta=0.5), 0),
    "renoised": (partial(ocm.renoised, noise=0.5), 0),
    "second order": (ocm.SecondOrder(0.5), 46),
}


def launches_of_a_step(draw):
    """Return by how much the launches grow with the number of steps."""
    draw(STEPS)  # what is made or moved once
    counts = []
    for steps in (STEPS[:2] + STEPS[-1:], STEPS):
        with one_device() as operators:
            draw(steps)
        counts.append(len(operators.launches))
    return (counts[1] - counts[0]) / (len(STEPS) - 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", COVARIANCES)
def test_a_step_waits_for_nothing_and_launches_little(name, sampler):
    d = denoiser()
    covariance, most = COVARIANCES[name][0](d), COVARIANCES[name][1] + SAMPLERS[sampler][1]
    draw = partial(ocm.sample, d, covariance, SHAPE, sampler=SAMPLERS[sampler][0], seed=3)
    assert launches_of_a_step(draw) <= most


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_nor_does_one_on_another_path(path):
    prediction = {"flow": "flow_prediction", "edm": "edm"}[path]
    d = denoiser(schedule=getattr(ocm, path)(), prediction_type=prediction)
    draw = partial(ocm.sample, d, ocm.Beta(d), SHAPE, seed=3)
    assert launches_of_a_step(draw) <= 3 + (path == "edm")  # its network is shown a scaled x_t


@pytest.mark.parametrize("name", ["beta", "ocm", "frequencies"])
def test_a_trajectory_looks_once_whether_it_has_a_density(monkeypatch, name):
    d, looks = denoiser(), []
    monkeypatch.setattr(transitions, "_check_positive", looks.append)
    draw = partial(ocm.sample_trajectory, d, COVARIANCES[name][0](d), SHAPE, seed=3)
    draw(STEPS)
    with one_device():
        trajectory = draw(STEPS)
    assert [len(positive) for positive in looks] == [len(STEPS) - 1] * 2
    with one_device():
        ocm.trajectory_log_prob(d, COVARIANCES[name][0](d), trajectory)


def test_the_mean_and_covariance_at_a_sigma_wait_for_nothing():
    d = denoiser()
    covariance, x = COVARIANCES["ocm"][0](d), torch.zeros(SHAPE, device="meta")
    for sigma in (0.5, torch.full((3,), 0.5, device="meta")):
        ocm.x0_given(d, covariance, x, sigma)
        with one_device():
            assert ocm.x0_given(d, covariance, x, sigma).mean.is_meta


@contextmanager
def readable(**tensors):
    """Let tensors of "meta" be read by ``cpu`` alone, where they are those given on the CPU."""
    twins, reads, cpu = {}, [], torch.Tensor.cpu

    def read(tensor):
        if id(tensor) not in twins:
            return cpu(tensor)
        reads.append(tensor)
        return twins[id(tensor)]

    moved = {name: tensor.to("meta") for name, tensor in tensors.items()}
    twins |= {id(moved[name]): tensor for name, tensor in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", read)
        yield moved, reads


def of_betas(kind, **options):
    scheduler = kind(**options)
    scheduler.set_timesteps(6)
    return scheduler, ("timesteps", "alphas_cumprod")


SCHEDULERS = {
    "ddpm": (partial(of_betas, ocm.OCMScheduler), {}),
    "ddpm, v": (partial(of_betas, ocm.OCMScheduler, prediction_type="v_prediction"), {}),
    "ddim": (partial(of_betas, ocm.OCMDDIMScheduler), {"eta": 0.5}),
    "flow": (
        lambda: (of_betas(partial(ocm.OCMFlowScheduler, data_std=1.0))[0], ("timesteps", "sigmas")),
        {},
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_of_a_scheduler_read_its_tables_once(name):
    """With timesteps on the device, as pipelines put them, and tables that ``add_noise`` moved."""
    make, options = SCHEDULERS[name]
    scheduler, tables = make()
    with readable(**{table: getattr(scheduler, table) for table in tables}) as (moved, reads):
        for table, tensor in moved.items():
            setattr(scheduler, table, tensor)
        x, stated = torch.zeros(SHAPE, device="meta"), torch.zeros(3, 4, 8, 8, device="meta")
        with one_device():
            for t in scheduler.timesteps:
                x = scheduler.step(stated, t, x, **options).prev_sample
        assert len(reads) == len(tables)
        with one_device(), pytest.raises(RuntimeError):  # one that is not of the timesteps is read
            scheduler._host_number(torch.zeros((), device="meta"))


def test_a_timestep_is_known_by_its_place():
    scheduler = ocm.OCMScheduler()
    scheduler.set_timesteps(5)
    for timesteps in (scheduler.timesteps, scheduler.timesteps[2:], scheduler.timesteps.clone()):
        assert [scheduler._host_number(t) for t in timesteps] == timesteps.tolist()
    scheduler.timesteps[1] = 7
    assert scheduler._host_number(scheduler.timesteps[1]) == 7
    assert scheduler._host_number(torch.tensor(3)) == scheduler._host_number(3) == 3


def test_a_table_of_the_device_is_read_again_when_it_changes():
    scheduler = ocm.OCMScheduler()
    scheduler.set_timesteps(5)
    with readable(timesteps=scheduler.timesteps) as (moved, reads):
        scheduler.timesteps = moved["timesteps"]
        for _ in range(2):
            scheduler._on_host("timesteps")
        assert len(reads) == 1
        scheduler.timesteps.add_(1)
        scheduler._on_host("timesteps")
        assert len(reads) == 2


@pytest.mark.parametrize(
    "timestep", [7, 0.5, torch.tensor(7), torch.tensor(0.5), torch.tensor(7.0).bfloat16()]
)
def test_a_single_timestep_is_filled_on_the_device(timestep):
    with one_device():
        filled = _on_device(timestep, torch.device("meta"))
    expected = torch.as_tensor(timestep)
    assert (filled.dtype, filled.shape) == (expected.dtype, expected.shape)
    assert torch.equal(_on_device(timestep, torch.device("cpu")), expected)


class TestTables:
    def test_each_device_has_one_copy(self):
        schedule, t = ocm.linear(), torch.full((2,), 5, device="meta")
        schedule.alpha(t)
        with one_device() as operators:
            schedule.alpha(t)
        assert "aten::_to_copy" in operators  # of t
        assert operators.launches.count("aten::take") == 2

    def test_what_is_copied_in_inference_mode_takes_part_in_graphs(self):
        tables = OnDevices(torch.ones(2))
        with torch.inference_mode():
            assert not tables.at(torch.device("meta"))[0].is_inference()

    def test_what_a_transform_wraps_is_not_kept(self):
        tables = OnDevices(torch.ones(2))

        def look(x):
            return x * tables.at(torch.device("meta"))[0].numel()

        torch.func.jvp(look, (torch.ones(1),), (torch.ones(1),))
        copy = tables.at(torch.device("meta"))[0]
        assert not torch._C._functorch.is_functorch_wrapped_tensor(copy)

    @pytest.mark.parametrize("path", ["linear", "vp", "flow", "edm", "trigflow"])
    def test_numbers_of_a_timestep_are_those_of_its_tensor(self, path):
        schedule = getattr(ocm, path)()
        for t in (1, 500, 1000):
            place = torch.tensor([t], dtype=torch.float64)
            level = schedule.level(t)
            assert level.alpha == schedule.alpha(place).item() == schedule.alpha(t).item()
            assert level.sigma == schedule.sigma(place).item() == schedule.sigma(t).item()
            assert level.log_snr == schedule.log_snr(place).item() == schedule.log_snr(t).item()
            assert level.beta_bar == torch.sigmoid(-schedule.log_snr(place)).item()
            assert level.time == schedule.time(place).item()
        assert schedule.level(0)[:2] == (1.0, 0.0)
        assert math.isnan(schedule.level(0).time)


def test_a_capture_orders_its_streams_on_the_device_of_the_denoiser(monkeypatch):
    """Before the warm-up its stream waits for the work before, which then waits for it."""
    events, here = [], torch.device("cuda", 1)

    class Stream:
        def __init__(self, name="side"):
            self.name = name
            events.append(f"{name} made")

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(what):
        events.append(f"enter {what}")
        yield
        events.append(f"leave {what}")

    class Graph:
        def replay(self):
            events.append("replay")

    class Located:
        device = here

    current, zeros = Stream("current"), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: within(f"graph {stream.name}"))
    monkeypatch.setattr(samplers, "seed_tensor", lambda value, device: torch.tensor(value))

    def sample(*_, seed, **options):
        events.append("sample")
        return seed[None].clone()

    monkeypatch.setattr(samplers, "sample", sample)
    events.clear()
    draw = ocm.capture(Located(), None, SHAPE, 4)
    assert events == [
        f"enter {here}", "side made", "side waits for current", "enter side", "sample",
        "leave side", "current waits for side", "enter graph side", "sample", "leave graph side",
        f"leave {here}",
    ]  # fmt: skip
    events.clear()
    draw(7)
    assert events == [f"enter {here}", "replay", f"leave {here}"]
