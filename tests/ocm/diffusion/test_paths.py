"""Every path and prediction type against the closed forms of Gaussian and mixture data."""

import itertools
import math

import pytest
import torch
from path_denoiser import (
    DATA,
    FEATURES,
    PATHS,
    SHAPE,
    WITHOUT_SIGNAL,
    combinations,
    gaussian,
    path_denoiser,
    scales,
    schedule_of,
)

import hessdiag
import ocm
from ocm.diffusion import draws

BATCH = 3
N = 1000


def places(schedule):
    """Both ends and the middle."""
    return [0.25, 333.3, 999.9, N] if schedule.is_continuous else [1, 500, N]


def noisy_data(data, schedule, t):
    """x_t of some samples of the data, (B, D)."""
    generator = torch.Generator().manual_seed(int(t))
    shape = (BATCH, FEATURES)
    z, n = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = data.mean + z @ torch.linalg.cholesky(data.covariance).T
    return schedule.alpha(t) * x0 + schedule.sigma(t) * n


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def closed_form(data, schedule, x, t):
    alpha, sigma = (scale(t).expand(len(x)) for scale in (schedule.alpha, schedule.sigma))
    return data.posterior(x, alpha, sigma)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(("path", "prediction_type"), combinations())
def test_every_covariance_is_that_of_the_closed_form(path, prediction_type, name):
    data = DATA[name]()
    denoiser = path_denoiser(data, path, prediction_type)
    schedule = denoiser.schedule
    for t in places(schedule):
        x = noisy_data(data, schedule, t)
        mean, covariance = closed_form(data, schedule, x, t)
        variance = covariance.diagonal(dim1=1, dim2=2)
        x_t = x.reshape(BATCH, *SHAPE)
        prediction = denoiser.predict(x_t, t)
        assert relative(prediction.x0_hat.flatten(1), mean) < 1e-5

        def diagonal(of, prediction=prediction):
            return of.at(prediction).diagonal().flatten(1)

        assert relative(diagonal(ocm.Exact(denoiser)), variance) < 1e-5
        coloring = hessdiag.Coloring(FEATURES)  # a color for each feature
        colored = ocm.Hutchinson(denoiser, FEATURES, probes=coloring, floor=None)
        assert relative(diagonal(colored), variance) < 1e-5

        probed = ocm.Hutchinson(denoiser, 4, seed=3, floor=None)
        v = hessdiag.Rademacher().draw(
            (4, *x_t.shape), 3, probe_offset=4 * draws.of_level(t), sample_offset=0,
            dtype=torch.float64, device=x.device,
        ).flatten(2)  # fmt: skip
        by_hand = (v * torch.einsum("bij,mbj->mbi", covariance, v)).mean(0)
        assert relative(diagonal(probed), by_hand) < 1e-5

        z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0)).double()
        product = torch.einsum("bij,bj->bi", covariance, z.flatten(1))
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors @ (values.clamp(min=0).sqrt()[..., None] * vectors.mT)
        noise = torch.einsum("bij,bj->bi", root, z.flatten(1))
        for of in (ocm.Full(denoiser), ocm.Lanczos(denoiser, FEATURES)):
            stated = of.at(prediction)
            assert relative(stated.multiply(z).flatten(1), product) < 1e-5
            assert relative(stated.noise(z).flatten(1), noise) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_alpha_sigma_and_time_are_those_of_the_family(path):
    schedule = schedule_of(path, "sample")
    for t in places(schedule):
        alpha, sigma = scales(path, schedule.time(torch.as_tensor(t, dtype=torch.float64)))
        assert schedule.alpha(t).item() == pytest.approx(alpha.item(), rel=1e-9, abs=1e-15)
        assert schedule.sigma(t).item() == pytest.approx(sigma.item(), rel=1e-9)
    assert (schedule.alpha(0).item(), schedule.sigma(0).item()) == (1.0, 0.0)
    assert schedule.has_signal(N) == (path not in WITHOUT_SIGNAL)


