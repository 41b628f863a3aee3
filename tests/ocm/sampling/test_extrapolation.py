"""Steps of second order against diffusers' DPM-Solver++ and on Gaussian data in closed form."""

import itertools
import math

import pytest
import torch
from one_device import one_device
from path_denoiser import FEATURES, PATHS, SHAPE, gaussian, mixture, path_denoiser
from small_backbone import small_denoiser

import ocm
from hessdiag.kernels import normal
from ocm.diffusion import draws
from ocm.sampling import extrapolation, samplers
from ocm.sampling.extrapolation import weight

TYPES = {
    "linear": "v_prediction",
    "zero_snr": "v_prediction",
    "vp": "sample",
    "flow": "flow_prediction",
    "edm": "edm",
    "trigflow": "trigflow",
}


class Nothing(ocm.Full):
    """A zero covariance of the same kind as the full one."""

    def at(self, prediction):
        return super().at(prediction).affine(0.0, 0.0)


def diffusers_samples(scheduler, denoiser, timesteps, shape, seed):
    """What DPM-Solver++ makes of ocm's starting noise and ocm's noise of each step."""
    x = samplers.starting_noise(denoiser, shape, timesteps[-1], seed, 0).double()
    for t, told in zip(timesteps[::-1], scheduler.timesteps, strict=True):
        output = denoiser.predict(x, t).output
        z = normal(shape, seed, step=draws.of_level(t), sample_offset=0, device=x.device)
        x = scheduler.step(output, told, x, variance_noise=z.double()).prev_sample
    return x


def drawn(denoiser, covariance, timesteps, eta, **options):
    options = {"x0_range": None, "dtype": torch.float64, "seed": 5} | options
    shape = options.pop("shape", (6, *SHAPE))
    sampler = options.pop("sampler", ocm.SecondOrder(eta=eta))
    return ocm.sample(denoiser, covariance, shape, timesteps, sampler=sampler, **options)


# The limit without a covariance


