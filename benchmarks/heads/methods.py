"""Ways to draw samples on any of the three paths: those of others, and ours with a head.

All start from the same noise, clip x0_hat to [-1, 1] and end with it. A step takes one evaluation
of the network, but for Heun's, which takes two (the last one: one).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import budget
from harness.gaussian_flow import PEERS
from torch import Tensor

import ocm
from hessdiag.kernels import normal
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances.operators import spectral
from ocm.diffusion import draws
from ocm.diffusion.schedules import Schedule
from ocm.diffusion.timesteps import (
    even_timesteps,
    reverse_steps,
    timesteps_at,
    trailing_timesteps,
)
from ocm.sampling.samplers import X0_RANGE, last_step_noise, starting_noise

SPACINGS = ("even", "trailing", "rho = 7")
# Even ones spend a step at t = 1, where there is nothing to solve.
_OF_SOLVERS = SPACINGS[1:]
ETAS = (0.3, 1.0)
# The exponent of the spacing of Karras et al. (2022), evenly spaced (sigma / alpha)^(1 / 7).
_RHO = 7.0
# The largest log(sigma / alpha) of solvers, as diffusers advises for the cosine schedule; and the
# largest sigma on a flow, where its DPM-Solver++ starts.
_MOST_LOG_RATIO = 5.1
_MOST_FLOW_SIGMA = 0.999

Draw = Callable[[Checkpoint, Sequence[float], tuple[int, ...], int, int], Tensor]
"""(checkpoint, increasing timesteps, shape, seed, number of the first sample) -> images."""


@dataclass(frozen=True)
class Method:
    """A way to draw samples.

    Attributes:
        name: What it is called.
        covariance: The head that it takes, "beta" or "beta_tilde"; "" for none.
        draw: Draws a batch.
        spacings: Of its timesteps, from which validation images choose.
        has_two_stages: Whether a step takes two evaluations.
        is_ours: Whether it takes a head.
    """

    name: str
    covariance: str
    draw: Draw
    spacings: tuple[str, ...] = SPACINGS
    has_two_stages: bool = False
    is_ours: bool = False

    def steps_within(self, evaluations: int) -> int:
        """Return the most steps K that take at most that many evaluations."""
        return (evaluations + 1) // 2 if self.has_two_stages else evaluations

    def evaluations_of(self, K: int) -> int:
        """Return the evaluations that K steps take."""
        return 2 * K - 1 if self.has_two_stages else K


def methods_of(path: str, heads: Sequence[str]) -> list[Method]:
    """Return the methods of a path: first those of others, then ours with each of the heads.

    On a flow DDIM is Euler's method, and DDPM's beta, the variance of q(x_t | x_s), has no bound.

    Args:
        path: "linear", "cosine" or "flow".
        heads: Names of learned covariances.

    Example:
        >>> [method.name for method in methods_of("flow", ())]
        ['Euler', 'DDPM', 'aDDIM', 'Heun', 'DPM-Solver++ 2M', 'DPM-Solver++ 2M SDE', 'UniPC']
    """
    is_flow = path == "flow"
    fixed = [
        Method("Euler" if is_flow else "DDIM", "", _process(ocm.ddim, "beta_tilde")),
        Method("DDPM", "beta_tilde", _process(ocm.ddpm, "beta_tilde")),
        *([] if is_flow else [Method("DDPM", "beta", _process(ocm.ddpm, "beta"))]),
        Method("aDDIM", "", partial(adjusted_ddim, "")),
        Method("Heun", "", heun, _OF_SOLVERS, has_two_stages=True),
        *(Method(name, "", partial(multistep, name), _OF_SOLVERS) for name in _MULTISTEP),
    ]
    processes: dict[str, Callable[[], Any]] = {
        "λ = 0": lambda: ocm.ddim,
        "DDPM": lambda: ocm.ddpm,
        **{f"second order, η = {eta:g}": lambda eta=eta: ocm.SecondOrder(eta=eta) for eta in ETAS},
    }
    ours = [
        Method(name, head, draw, is_ours=True)
        for head in heads
        for name, draw in [
            *((name, _process(make, head)) for name, make in processes.items()),
            ("aDDIM", partial(adjusted_ddim, head)),
        ]
    ]
    return [*fixed, *ours]


def timesteps(schedule: Schedule, spacing: str, K: int) -> list[float]:
    """Return K increasing timesteps of a spacing, the last one N.

    Example:
        >>> timesteps(ocm.linear(), "rho = 7", 5)
        [1, 36, 188, 532, 1000]
    """
    if spacing == "even":
        return even_timesteps(schedule, K)
    if spacing == "trailing":
        return trailing_timesteps(schedule, K)
    whole = torch.arange(1, schedule.num_timesteps + 1)
    log_ratios = -0.5 * schedule.log_snr(whole)  # log(sigma / alpha), which rises
    most = min(log_ratios[-1].item(), _MOST_LOG_RATIO)
    ends = math.exp(log_ratios[0].item() / _RHO), math.exp(most / _RHO)
    wanted = _RHO * torch.linspace(*ends, K, dtype=torch.float64).log()
    if schedule.is_continuous:
        found: list[float] = schedule.timestep_of(-2 * wanted).tolist()
        return [*found[:-1], schedule.num_timesteps]
    steps: list[float] = []
    for value in wanted.tolist()[:-1]:
        nearest = int((log_ratios - value).abs().argmin()) + 1
        steps.append(max(nearest, steps[-1] + 1 if steps else 1))
    return [*steps, schedule.num_timesteps]


# One evaluation a step, by ocm.sample


def _process(process: Any, covariance: str) -> Draw:
    """Return what draws by :func:`ocm.sample`.

    A last noisy step at t = 1 is bounded as in Analytic-DPM: the network takes hardly any of its
    noise away.

    Args:
        process: A sampler, or for ours what makes it.
        covariance: "beta", "beta_tilde", or the name of a head.
    """

    def draw(
        checkpoint: Checkpoint,
        steps: Sequence[float],
        shape: tuple[int, ...],
        seed: int,
        first: int,
    ) -> Tensor:
        denoiser = checkpoint.denoiser
        fixed = {"beta": ocm.Beta, "beta_tilde": ocm.BetaTilde}
        is_fixed = covariance in fixed
        return ocm.sample(
            denoiser,
            fixed[covariance](denoiser) if is_fixed else checkpoint.learned[covariance],
            shape,
            steps,
            sampler=process if is_fixed else process(),
            seed=seed,
            sample_offset=first,
            max_last_noise=last_step_noise(budget.LAST_NOISE_LEVELS) if steps[0] == 1 else None,
        )

    return draw


@torch.no_grad()
def adjusted_ddim(
    head: str,
    checkpoint: Checkpoint,
    steps: Sequence[float],
    shape: tuple[int, ...],
    seed: int,
    first: int,
) -> Tensor:
    """Draw by aDDIM (Heek, Hoogeboom and Salimans, "Multistep Consistency Models", algorithm 3).

    A DDIM step whose noise n_hat is scaled up by the variance that x0_hat lacks,

        x_s = alpha_s x0_hat + sqrt(sigma_s^2 + b^2 v / mean(n_hat^2)) n_hat,
        b = alpha_s - alpha_t sigma_s / sigma_t,    v = 0.1 / (2 + SNR_t),

    with the paper's v, a tenth of the posterior variance of data of variance 1/2, or with the mean
    over dimensions of the variance that a head states. The last step returns x0_hat here, as in
    all methods.

    Args:
        head: Name of a learned covariance of the checkpoint; "" for the paper's v.
        checkpoint: With the denoiser.
        steps: Increasing timesteps.
        shape: Of the samples.
        seed: Of the first noise, the only one.
        first: Number of the first sample.
    """
    denoiser, schedule = checkpoint.denoiser, checkpoint.denoiser.schedule
    x = starting_noise(denoiser, shape, steps[-1], seed, first)
    each = (-1, *(1 for _ in shape[1:]))
    for s, t in reverse_steps(steps):
        prediction = denoiser.predict(x, t, s=s)
        x0_hat = prediction.x0_hat.clamp(*X0_RANGE)
        (alpha_s, alpha_t), (sigma_s, sigma_t) = schedule.scales(torch.tensor([s, t]).double())
        noise = (x - alpha_t.item() * x0_hat) / sigma_t.item()
        b = (alpha_s - alpha_t * sigma_s / sigma_t).item()
        v: Tensor | float = 0.1 / (2 + (alpha_t / sigma_t).item() ** 2)
        if head:
            # The trace of a covariance over D, in whatever basis it is diagonal.
            C = spectral(checkpoint.learned[head].at(prediction).bounded(X0_RANGE))
            v = C.eigenvalues.flatten(1).mean(1).view(each)
        power = noise.square().flatten(1).mean(1).view(each)
        scale = (sigma_s.item() ** 2 + b**2 * v / power).sqrt()
        x = alpha_s.item() * x0_hat + scale * noise if s > 0 else x0_hat
    return x


# Solvers of the ODE


@torch.no_grad()
def heun(
    checkpoint: Checkpoint, steps: Sequence[float], shape: tuple[int, ...], seed: int, first: int
) -> Tensor:
    """Draw by Heun's method (Karras et al., 2022, algorithm 1, without noise), x0_hat clipped.

    Along dy/du = (y - x0_hat) / u, with u = sigma / alpha and y = x / alpha, as diffusers'
    HeunDiscreteScheduler has it; on a flow u = sigma and y = x, as its
    FlowMatchHeunDiscreteScheduler.
    """
    denoiser, schedule = checkpoint.denoiser, checkpoint.denoiser.schedule
    step = next(peer.mean for peer in PEERS if peer.name == "Heun")
    if not schedule.is_continuous:
        steps = started(schedule, steps)
    alphas, sigmas = schedule.scales(torch.tensor(steps[::-1]).double())
    units = torch.ones_like(alphas) if schedule.is_continuous else alphas
    levels = (sigmas / units).tolist()
    places = dict(zip(levels, zip(steps[::-1], units.tolist(), strict=True), strict=True))

    def derivative(y: Tensor, u: float) -> Tensor:
        t, unit = places[u]
        return (y - denoiser.predict(unit * y, t).x0_hat.clamp(*X0_RANGE)) / u

    y = starting_noise(denoiser, shape, steps[-1], seed, first) / units[0].item()
    for u, following in itertools.pairwise([*levels, 0.0]):
        y = step(derivative, y, u, following, 0.0)
    return y


# Multistep solvers of diffusers


def _dpm_solver(algorithm: str, options: dict[str, Any]) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type=algorithm, solver_order=2, **options)


def _unipc(options: dict[str, Any]) -> Any:
    """Return UniPC of order 3, as diffusers advises where there is no guidance.

    With its other B(h), "bh1", a last step to sigma = 0 is 0 times infinity.
    """
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(solver_type="bh2", solver_order=3, **options)


_MULTISTEP: dict[str, Callable[[dict[str, Any]], Any]] = {
    "DPM-Solver++ 2M": partial(_dpm_solver, "dpmsolver++"),
    "DPM-Solver++ 2M SDE": partial(_dpm_solver, "sde-dpmsolver++"),
    "UniPC": _unipc,
}


@torch.no_grad()
def multistep(
    name: str,
    checkpoint: Checkpoint,
    steps: Sequence[float],
    shape: tuple[int, ...],
    seed: int,
    first: int,
) -> Tensor:
    """Draw by a multistep solver of diffusers at timesteps of ours, x0_hat clipped to [-1, 1].

    Its tables of noise levels are written over, so that it takes the timesteps of the others, but
    for a start at a little less noise where there is hardly any signal.

    Args:
        name: A key of the table of solvers.
        checkpoint: With the denoiser.
        steps: Increasing timesteps.
        shape: Of the samples.
        seed: Of the noise.
        first: Number of the first sample.
    """
    denoiser, schedule = checkpoint.denoiser, checkpoint.denoiser.schedule
    is_flow = schedule.is_continuous
    options: dict[str, Any] = {
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": denoiser.prediction_type,
        "thresholding": True,  # with this largest threshold, to clip to [-1, 1]
        "sample_max_value": 1.0,
        "use_flow_sigmas": is_flow,
    }
    steps = started(schedule, steps)
    scheduler = _MULTISTEP[name](options)
    scheduler.set_timesteps(len(steps))
    alpha, sigma = schedule.scales(torch.tensor(steps[::-1]).double())
    levels = sigma if is_flow else sigma / alpha
    scheduler.sigmas = torch.cat([levels, torch.zeros(1)]).float()
    scheduler.set_begin_index(0)
    x = starting_noise(denoiser, shape, steps[-1], seed, first)
    for t in steps[::-1]:
        noise: dict[str, Tensor] = {}
        if name.endswith("SDE"):
            step = draws.of_level(t)
            noise["variance_noise"] = normal(shape, seed, step=step, sample_offset=first)
        output = denoiser.predict(x, t).output
        x = scheduler.step(output, torch.tensor(t), x, **noise).prev_sample
    return x


def started(schedule: Schedule, steps: Sequence[float]) -> list[float]:
    """Return the timesteps with a last one where solvers can start: not beyond some noise.

    Example:
        >>> started(ocm.cosine(), [500, 1000])
        [500, 996]
    """
    if schedule.is_continuous:
        most = timesteps_at(schedule, [_MOST_FLOW_SIGMA])[0]
    else:
        log_ratios = -0.5 * schedule.log_snr(torch.arange(1, schedule.num_timesteps + 1))
        most = int((log_ratios <= _MOST_LOG_RATIO).sum())
    return [*steps[:-1], min(steps[-1], most)]
