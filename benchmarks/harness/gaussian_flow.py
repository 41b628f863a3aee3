"""Gaussian data on any path: exact networks, and the exact moments of few-step samples.

The data are N(mean, covariance). Networks are exact and written from their papers, apart from
``ocm.diffusion.predictions``; a step of a sampler is then affine, x_s = M x_t + c + noise, so that
mean and covariance of its samples follow without drawing any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ocm
from ocm.diffusion.backbones.architecture import Architecture
from ocm.diffusion.schedules import Schedule
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import reverse_steps
from ocm.sampling.samplers import Sampler, reverse_step


class Gaussian(NamedTuple):
    """N(mean, covariance) in D dimensions, float64."""

    mean: Tensor
    covariance: Tensor

    def x0_hat(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x] for x = alpha x0 + sigma n, shape (n, D); alpha, sigma are (n, 1)."""
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        marginal = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * identity
        centred = torch.linalg.solve(marginal, (x - alpha * self.mean)[..., None])
        return self.mean + alpha * (self.covariance @ centred)[..., 0]

    def posterior_covariance(self, alpha: float, sigma: float) -> Tensor:
        """Return Cov[x0 | x], the same for every x."""
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        marginal = alpha**2 * self.covariance + sigma**2 * identity
        shrunk = self.covariance @ torch.linalg.solve(marginal, self.covariance)
        return self.covariance - alpha**2 * shrunk