@pytest.mark.parametrize("path", PATHS)
def test_no_digits_are_lost_at_either_end(path):
    """1 - SNR_t / SNR_s of neighbours, and SNR itself, against 50 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    schedule = schedule_of(path, "sample")

    def exact(t):
        u = mpmath.mpf(t) / N
        if path == "linear":
            step = (mpmath.mpf("0.02") - mpmath.mpf("0.0001")) / (N - 1)
            product = mpmath.mpf(1)
            for k in range(t):
                product *= 1 - (mpmath.mpf("0.0001") + k * step)
            return product / (1 - product)
        if path == "vp":
            alpha_bar = mpmath.exp(-u * (mpmath.mpf("0.1") + mpmath.mpf("19.9") * u / 2))
            return alpha_bar / (1 - alpha_bar)
        if path == "flow":
            return ((1 - u) / u) ** 2
        if path == "edm":
            low, high = (
                mpmath.mpf("0.002") ** (mpmath.mpf(1) / 7),
                mpmath.mpf(80) ** (mpmath.mpf(1) / 7),
            )
            return (low + (mpmath.mpf(t) - 1) / (N - 1) * (high - low)) ** -14
        angle = mpmath.pi / 2 * u
        scale = 1 if path == "zero_snr" else mpmath.mpf("0.5")
        return (mpmath.cos(angle) / (scale * mpmath.sin(angle))) ** 2

    for s, t in [(1, 2), (500, 501), (998, 999)]:
        lost = 1 - exact(t) / exact(s)
        tolerance = 1e-9 if path == "zero_snr" else 1e-11  # whose betas are rounded near 1
        assert schedule.beta(s, t) == pytest.approx(
            float(lost) * schedule.sigma(t).item() ** 2, rel=tolerance
        )
        assert schedule.log_snr(t).exp().item() == pytest.approx(float(exact(t)), rel=tolerance)


@pytest.mark.parametrize("path", [p for p in PATHS if PATHS[p]().is_continuous])
def test_timesteps_are_found_by_their_noise(path):
    schedule = PATHS[path]()
    t = torch.tensor([0.3, 17.2, 500.0, 999.5], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_of(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    found = ocm.timesteps_at(schedule, [*schedule.sigma(t).flip(0).tolist(), 0.0])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), t, rtol=1e-9, atol=1e-9)


def test_shifts_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    found = ocm.shifted([1.0, 0.7, 0.2], 3.0)
    torch.testing.assert_close(static.sigmas[:-1].double(), found, rtol=1e-6, atol=0)
    times = ocm.timesteps_at(ocm.flow(), static.sigmas)
    assert times == pytest.approx(static.timesteps.flip(0).tolist(), rel=1e-6)

    # mu as pipeline_flux.py computes it from the number of tokens
    slope = (1.15 - 0.5) / (4096 - 256)
    for tokens in (256, 1024, 4096):
        mu = tokens * slope + 0.5 - slope * 256
        dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        dynamic.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=mu)
        found = ocm.shifted([1.0, 0.7, 0.2], ocm.dynamic_shift(tokens))
        torch.testing.assert_close(dynamic.sigmas[:-1].double(), found, rtol=1e-6, atol=0)


def test_spacings_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    for spacing, ours in (
        ("trailing", ocm.trailing_timesteps),
        ("leading", ocm.leading_timesteps),
    ):
        for K in (1, 3, 7, 10, 50):
            scheduler = DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(K)
            theirs = [t + 1 for t in scheduler.timesteps.flip(0).tolist()]
            assert ours(ocm.linear(), K) == theirs


def test_a_path_of_functions():
    """The straight path, written by hand, is that of flow()."""
    data = gaussian()
    straight = ocm.Schedule("mine", N, lambda t: (1 - t / N, t / N), data_std=0.5)
    theirs = path_denoiser(data, "flow", "flow_prediction")
    mine = ocm.Denoiser(
        theirs.backbone, straight, "flow_prediction", theirs.architecture, data.covariance
    )
    arguments = ((2, *SHAPE), 5)
    one, other = (
        ocm.sample(denoiser, ocm.Full(denoiser), *arguments, x0_range=None)
        for denoiser in (theirs, mine)
    )
    torch.testing.assert_close(one, other)


def test_epsilon_without_signal_is_refused():
    for path in WITHOUT_SIGNAL:
        with pytest.raises(ValueError, match=r"must not be 'epsilon'.*rescale_betas_zero_snr=True"):
            path_denoiser(gaussian(), path, "epsilon")


def test_without_signal_the_data_are_asked_for():
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    bare = ocm.Denoiser(
        denoiser.backbone, denoiser.schedule, "flow_prediction", denoiser.architecture
    )
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    for covariance in (ocm.Exact(bare), ocm.Full(bare), ocm.Hutchinson(bare, 2)):
        with pytest.raises(ValueError, match=r"data_covariance must be given.*x0\.var\(0\)"):
            covariance.at(bare.predict(x, N))
        covariance.at(bare.predict(x, 999.5))
    wrong = ocm.Denoiser(
        denoiser.backbone, denoiser.schedule, "flow_prediction", denoiser.architecture,
        torch.ones(3),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"data_covariance must be a number, or of shape .*\(3,\)"):
        ocm.Exact(wrong).at(wrong.predict(x, N))


@pytest.mark.parametrize("given", ["number", "variances"])
def test_variances_of_the_data_will_do(given):
    data = gaussian()
    full = path_denoiser(data, "flow", "flow_prediction")
    variances = data.covariance.diagonal().reshape(SHAPE)
    value = 0.25 if given == "number" else variances
    denoiser = ocm.Denoiser(
        full.backbone, full.schedule, "flow_prediction", full.architecture, value
    )
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    found = ocm.Exact(denoiser).at(denoiser.predict(x, N)).diagonal()
    torch.testing.assert_close(found, torch.as_tensor(value).double().expand(2, *SHAPE))


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (0, ValueError, r"t must lie in \(0, 1000\], got 0"),
        (1000.5, ValueError, r"t must lie in \(0, 1000\], got 1000.5"),
        ("half", TypeError, "t must be a number or a tensor, got str"),
    ],
)
def test_timesteps_outside_a_path(t, error, message):
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    with pytest.raises(error, match=message):
        denoiser.predict(torch.zeros(2, *SHAPE), t)


def test_a_discrete_schedule_has_whole_timesteps():
    denoiser = path_denoiser(gaussian(), "linear", "epsilon")
    for t in (2.5, torch.tensor([2.5, 3.0])):
        with pytest.raises(TypeError, match=r"t must be whole on the discrete schedule .*2\.5"):
            denoiser.predict(torch.zeros(2, *SHAPE), t)


def test_a_network_may_be_asked_between_the_timesteps_of_a_discrete_schedule():
    """As solvers of diffusers do: it is told t - 1, whatever t is."""
    told = []

    def network(x, time):
        told.append(time)
        return x

    denoiser = ocm.Denoiser(network, ocm.linear())
    denoiser.output(torch.zeros(2, 3), torch.tensor([2.5, 3.0]))
    denoiser.output(torch.zeros(2, 3), 7)
    assert [time.tolist() for time in told] == [[1.5, 2.0], [6, 6]]
    assert told[1].dtype == torch.int64
    preconditioned = path_denoiser(gaussian(), "linear", "edm")
    with pytest.raises(TypeError, match="t must be whole"):
        preconditioned.output(torch.zeros(2, *SHAPE), torch.tensor([2.5, 3.0]))


def test_draws_of_timesteps_are_told_apart():
    times = [1, 2, 1000, 0.5, 1.5, 999.25, 999.251]
    numbers = [draws.of_level(t) for t in times]
    assert len(set(numbers)) == len(times)
    assert draws.of_level(7.0) == draws.of_level(7) == 7
    assert math.log2(max(numbers) * 2000) < 32  # with 2,000 probes they still fit the contract


def test_no_two_uses_of_a_seed_share_a_step():
    """Levels of N = 4,000, and a million draws, fit between each two."""
    room = max(draws.of_level(3999.999), 10**6)
    first = [draws.START, draws.X0, draws.MEASUREMENT, draws.DECODED, draws.FITTING]
    first += [draws.DEQUANTISATION, draws.CHAINS]
    assert all(b - a > room for a, b in itertools.pairwise(first))
    single = [draws.CHAINS, draws.CLASSES, draws.ENCODER, draws.MIXTURE, draws.TRAINING]
    assert single == [*range(2**32 - 5, 2**32)]