@pytest.mark.parametrize(("eta", "kind"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("timesteps", [[200, 400, 600, 800, 1000], [5, 90, 333, 700, 720, 999]])
def test_without_a_covariance_it_is_dpm_solver(eta, kind, timesteps):
    from diffusers import DPMSolverMultistepScheduler

    denoiser = path_denoiser(mixture(), "linear", "epsilon")
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist(),
        algorithm_type=kind,
    )
    scheduler.set_timesteps(timesteps=[t - 1 for t in timesteps[::-1]])
    theirs = diffusers_samples(scheduler, denoiser, timesteps, (6, *SHAPE), 5)
    ours = drawn(denoiser, ocm.BetaTilde(denoiser), timesteps, eta)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    first_order = drawn(denoiser, ocm.BetaTilde(denoiser), timesteps, eta, sampler=ocm.ddim)
    assert (first_order - theirs).norm() > 1e-2 * theirs.norm()


@pytest.mark.parametrize(("eta", "kind"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_without_a_covariance_it_is_dpm_solver_on_a_flow(eta, kind):
    from diffusers import DPMSolverMultistepScheduler

    denoiser = path_denoiser(mixture(), "flow", "flow_prediction")
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type=kind
    )
    scheduler.set_timesteps(6)
    timesteps = [1000 * sigma for sigma in scheduler.sigmas.double().tolist()[-2::-1]]
    theirs = diffusers_samples(scheduler, denoiser, timesteps, (6, *SHAPE), 5)
    ours = drawn(denoiser, ocm.BetaTilde(denoiser), timesteps, eta)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


# Gaussian data


def weight_of(schedule, s, t, p, k, eta):
    """W, and w0 of DPM-Solver++."""
    log_snr = [schedule.log_snr(u).item() for u in (s, t, p)]
    w0 = (log_snr[0] - log_snr[1]) / (log_snr[1] - log_snr[2]) / 2
    W = weight(
        torch.tensor([k], dtype=torch.float64), ocm.ddim(schedule, s, t, eta=eta),
        alpha_t=schedule.alpha(t).item(), q=math.exp(log_snr[2] - log_snr[1]), w0=w0, eta=eta,
    )  # fmt: skip
    return W.item(), w0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("times", [(100, 300, 450), (400, 600, 1000), (700, 800, 900), (1, 2, 400)])
def test_x_s_has_the_variance_of_the_data(path, eta, times):
    """In one dimension, where x_p and x_t have theirs, and x_t drew lambda alone.

    The variance is that of a x_t + b D by the covariance of (x_p, x_t).
    """
    schedule = PATHS[path]()
    alpha, sigma = ([scale(u).item() for u in times] for scale in (schedule.alpha, schedule.sigma))
    s, t, p = times
    a, b, noise = ocm.ddim(schedule, s, t, eta=eta)
    last_noise = ocm.ddim(schedule, t, p, eta=eta).noise_variance
    for variance in (1e-4, 0.01, 0.3, 4.0):
        V_s, V_t, V_p = (x**2 * variance + y**2 for x, y in zip(alpha, sigma, strict=True))
        gain_t, gain_p = alpha[1] * variance / V_t, alpha[2] * variance / V_p
        k = (alpha[1] / sigma[1]) ** 2 * variance * sigma[1] ** 2 / V_t  # SNR_t Cov
        W, _ = weight_of(schedule, s, t, p, k, eta)
        together = math.sqrt((V_t - last_noise) * V_p)
        of_p, of_t = -b * W * gain_p, a + b * (1 + W) * gain_t
        found = of_p**2 * V_p + 2 * of_p * of_t * together + of_t**2 * V_t + noise
        assert W > 0
        assert found == pytest.approx(V_s, rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1e-6, 0.02, 0.5, 0.98, 1.0, 1.7])
def test_short_steps_are_those_of_dpm_solver(k, eta):
    """W -> w0 for every covariance."""
    ratios = []
    for length in (8.0, 4.0, 2.0):
        W, w0 = weight_of(ocm.flow(), 500.0 - length, 500.0, 500.0 + 1.5 * length, k, eta)
        ratios.append(abs(W / w0 - 1))
    assert ratios[0] < 0.1
    assert ratios[1] < 0.6 * ratios[0]
    assert ratios[2] < 0.6 * ratios[1]


def test_long_steps_go_further_in_noise_and_less_far_near_the_data():
    for eta in (0.0, 1.0):
        found = [weight_of(ocm.flow(), 300, 600, 900, k, eta) for k in (1e-3, 0.3, 0.7, 0.999)]
        sizes, w0 = [W for W, _ in found], found[0][1]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > w0 > sizes[-1]


@pytest.mark.parametrize("path", ["vp", "flow", "edm"])
def test_it_follows_the_ode_of_gaussian_data(path):
    """From the second step on each sample keeps its place in units of the spread."""
    data = gaussian()
    denoiser = path_denoiser(data, path, TYPES[path])
    schedule, timesteps = denoiser.schedule, [150.0, 300.0, 550.0, 800.0]
    values, vectors = torch.linalg.eigh(data.covariance)

    def spread(t):
        return (schedule.alpha(t) ** 2 * values + schedule.sigma(t) ** 2).sqrt()

    def flown(x, t, s):
        away = (x - schedule.alpha(t) * data.mean) @ vectors
        return schedule.alpha(s) * data.mean + (away / spread(t) * spread(s)) @ vectors.T

    x_p = torch.randn(5, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_p = schedule.alpha(800) * data.mean + (x_p * spread(800)) @ vectors.T
    run = ocm.SecondOrder().start()
    covariance, states = ocm.Full(denoiser), [x_p]
    for t, s in itertools.pairwise(timesteps[::-1]):
        prediction = denoiser.predict(states[-1].reshape(5, *SHAPE), t, s=s)
        x_s = run(
            prediction, covariance.at(prediction), seed=0, x0_range=None, max_noise_std=None
        ).flatten(1)
        expected = flown(states[-1], t, s)
        if t != 800.0:
            assert (x_s - expected).abs().max() < 1e-9
        states.append(expected)  # the first step draws noise


def one_by_one(monkeypatch, timesteps):
    """Let every draw of a run be the unit vectors in turn, in rows of their own; row 0 has none."""
    order = {draws.START: 0} | {draws.of_level(t): 1 + i for i, t in enumerate(timesteps)}

    def unit(shape, seed, *, step, sample_offset, device):
        z = torch.zeros(shape, dtype=torch.float64)
        first = 1 + order[step] * FEATURES
        z.flatten(1)[first : first + FEATURES] = torch.eye(FEATURES, dtype=torch.float64)
        return z

    monkeypatch.setattr(samplers, "normal", unit)
    monkeypatch.setattr(extrapolation, "normal", unit)
    return 1 + len(order) * FEATURES


def moments(monkeypatch, denoiser, covariance, timesteps, sampler):
    """Mean and covariance of what ocm.sample draws where it is affine in its noise."""
    rows = one_by_one(monkeypatch, timesteps)
    x = ocm.sample(
        denoiser, covariance, (rows, *SHAPE), timesteps, sampler=sampler, x0_range=None,
        noise_at_end=True, dtype=torch.float64,
    ).flatten(1)  # fmt: skip
    return x[0], (x[1:] - x[0]).T @ (x[1:] - x[0])


@pytest.mark.parametrize(("eta", "bound"), [(0.0, 1e-3), (0.3, 1e-3), (1.0, 0.01)])
@pytest.mark.parametrize("path", PATHS)
def test_moments_of_gaussian_data_in_few_steps(monkeypatch, path, eta, bound):
    data = gaussian()
    denoiser = path_denoiser(data, path, TYPES[path])
    for K in (2, 3, 5, 10):
        timesteps = ocm.trailing_timesteps(denoiser.schedule, K)

        def error(covariance, timesteps=timesteps):
            mean, found = moments(
                monkeypatch, denoiser, covariance, timesteps, ocm.SecondOrder(eta=eta)
            )
            # A path with signal at N does not start from its own x_N.
            assert (mean - data.mean).norm() < 0.05
            return (found - data.covariance).norm() / data.covariance.norm()

        full, without = error(ocm.Full(denoiser)), error(Nothing(denoiser))
        assert full < (1e-3 if K == 2 else bound)
        assert full < 0.7 * without


# The contract, and the options of ocm.sample


def test_sample_i_is_the_same_in_any_batch_and_seeds_differ():
    denoiser = path_denoiser(mixture(), "flow", "flow_prediction")
    covariance = ocm.Hutchinson(denoiser, num_probes=2)
    for eta in (0.0, 0.6):
        whole = drawn(denoiser, covariance, 5, eta)
        part = drawn(denoiser, covariance, 5, eta, shape=(2, *SHAPE), sample_offset=4)
        torch.testing.assert_close(whole[4:], part)
        assert not torch.allclose(whole, drawn(denoiser, covariance, 5, eta, seed=6))
        torch.testing.assert_close(whole, drawn(denoiser, covariance, 5, eta))


def test_a_sampler_is_used_again_without_memory():
    denoiser = path_denoiser(mixture(), "flow", "flow_prediction")
    sampler = ocm.SecondOrder(eta=0.3)
    first, second = (drawn(denoiser, ocm.Full(denoiser), 4, 0.3, sampler=sampler) for _ in range(2))
    assert torch.equal(first, second)


def test_two_steps_are_of_first_order():
    denoiser = path_denoiser(mixture(), "vp", "sample")
    covariance = ocm.Exact(denoiser)
    once = drawn(denoiser, covariance, [300, 1000], 0.0)
    torch.testing.assert_close(
        once, drawn(denoiser, covariance, [300, 1000], 0.0, sampler=ocm.ddim)
    )


@pytest.mark.parametrize("path", PATHS)
def test_samples_in_their_range_and_in_half_precision(path):
    denoiser = path_denoiser(mixture(), path, TYPES[path])
    options = {"x0_range": (-0.1, 0.1), "dtype": torch.bfloat16}
    x = drawn(denoiser, ocm.Full(denoiser), 5, 0.3, **options)
    assert x.dtype == torch.bfloat16
    assert x.float().abs().max() <= 0.1005
    assert x.isfinite().all()


def test_x0_hat_is_clipped_before_it_is_extrapolated():
    """x0_hat is 2 in one place and 0.5 in the others, at any x_t: no difference is left."""
    place = torch.tensor([2.0, 0.5, 0.5, 0.5]).reshape(1, 2, 2)
    denoiser = ocm.Denoiser(lambda x, t: place.expand(x.shape), ocm.flow(), "sample")
    zero = ocm.BetaTilde(denoiser)
    shape = (3, 1, 2, 2)
    x = drawn(denoiser, zero, [300.0, 500.0, 800.0], 0.0, shape=shape, x0_range=(-1.0, 1.0))
    torch.testing.assert_close(x, place.clamp(max=1.0).double().expand(shape))


def test_the_last_noise_can_be_bounded():
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    steps = [2.0, 500.0, 900.0]
    fixed = ocm.Beta(denoiser)
    bounded = drawn(denoiser, fixed, steps, 1.0, max_last_noise=1e-6)
    assert not torch.allclose(bounded, drawn(denoiser, fixed, steps, 1.0))


def test_one_evaluation_a_step_under_guidance():
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        num_class_embeds=4,
    )  # fmt: skip
    denoiser, sizes = ocm.Denoiser(network, ocm.cosine()).freeze(), []
    condition = denoiser.condition(torch.tensor([0, 2]), 2.5, null_label=3)
    arguments = denoiser, ocm.Hutchinson(denoiser, 2), (2, 1, 8, 8), 4
    ocm.sample(*arguments, sampler=ocm.SecondOrder(), condition=condition)  # what vmap cannot do
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    x = ocm.sample(*arguments, sampler=ocm.SecondOrder(), condition=condition)
    assert sizes == [4] * 4
    assert x.isfinite().all()


def test_a_step_copies_nothing_from_the_host():
    """What a CUDA graph could not hold, with the device "meta" for the GPU."""
    denoiser = small_denoiser("meta")
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    sampler = ocm.SecondOrder(eta=0.5)
    with one_device():
        images = ocm.sample(
            denoiser, ocm.Beta(denoiser), (3, 2, 8, 8), [1, 400, 1000], sampler=sampler, seed=seed
        )
    assert images.is_meta


# Errors


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range(eta):
    with pytest.raises(ValueError, match=f"eta must lie in .* got {eta}"):
        ocm.SecondOrder(eta=eta)


def test_a_covariance_without_eigenvalues():
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    with pytest.raises(
        TypeError, match=r"covariance must have a density, and Lanczos.* products alone"
    ):
        drawn(denoiser, ocm.Lanczos(denoiser, 3), 4, 0.0)


def test_a_trajectory_has_no_density():
    denoiser = path_denoiser(gaussian(), "flow", "flow_prediction")
    with pytest.raises(
        TypeError, match=r"sampler must look at x_t alone .* SecondOrder\(eta=0.3\)"
    ):
        ocm.sample_trajectory(
            denoiser, ocm.Beta(denoiser), (2, *SHAPE), 3, sampler=ocm.SecondOrder(0.3)
        )


def test_the_step_before_is_remembered_as_it_was_clipped():
    """A network that says 3 where the noise is high is one that says 1."""

    def states(said):
        shown = []

        def network(x, time):
            shown.append(x.clone())
            return torch.full_like(x, said if time[0] > 700 else 0.5)

        denoiser = ocm.Denoiser(network, ocm.linear(), "sample")
        sampler, steps = ocm.SecondOrder(), [100, 400, 700, 1000]
        ocm.sample(denoiser, ocm.Beta(denoiser), (2, 1, 2, 2), steps, sampler=sampler)
        return torch.stack(shown)

    torch.testing.assert_close(states(3.0), states(1.0))
    assert (states(0.0)[2] - states(1.0)[2]).abs().max() > 1e-2