def correlated_gaussian(dimensions: int = 8, seed: int = 0) -> Gaussian:
    """Return a Gaussian whose covariance has variances around 1/4 and strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimensions, dimensions // 2, generator=generator, dtype=torch.float64)
    spread = 0.2 / dimensions * (factor @ factor.T)
    covariance = spread + 0.02 * torch.eye(dimensions, dtype=torch.float64)
    mean = 0.5 * torch.randn(dimensions, generator=generator, dtype=torch.float64)
    return Gaussian(mean, covariance)


class ExactNetwork(nn.Module):
    """What a perfect network of one path puts out for Gaussian data.

    It is called as ``UNet2DModel`` is, with the input and the time that its path gives it.
    """

    def __init__(self, path: str, data: Gaussian, schedule: Schedule) -> None:
        super().__init__()
        self.path, self.data, self.N = path, data, schedule.num_timesteps
        self.data_std = schedule.data_std
        self.schedule = schedule
        self.features = nn.Identity()
        self.unit = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity, noise, x0 or F of this path, shape (n, D)."""
        x, time = self.features(x), time.double()[:, None]
        exact, d = self.data.x0_hat, self.data_std
        if self.path == "flow":
            sigma = time / self.N
            x0 = exact(x, 1 - sigma, sigma)
            return (x - x0) / sigma  # E[n] - E[x0], for x = (1 - sigma) x0 + sigma n
        if self.path == "edm":
            sigma = (4 * time).exp()
            x = x * (sigma**2 + d**2).sqrt()
            c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
            return (exact(x, torch.ones_like(sigma), sigma) - c_skip * x) / c_out
        if self.path == "trigflow":
            x = x * d
            x0 = exact(x, time.cos(), d * time.sin())
            return (time.cos() * x - x0) / (d * time.sin())
        if self.path == "vp":
            alpha, sigma = _of_song(time / (self.N - 1))
            return (x - alpha * exact(x, alpha, sigma)) / sigma
        alpha_bar = self.schedule.alpha_bar[time.long() + 1]
        return exact(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def _of_song(u: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of x_u of the VP-SDE (Song et al., 2021), equation 33."""
    log_mean = -(u**2) / 4 * (beta_max - beta_min) - u / 2 * beta_min
    return log_mean.exp(), (1 - (2 * log_mean).exp()).sqrt()


# The schedule of each path, and what its network predicts.
PATHS: dict[str, tuple[Callable[[], Schedule], str]] = {
    "flow": (ocm.flow, "flow_prediction"),
    "vp": (ocm.vp, "epsilon"),
    "edm": (ocm.edm, "edm"),
    "trigflow": (ocm.trigflow, "trigflow"),
    "linear": (ocm.linear, "sample"),
}
_EXACT = Architecture("ExactNetwork", "features", lambda network, x, time, labels: network(x, time))


def exact_denoiser(path: str, data: Gaussian) -> ocm.Denoiser:
    """Return the perfect denoiser of one of :data:`PATHS`; samples have shape (D,)."""
    make, prediction_type = PATHS[path]
    schedule = make()
    network = ExactNetwork(path, data, schedule)
    return ocm.Denoiser(network, schedule, prediction_type, _EXACT, data.covariance).freeze()


def covariances(
    denoiser: ocm.Denoiser, data: Gaussian, timesteps: Sequence[float]
) -> dict[str, ocm.Covariance]:
    """Return the covariances that are compared: the full one, and less and less of it."""
    fractions = {}
    for t in timesteps:
        alpha, sigma = denoiser.schedule.alpha(t).item(), denoiser.schedule.sigma(t).item()
        variance = data.posterior_covariance(alpha, sigma).diagonal().mean().item()
        fractions[t] = [variance * (alpha / sigma) ** 2]
    return {
        "full": ocm.Full(denoiser),
        "diagonal": ocm.Exact(denoiser),
        "analytic": ocm.Analytic(denoiser, Table(fractions)),
        "zero": ocm.BetaTilde(denoiser),
    }


class AffineStep(NamedTuple):
    """x_s = M x_t + c + N(0, noise): M and noise of shape (D, D), c of shape (D,)."""

    matrix: Tensor
    shift: Tensor
    noise: Tensor


def affine(step: Callable[[Tensor], Tensor], noise: Tensor) -> AffineStep:
    """Read M and c off the mean of a step at 0 and at the unit vectors.

    Args:
        step: From x_t, shape (n, D), to the mean of x_s.
        noise: Covariance of x_s given x_t.
    """
    identity = torch.eye(len(noise), dtype=torch.float64)
    shift = step(torch.zeros_like(identity[:1]))[0]
    return AffineStep((step(identity) - shift).T, shift, noise)


def moments(start_std: float, steps: Sequence[AffineStep]) -> tuple[Tensor, Tensor]:
    """Return mean and covariance after all steps, from N(0, start_std^2 I)."""
    dimensions = len(steps[0].shift)
    mean = torch.zeros(dimensions, dtype=torch.float64)
    covariance = start_std**2 * torch.eye(dimensions, dtype=torch.float64)
    for matrix, shift, noise in steps:
        mean = matrix @ mean + shift
        covariance = matrix @ covariance @ matrix.T + noise
    return mean, covariance


@torch.no_grad()
def steps_of_sampler(
    denoiser: ocm.Denoiser,
    covariance: ocm.Covariance,
    sampler: Sampler,
    timesteps: Sequence[float],
) -> list[AffineStep]:
    """Return the steps of :func:`ocm.sample` with ``noise_at_end``, by its own reverse step."""
    dimensions = denoiser.backbone.data.mean.numel()
    identity = torch.eye(dimensions, dtype=torch.float64)
    steps = []
    for s, t in reverse_steps(timesteps):
        step = sampler(denoiser.schedule, s, t)

        def mean(x: Tensor, t: float = t, step: ocm.sampling.samplers.ReverseStep = step) -> Tensor:
            return reverse_step(denoiser.predict(x, t), None, step, seed=0, x0_range=None)

        stated = covariance.at(denoiser.predict(identity, t)).bounded(None)
        reverse = stated.affine(step.mean_from_x0**2, step.noise_variance)
        steps.append(affine(mean, reverse.multiply(identity)))
    return steps


# Other samplers, on a flow; written from their sources, which the suite names.


def velocity(denoiser: ocm.Denoiser) -> Callable[[Tensor, float], Tensor]:
    """Return (x, sigma) -> dx/dsigma of the probability-flow ODE, for a flow or EDM's path."""
    schedule = denoiser.schedule

    def derivative(x: Tensor, sigma: float) -> Tensor:
        t = ocm.diffusion.timesteps.timesteps_at(schedule, [sigma])[0]
        prediction = denoiser.predict(x, t)
        if denoiser.prediction_type == "flow_prediction":
            return prediction.output
        return (x - prediction.x0_hat) / sigma

    return derivative


Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """A sampler of another project.

    Attributes:
        name: What the table calls it.
        evaluations: Of the network, from the number of steps K.
        mean: From (velocity, x, sigma, next sigma, first two sigmas) to the mean of the next x.
        std: From (sigma, next sigma, second sigma) to the standard deviation of the next x.
        paths: Where it is defined.
        source: Where its formula is from.
    """

    name: str
    evaluations: Callable[[int], int]
    mean: Callable[[Velocity, Tensor, float, float, float], Tensor]
    std: Callable[[float, float, float], float]
    paths: tuple[str, ...]
    source: str

    def steps(
        self, derivative: Velocity, sigmas: Sequence[float], dimensions: int
    ) -> list[AffineStep]:
        """Return its steps along decreasing sigmas that end with 0."""
        identity, found = torch.eye(dimensions, dtype=torch.float64), []
        for sigma, following in itertools.pairwise(sigmas):
            std = self.std(sigma, following, sigmas[1])

            def mean(x: Tensor, sigma: float = sigma, following: float = following) -> Tensor:
                return self.mean(derivative, x, sigma, following, sigmas[1])

            found.append(affine(mean, std**2 * identity))
        return found


def _euler(v: Velocity, x: Tensor, sigma: float, following: float, second: float) -> Tensor:
    return x + (following - sigma) * v(x, sigma)


def _heun(v: Velocity, x: Tensor, sigma: float, following: float, second: float) -> Tensor:
    first = v(x, sigma)
    there = x + (following - sigma) * first
    if following == 0:
        return there
    return x + (following - sigma) * (first + v(there, following)) / 2


def _renewed(v: Velocity, x: Tensor, sigma: float, following: float, second: float) -> Tensor:
    return (1 - following) * (x - sigma * v(x, sigma))


_FLOW_SDE_LEVEL = 0.7


def _flow_sde_std(sigma: float, second: float) -> float:
    """Return a sqrt(sigma / (1 - sigma)); the second sigma stands for 1 in the denominator."""
    return _FLOW_SDE_LEVEL * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))


