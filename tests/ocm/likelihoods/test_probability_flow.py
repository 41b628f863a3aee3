"""The ODE of any path: its variable, its mesh, its places, and what they do between timesteps."""

import dataclasses
import itertools
import math

import pytest
import torch
from known_likelihoods import PATHS, correlated, denoiser_of, points
from path_denoiser import zero_snr

import ocm
from ocm.likelihoods.probability_flow import ProbabilityFlow, between_timesteps

ALL = {**PATHS, "cosine": ocm.cosine, "zero_snr": zero_snr, "edm_80": ocm.edm, "vp_20": ocm.vp}
DISCRETE = ("linear", "cosine", "zero_snr")


def ode_of(schedule, prediction_type="v_prediction"):
    return ProbabilityFlow.of(ocm.Denoiser(lambda x, time: x, schedule, prediction_type))


def angle(schedule, t):
    return math.atan2(schedule.sigma(t).item(), schedule.alpha(t).item())


@pytest.mark.parametrize("name", ALL)
def test_omega_is_that_of_the_angle(name):
    schedule = ALL[name]()
    ode = ode_of(schedule)
    for t in (1, 37, 500, 999):
        theta = angle(schedule, t)
        assert -math.tanh(ode.omega(t)) == pytest.approx(math.cos(theta), abs=1e-12)
        assert 1 / math.cosh(ode.omega(t)) == pytest.approx(math.sin(theta), abs=1e-12)
    if not schedule.has_signal(1000):
        assert ode.omega(1000) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_the_mesh_rises_from_the_first_timestep_to_the_last(name):
    ode = ode_of(ALL[name]())
    for first in (1, 3, 400):
        mesh = ode.mesh(first, 16)
        assert len(mesh) == 17
        assert (mesh[0], mesh[-1]) == (ode.omega(first), ode.omega(1000))
        assert all(w < end for w, end in itertools.pairwise(mesh))
        # Half of log SNR at a place that is 0.02 away: even.
        halves = torch.tensor(mesh, dtype=torch.float64).sub(0.02).neg().sinh().log()
        torch.testing.assert_close(halves.diff(), halves.diff().mean().expand(16))
    assert ode.mesh(1, 1) == [ode.omega(1), ode.omega(1000)]


@pytest.mark.parametrize("name", ["vp", "linear"])
def test_a_network_that_predicts_noise_is_asked_where_there_is_signal(name):
    """As far as log SNR = -10.2, but no further than N."""
    schedule = ALL[name]()
    ode = ode_of(schedule, "epsilon")
    assert ode.last_timestep < 1000
    assert ode.denoiser.schedule.log_snr(ode.last_timestep).item() == pytest.approx(-10.2)
    assert ode_of(schedule, "sample").last_timestep == 1000
    assert ode_of(ocm.linear(), "epsilon").last_timestep == 1000


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discrete_path_is_met_at_its_timesteps(name):
    schedule = ALL[name]()
    path = between_timesteps(schedule)
    assert path.is_continuous
    whole = torch.arange(1001, dtype=torch.float64)
    for found, table in zip(path.scales(whole), schedule.scales(whole), strict=True):
        torch.testing.assert_close(found, table, rtol=1e-9, atol=1e-13)
    assert path.has_signal(1000) == schedule.has_signal(1000)
    assert path.has_signal(999.99)


@pytest.mark.parametrize("name", DISCRETE)
def test_between_timesteps_the_angle_is_linear(name):
    schedule = ALL[name]()
    path = between_timesteps(schedule)
    for t in (1, 500, 998, 999):
        ends = angle(schedule, t), angle(schedule, t + 1)
        for part in (0.25, 0.7):
            between = ends[0] + part * (ends[1] - ends[0])
            assert angle(path, t + part) == pytest.approx(between, abs=1e-12)
            r = math.hypot(path.alpha(t + part).item(), path.sigma(t + part).item())
            assert r == pytest.approx(1.0, abs=1e-12)
    snr = path.log_snr(torch.linspace(0.25, 1000, 4000, dtype=torch.float64))
    assert (snr.diff() < 0).all()


def test_the_radius_is_linear_too():
    """On a discrete path whose variance explodes."""
    exploding = ocm.edm()
    discrete = dataclasses.replace(exploding, is_continuous=False)
    path = between_timesteps(discrete)
    radii = [math.hypot(1.0, exploding.sigma(t).item()) for t in (600, 601)]
    found = math.hypot(path.alpha(600.25).item(), path.sigma(600.25).item())
    assert found == pytest.approx(0.75 * radii[0] + 0.25 * radii[1], rel=1e-12)


def test_a_continuous_path_is_left_alone():
    schedule = ocm.vp()
    assert between_timesteps(schedule) is schedule


@pytest.mark.parametrize("name", ALL)
def test_places_are_those_of_omega(name):
    ode = ode_of(ALL[name]())
    mesh = ode.mesh(1, 7)
    for omega, place in zip(mesh, ode.places(mesh), strict=True):
        assert ode.omega(place.t) == pytest.approx(omega, rel=1e-6, abs=1e-6)
        alpha, sigma = (
            scale.item()
            for scale in ode.denoiser.schedule.scales(torch.tensor(place.t, dtype=torch.float64))
        )
        assert place.scale == pytest.approx(math.hypot(alpha, sigma))


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        ("vp_20", "epsilon"),
        ("linear", "v_prediction"),
        ("flow", "flow_prediction"),
        ("edm", "edm"),
        ("trigflow", "trigflow"),
        ("flow", "sample"),
    ],
)
def test_the_velocity_and_its_divergence_are_those_of_x0_hat(name, prediction_type):
    """dz/domega = cos(theta) z - x0_hat, of which the divergence is taken by autograd."""
    denoiser = denoiser_of(correlated(), ALL[name](), prediction_type)
    ode = ProbabilityFlow.of(denoiser)
    z = points(2, 3)
    for omega in ode.mesh(1, 4)[1:-1]:
        (place,) = ode.places([omega])
        J = ode.jacobian(z, place)
        slope = ode.velocity(z, J, place)

        def velocity(z, place=place, omega=omega):
            x = place.scale * z
            output = denoiser.output(x, place.t)
            return -math.tanh(omega) * z - denoiser.x0_hat(x, place.t, output)

        torch.testing.assert_close(slope, velocity(z), rtol=1e-6, atol=1e-6)
        own = [torch.autograd.functional.jacobian(velocity, z)[b, :, b] for b in range(2)]
        trace = J.products(torch.eye(3).double()[:, None].expand(3, 2, 3))
        trace = torch.einsum("kbk->b", trace)
        torch.testing.assert_close(
            ode.divergence(trace, place, 3),
            torch.stack([jacobian.trace() for jacobian in own]),
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_network_of_a_discrete_path_is_told_what_lies_between():
    """Its time is t - 1, and not whole."""
    told = []

    def network(x, time):
        told.append(time)
        return x

    ode = ProbabilityFlow.of(ocm.Denoiser(network, ocm.linear()))
    (place,) = ode.places([ode.omega(1) / 2])
    z = torch.zeros(2, 3)
    ode.velocity(z, ode.jacobian(z, place), place)
    assert told[0].is_floating_point()
    assert told[0].tolist() == pytest.approx([place.t - 1] * 2)
    assert place.t != round(place.t)


def test_log_prior():
    z = points(4, 6).reshape(4, 2, 3)
    normal = torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(ode_of(ocm.flow()).log_prior(z), normal.log_prob(z).sum((1, 2)))
