"""What rounding costs in float32, bfloat16 and float16, against float64, and that it stays so.

The bounds are about three times what was measured, so that they hold on other processors.
docs/explanations/numerics.md quotes them.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from gaussian_on_paths import Gaussian
from told import told_denoiser
from torch import nn

import ocm
from hessdiag.kernels import StepCoefficients, gaussian_step, normal
from ocm.covariances.learned.parameterisation import BOUNDED, PAPER
from ocm.diffusion.predictions import coefficients, target
from ocm.diffusion.tables import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PATHS = {
    "linear": "epsilon",
    "cosine": "epsilon",
    "vp": "epsilon",
    "flow": "flow_prediction",
    "edm": "edm",
    "trigflow": "trigflow",
}
NUMBERS = (10, 1000, 4000)
STD = 0.5  # of the data
DOCUMENT = Path(__file__).parents[2] / "docs" / "explanations" / "numerics.md"


def schedules():
    for path in PATHS:
        for N in NUMBERS:
            yield path, getattr(ocm, path)(N)


def timesteps(schedule):
    """Both ends, what lies next to them, and the middle."""
    N = schedule.num_timesteps
    whole = [1, 2, N // 2, N - 1, N]
    return [1e-6, 1e-3, 0.5, *whole] if schedule.is_continuous else whole


def steps(schedule):
    """Steps (s, t): to the data, between neighbours at both ends, and over all of the path."""
    places = [0, *timesteps(schedule)]
    N = schedule.num_timesteps
    return [*itertools.pairwise(places), (0, N), (1, N)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def rms(x):
    return x.double().square().mean().sqrt().item()


def rounded(x):
    """Numbers that all types hold."""
    return x.to(torch.bfloat16).to(torch.float16).double()


class Worst:
    """The largest error and where it was."""

    def __init__(self):
        self.error, self.place = 0.0, ""

    def add(self, error, place):
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.place = error, place


def noisy(schedule, t):
    """x0, noise and x_t in float64."""
    x0, noise = STD * numbers(2, 64), numbers(2, 64, seed=1)
    alpha, sigma, *_ = schedule.level(t)
    return x0, noise, alpha * x0 + sigma * noise


def output_of(kind, schedule, t, x0, noise):
    scales = schedule.alpha(t), schedule.sigma(t)
    return target(kind, *scales, x0, noise, schedule.data_std)


def x0_of(kind, dtype):
    """x0_hat of a network that is right but for the rounding of its output, over x0."""
    worst = Worst()
    for path, schedule in schedules():
        if kind == "epsilon" and not schedule.has_signal(schedule.num_timesteps):
            continue
        for t in timesteps(schedule):
            x0, noise, x_t = noisy(schedule, t)
            output = output_of(kind, schedule, t, x0, noise).to(dtype)
            denoiser = ocm.Denoiser(lambda x, time, output=output: output, schedule, kind)
            alpha, sigma, *_ = schedule.level(t)
            size = rms(x0) * (1 + sigma / alpha if kind == "epsilon" else 1)
            for place in (t, torch.full((2,), t)):
                found = denoiser.predict(x_t.to(dtype), place).x0_hat
                worst.add(
                    rms(found.double() - x0) / size,
                    f"{path}, N = {schedule.num_timesteps}, t = {t}",
                )
    return worst


def step_of(dtype):
    """x_s of a whole step of any sampler, over x_s."""
    samplers = [ocm.ddpm, partial(ocm.ddim, eta=0.5), ocm.renoised]
    worst = Worst()
    for path, schedule in schedules():
        kind = PATHS[path]
        for s, t in steps(schedule):
            x0, noise, x_t = noisy(schedule, t)
            output = output_of(kind, schedule, t, x0, noise)
            x_t, output = x_t.to(dtype), output.to(dtype)
            scales = schedule.alpha(t), schedule.sigma(t)
            p, q, _ = (c.item() for c in coefficients(kind, *scales, schedule.data_std))
            z = normal(x_t.shape, 3, step=7).double()
            for sampler in samplers:
                a, b, variance = sampler(schedule, s, t)
                found = gaussian_step(
                    x_t, output, 0.3, StepCoefficients(p, q, a, b, variance, b**2), seed=3, step=7,
                    x0_range=(-1.0, 1.0),
                )  # fmt: skip
                x0_hat = (p * x_t.double() + q * output.double()).clamp(-1, 1)
                std = math.sqrt(variance + b**2 * 0.3)
                expected = a * x_t.double() + b * x0_hat + std * z
                # x0_hat of noise is a difference of two terms 1 / alpha in size.
                size = rms(expected) + b * p * rms(x_t)
                worst.add(
                    rms(found.double() - expected) / size,
                    f"{path}, N = {schedule.num_timesteps}, s = {s}, t = {t}",
                )
    return worst


@dataclass(frozen=True)
class Case:
    """A step (s, t), where a network and a head put out x0 and o of the type of x_t."""

    schedule: ocm.Schedule
    s: float
    t: float
    x0: torch.Tensor
    x_t: torch.Tensor
    o: torch.Tensor

    @property
    def denoiser(self):
        return told_denoiser(self.x0, self.o, self.schedule)

    @property
    def noise_to_signal(self):
        alpha, sigma, *_ = self.schedule.level(self.t)
        return (sigma / alpha) ** 2 if alpha > 0 else math.inf

    @property
    def unit(self):
        return Gaussian(self.schedule, STD**2).posterior_variance(self.t)


def softplus(o):
    return torch.log1p(torch.exp(o.double() + math.log(math.e - 1)))


def beta_bar(schedule, t):
    return Gaussian(schedule, 1.0).posterior_variance(t)


def interpolated(schedule, s, t, o):
    """((beta_bar_t / beta_bar_s)^v - 1) / (SNR_s - SNR_t)."""
    (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = schedule.level(s), schedule.level(t)
    change = math.log(beta_bar(schedule, t) / beta_bar(schedule, s))
    snr = (alpha_s / sigma_s) ** 2 - (alpha_t / sigma_t) ** 2
    return torch.expm1((1 + o.double()) / 2 * change) / snr


# Each returns a covariance, what it should state, and what the error is relative to; or None.


def of_beta(case):
    expected = beta_bar(case.schedule, case.t)
    return ocm.Beta(case.denoiser), expected, expected


def of_analytic(case):
    table = Table({0: [0.3], case.schedule.num_timesteps: [0.3]})
    expected = 0.3 * beta_bar(case.schedule, case.t)
    return ocm.Analytic(case.denoiser, table), expected, expected


def of_bounded(case):
    expected = case.unit * softplus(case.o)
    return ocm.NPR(case.denoiser, nn.Identity(), BOUNDED), expected, expected


def of_paper(case):
    if math.isinf(case.noise_to_signal):
        return None
    covariance = ocm.OptimalCovarianceMatching(case.denoiser, nn.Identity(), PAPER)
    return covariance, case.noise_to_signal * (1 + case.o.double()), case.noise_to_signal


def of_interpolated(case):
    if case.s == 0 or math.isinf(case.noise_to_signal):
        return None
    expected = interpolated(case.schedule, case.s, case.t, case.o)
    covariance = ocm.ImprovedDDPM(case.denoiser, nn.Identity(), PAPER)
    return covariance, expected, expected.abs() + 0.05 * case.noise_to_signal


def of_second_moments(case):
    if case.t < 1:  # float32 cannot hold such a difference
        return None
    alpha, sigma, *_ = case.schedule.level(case.t)
    mean = alpha * case.unit / sigma**2 * case.x_t.double()
    terms = case.unit * softplus(case.o), (case.x0.double() - mean).square()
    covariance = ocm.SN(case.denoiser, nn.Identity(), BOUNDED)
    return covariance, terms[0] - terms[1], terms[0] + terms[1]


def covariance_of(stated_by, dtype):
    """The stated variances."""
    worst = Worst()
    o = (0.5 * numbers(2, 64, seed=2)).to(dtype)
    for path, schedule in schedules():
        for s, t in steps(schedule):
            x0, _, x_t = noisy(schedule, t)
            case = Case(schedule, s, t, x0.to(dtype), x_t.to(dtype), o)
            if (found := stated_by(case)) is None:
                continue
            covariance, expected, size = found
            stated = covariance.at(case.denoiser.predict(case.x_t, t, s=s)).diagonal().double()
            error = ((stated - expected) / size).abs().max().item()
            worst.add(error, f"{path}, N = {schedule.num_timesteps}, s = {s}, t = {t}")
    return worst


def trajectories(schedule):
    N = schedule.num_timesteps
    return [(1, 2, N // 2, N - 1, N), (0.01, 1, N) if schedule.is_continuous else (1, N)]


@cache
def bounds(dtype):
    """The bound of continuous data for every path and trajectory."""
    x0, found = rounded(STD * numbers(2, 16)).to(dtype), {}
    for path, schedule in schedules():
        law = Gaussian(schedule, STD**2)
        for places in trajectories(schedule):
            found[f"{path}, N = {schedule.num_timesteps}, {places}"] = ocm.bits_per_dim(
                law.denoiser(PATHS[path]), law, x0, places, levels=None, x0_range=None, seed=5
            )
    return found


def bound_of(dtype):
    """Each term of the bound, in bits/dim, over 1 + its size."""
    worst = Worst()
    for place, expected in bounds(torch.float64).items():
        found = bounds(dtype)[place]
        for part in ("prior", "steps", "decoder"):
            one, other = getattr(found, part).double(), getattr(expected, part)
            worst.add(((one - other).abs() / (1 + other.abs())).max().item(), place)
    return worst


@cache
def log_likelihoods(dtype):
    x = rounded(STD * numbers(2, 3)).to(dtype)
    settings = ocm.LikelihoodSettings(num_steps=2, probes="exact")
    return {
        path: ocm.log_likelihood(
            Gaussian(getattr(ocm, path)(), STD**2).denoiser(PATHS[path]), x, settings
        ).bits_per_dim
        for path in PATHS
    }


def log_likelihood_of(dtype):
    """In bits/dim."""
    worst = Worst()
    for place, expected in log_likelihoods(torch.float64).items():
        worst.add((log_likelihoods(dtype)[place] - expected).abs().max().item(), place)
    return worst


# By quantity: how it is measured, what the error is relative to, the bounds of the types in
# order, and where the largest was measured.
BUDGET = {
    "x0_hat of epsilon": (partial(x0_of, "epsilon"), "(1 + σ/α) x0", (5e-7, 2e-2, 2e-3), "any t"),
    "x0_hat of sample": (partial(x0_of, "sample"), "x0", (1e-7, 5e-3, 6e-4), "any t"),
    "x0_hat of v_prediction": (
        partial(x0_of, "v_prediction"),
        "x0",
        (3e-7, 1e-2, 1.2e-3),
        "the middle",
    ),
    "x0_hat of flow_prediction": (
        partial(x0_of, "flow_prediction"),
        "x0",
        (5e-7, 2e-2, 2e-3),
        "t = N of edm",
    ),
    "x0_hat of edm": (partial(x0_of, "edm"), "x0", (3e-7, 1e-2, 1.2e-3), "the middle"),
    "x0_hat of trigflow": (partial(x0_of, "trigflow"), "x0", (3e-7, 1e-2, 1.2e-3), "the middle"),
    "x_s of a step": (step_of, "x_s and its terms", (2e-7, 6e-3, 8e-4), "any t"),
    "Beta": (partial(covariance_of, of_beta), "itself", (2e-7, 2e-7, 2e-7), "any t"),
    "Analytic": (partial(covariance_of, of_analytic), "itself", (2e-7, 2e-7, 2e-7), "any t"),
    "head, BOUNDED": (partial(covariance_of, of_bounded), "itself", (6e-7, 6e-7, 6e-7), "any t"),
    "head, PAPER": (partial(covariance_of, of_paper), "σ²/α²", (1e-6, 1e-6, 1e-6), "any t"),
    "ImprovedDDPM": (
        partial(covariance_of, of_interpolated),
        "σ²/α²",
        (4e-6, 4e-6, 4e-6),
        "long steps to little noise",
    ),
    "SN": (
        partial(covariance_of, of_second_moments),
        "its two terms",
        (1.5e-3, 1.5e-3, 1.5e-3),
        "t = 1, σ = 2.5e-4",
    ),
    "terms of the bound": (bound_of, "1 + bits/dim", (3e-4, 3e-4, 3e-4), "σ = 1e-5"),
    "log-likelihood": (log_likelihood_of, "1 bit/dim", (3e-5, 3e-5, 3e-5), "vp"),
}


def written(number):
    """A bound as the document writes it."""
    mantissa, exponent = f"{number:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def table():
    """The budget in aligned columns, as the document shows it."""
    head = ["", "relative to", *DTYPES, "largest at"]
    rows = [[name, of, *map(written, bounds), at] for name, (_, of, bounds, at) in BUDGET.items()]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [zip(row, widths, strict=True) for row in (head, *rows)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in line).rstrip() for line in lines)


@pytest.mark.parametrize("number", range(len(DTYPES)), ids=DTYPES)
@pytest.mark.parametrize("quantity", BUDGET)
def test_the_error_is_within_its_budget(quantity, number):
    measure, _, bounds, _ = BUDGET[quantity]
    worst = measure([*DTYPES.values()][number])
    assert worst.error <= bounds[number], (worst.error, worst.place)


def test_the_document_quotes_the_budget():
    assert f"```text\n{table()}\n```" in DOCUMENT.read_text(encoding="utf-8")


def test_a_variance_of_little_noise_is_not_zero_in_half_precision():
    """float16 holds no number between 0 and 6e-8."""
    schedule, x = ocm.flow(), torch.zeros(2, 3, dtype=torch.float16)
    denoiser = ocm.Denoiser(lambda x, time: x, schedule, "flow_prediction")
    stated = ocm.Beta(denoiser).at(denoiser.predict(x, 0.01)).diagonal()
    torch.testing.assert_close(
        stated.double(), torch.full((1, 1), 1e-10).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draws_by_products_alone_work_in_half_precision(dtype, symmetric):
    """They failed on eigenvectors, which PyTorch has for float32 alone."""
    schedule, x = ocm.flow(), rounded(numbers(2, 1, 2, 2))
    denoiser = ocm.Denoiser(lambda x, time: 0.5 * x, schedule, "flow_prediction")
    covariance, z = ocm.Lanczos(denoiser, 4, symmetric), rounded(numbers(2, 1, 2, 2, seed=1))
    draws = [
        covariance.at(denoiser.predict(x.to(kind), 500)).bounded(None).noise(z.to(kind))
        for kind in (dtype, torch.float64)
    ]
    torch.testing.assert_close(draws[0].double(), draws[1], rtol=1e-2, atol=1e-2)


def test_x0_of_noise_is_finite_in_half_precision_where_alpha_is_small():
    """1 / alpha exceeds what float16 holds, and infinity minus infinity was NaN."""
    schedule = ocm.cosine(4000)
    assert 1 / schedule.level(4000).alpha > torch.finfo(torch.float16).max
    x = torch.ones(1, 3, dtype=torch.float16)
    denoiser = ocm.Denoiser(lambda x, time: 0.5 * x, schedule)
    for t in (4000, torch.tensor([4000])):
        assert not bool(denoiser.predict(x, t).x0_hat.isnan().any())


def test_interpolated_variances_keep_their_digits_in_half_precision():
    """They were infinite, or 12 times what they are."""
    schedule, o = ocm.edm(), torch.zeros(1, 3, dtype=torch.float16)
    denoiser = told_denoiser(o, o, schedule)
    covariance = ocm.ImprovedDDPM(denoiser, nn.Identity(), PAPER)
    for t in (2, torch.tensor([2.0])):
        stated = covariance.at(denoiser.predict(o, t, s=1)).diagonal().double()
        expected = interpolated(schedule, 1, 2, o.double())
        torch.testing.assert_close(stated, expected, rtol=1e-4, atol=0)


if __name__ == "__main__":
    for quantity, (measure, *_) in BUDGET.items():
        for name, dtype in DTYPES.items():
            worst = measure(dtype)
            print(f"{quantity:28} {name:9} {worst.error:.1e}  {worst.place}", flush=True)