def _flow_sde(v: Velocity, x: Tensor, sigma: float, following: float, second: float) -> Tensor:
    """Euler-Maruyama: drift v + s^2 / (2 sigma) (x + (1 - sigma) v), s the noise's scale."""
    output, squared = v(x, sigma), _flow_sde_std(sigma, second) ** 2
    drift = output + squared / (2 * sigma) * (x + (1 - sigma) * output)
    return x + (following - sigma) * drift


_CPS_LEVEL = 0.8


def _cps(v: Velocity, x: Tensor, sigma: float, following: float, second: float) -> Tensor:
    """(1 - sigma') x0_hat + sqrt(sigma'^2 - lambda^2) n_hat, lambda = sigma' sin(pi/2 level)."""
    output = v(x, sigma)
    kept = following * math.cos(math.pi / 2 * _CPS_LEVEL)
    return (1 - following) * (x - sigma * output) + kept * (x + (1 - sigma) * output)


PEERS = (
    Peer(
        "Euler",
        lambda K: K,
        _euler,
        lambda sigma, following, second: 0.0,
        ("flow", "edm"),
        "diffusers, FlowMatchEulerDiscreteScheduler",
    ),
    Peer(
        "Heun",
        lambda K: 2 * K - 1,
        _heun,
        lambda sigma, following, second: 0.0,
        ("flow", "edm"),
        "diffusers, FlowMatchHeunDiscreteScheduler; EDM, algorithm 1",
    ),
    Peer(
        "stochastic_sampling",
        lambda K: K,
        _renewed,
        lambda sigma, following, second: following,
        ("flow",),
        "diffusers, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)",
    ),
    Peer(
        "Flow-SDE, a = 0.7",
        lambda K: K,
        _flow_sde,
        lambda sigma, following, second: (
            _flow_sde_std(sigma, second) * math.sqrt(sigma - following)
        ),
        ("flow",),
        "Flow-GRPO (arXiv 2505.05470), sde_step_with_logprob, every step and the last one",
    ),
    Peer(
        "CPS, 0.8",
        lambda K: K,
        _cps,
        lambda sigma, following, second: following * math.sin(math.pi / 2 * _CPS_LEVEL),
        ("flow",),
        "coefficients-preserving sampling (arXiv 2509.05952), sde_type 'cps' of Flow-GRPO",
    ),
)


@torch.no_grad()
def sampled(steps: Sequence[AffineStep], start_std: float, count: int, seed: int) -> Tensor:
    """Draw samples by affine steps, from the noise of torch's own generator."""
    generator = torch.Generator().manual_seed(seed)
    dimensions = len(steps[0].shift)
    x = start_std * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    for matrix, shift, noise in steps:
        values, vectors = torch.linalg.eigh(noise)
        root = vectors * values.clamp(min=0).sqrt()
        z = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
        x = x @ matrix.T + shift + z @ root.T
    return x
