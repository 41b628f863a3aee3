"""Ways to draw samples in K steps: other samplers, and ours with a covariance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness import budget
from harness.gaussian_flow import PEERS, velocity
from torch import Tensor

import hessdiag
import ocm
from hessdiag.kernels import normal
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.timesteps import (
    even_timesteps,
    reverse_steps,
    shifted,
    timesteps_at,
    trailing_timesteps,
)
from ocm.sampling.samplers import X0_RANGE, Sampler, last_step_noise, renoised, reverse_step

SHIFT = 2.0
# Jacobian products of a step, of the covariances that take some.
PRODUCTS = {"coloring": 12, "lanczos": 3}
# The processes of ours, by how much of the noise is new.
PROCESSES: dict[str, Sampler] = {
    "λ = 0": ocm.ddim,
    "DDPM": ocm.ddpm,
    "λ = 0.5 σ": partial(renoised, noise=0.5),
    "λ = σ": renoised,
}
COVARIANCES = ("analytic", "ocm", *PRODUCTS)
_PEERS = {peer.name: peer for peer in PEERS}
# Steps of ours without a covariance: others' samplers with x0_hat clipped, as ours have it.
_CLIPPED = {
    "Euler, clipped": ocm.ddim,
    "stochastic_sampling, clipped": renoised,
    "DDIM": ocm.ddim,
    "DDPM, β̃": ocm.ddpm,
    "DDPM, β": ocm.ddpm,
}


@dataclass(frozen=True)
class Method:
    """A way to draw samples.

    Attributes:
        name: Another sampler, or one of :data:`PROCESSES`.
        covariance: One of :data:`COVARIANCES`, or "" for another sampler.
        spacing: "even", "trailing" or "shifted".
        noise_at_end: Whether x_0 is drawn, or the mean.
    """

    name: str
    covariance: str = ""
    spacing: str = "even"
    noise_at_end: bool = False

    def steps_within(self, evaluations: int) -> int:
        """Return the most steps K whose evaluations of the network, products apart, fit."""
        return (evaluations + 1) // 2 if self.name == "Heun" else evaluations

    def evaluations_of(self, K: int) -> int:
        """Return the evaluations of K steps, products apart."""
        return 2 * K - 1 if self.name == "Heun" else K

    def products_of(self, K: int) -> int:
        """Return the Jacobian products of K steps."""
        products = PRODUCTS.get(self.covariance, 0)
        return products * (K if self.noise_at_end else K - 1)

    def steps_with_products_within(self, evaluations: int) -> int:
        """Return the most steps K whose evaluations fit, a product counting as one; 0 for none."""
        return max(
            (
                K
                for K in range(1, evaluations + 1)
                if self.evaluations_of(K) + self.products_of(K) <= evaluations
            ),
            default=0,
        )


def others(path: str) -> list[str]:
    """Return the names of the other samplers of a path."""
    if path == "flow":
        return [*_PEERS, *list(_CLIPPED)[:2]]
    return [*list(_CLIPPED)[2:], "DPM-Solver++"]


def spacings(path: str, name: str) -> tuple[str, ...]:
    """Return the spacings that a method may take."""
    if name == "DPM-Solver++":
        return ("its own",)
    return ("even", "trailing", "shifted") if path == "flow" else ("even", "trailing")


def timesteps(schedule: ocm.Schedule, spacing: str, K: int) -> list[float]:
    """Return K timesteps of a spacing."""
    if spacing == "even":
        return even_timesteps(schedule, K)
    trailing = trailing_timesteps(schedule, K)
    if spacing == "trailing":
        return trailing
    return timesteps_at(schedule, shifted(schedule.sigma(torch.tensor(trailing)), SHIFT))


def draw(
    checkpoint: Checkpoint, method: Method, K: int, count: int, seed: int, first: int
) -> dict[bool, Tensor]:
    """Draw images; ours without noise at the end and with it, from the same steps.

    Args:
        checkpoint: The denoiser, with the heads and the analytic variance.
        method: What to draw with; its ``noise_at_end`` says for which end products are taken.
        K: Number of steps.
        count: Number of images.
        seed: Seed of the noise.
        first: Number of the first image.
    """
    denoiser = checkpoint.denoiser
    shape = (count, *checkpoint.image_shape)
    if method.name == "DPM-Solver++":
        return {False: budget.solve(checkpoint, budget.dpm_solver, K, count, seed, first)}
    steps = timesteps(denoiser.schedule, method.spacing, K)
    if method.name in _PEERS:
        return {False: _by_peer(denoiser, method.name, steps, shape, seed, first)}
    if not method.covariance:
        fixed = ocm.Beta(denoiser) if method.name == "DDPM, β" else ocm.BetaTilde(denoiser)
        return {
            False: ocm.sample(
                denoiser,
                fixed,
                shape,
                steps,
                sampler=_CLIPPED[method.name],
                seed=seed,
                sample_offset=first,
            )
        }
    return _by_ours(checkpoint, method, steps, shape, seed, first)


def covariance_of(
    checkpoint: Checkpoint, name: str, seed: int, probes: int = PRODUCTS["coloring"]
) -> ocm.Covariance:
    """Return the covariance of a name."""
    if name == "analytic":
        return checkpoint.analytic["analytic"]
    if name == "ocm":
        return checkpoint.learned["ocm"]
    if name == "beta":
        return ocm.Beta(checkpoint.denoiser)
    if name == "lanczos":
        return ocm.Lanczos(checkpoint.denoiser, PRODUCTS[name])
    return ocm.Hutchinson(checkpoint.denoiser, probes, seed, hessdiag.Coloring(probes))


@torch.no_grad()
def _by_ours(
    checkpoint: Checkpoint,
    method: Method,
    steps: Sequence[float],
    shape: tuple[int, ...],
    seed: int,
    first: int,
) -> dict[bool, Tensor]:
    """Do what :func:`ocm.sample` does, with both of its ends.

    Of even steps the last noisy one, to t = 1, is bounded as in Analytic-DPM: the network takes
    hardly any of its noise away.
    """
    bound = last_step_noise(budget.LAST_NOISE_LEVELS) if method.spacing == "even" else None
    denoiser, sampler = checkpoint.denoiser, PROCESSES[method.name]
    covariance = covariance_of(checkpoint, method.covariance, seed)
    schedule, t = denoiser.schedule, steps[-1]
    x = normal(shape, seed, sample_offset=first) * math.hypot(schedule.alpha(t), schedule.sigma(t))
    for s, t in reverse_steps(steps):
        prediction = denoiser.predict(x, t, s=s, sample_offset=first)
        needed = s > 0 or method.noise_at_end or method.covariance not in PRODUCTS
        stated = covariance.at(prediction) if needed else None
        step = sampler(schedule, s, t)
        ends = {
            noisy: reverse_step(
                prediction,
                stated if noisy else None,
                step,
                seed=seed,
                x0_range=X0_RANGE,
                max_noise_std=bound if s == steps[0] else None,
            )
            for noisy in ((True,) if s > 0 else (False, True) if needed else (False,))
        }
        x = ends[True] if s > 0 else x
    return ends


@torch.no_grad()
def _by_peer(
    denoiser: ocm.Denoiser,
    name: str,
    steps: Sequence[float],
    shape: tuple[int, ...],
    seed: int,
    first: int,
) -> Tensor:
    peer, derivative = _PEERS[name], velocity(denoiser)
    sigmas = [*denoiser.schedule.sigma(torch.tensor(steps)).tolist()[::-1], 0.0]
    x = normal(shape, seed, sample_offset=first) * sigmas[0]
    for k, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        std = peer.std(sigma, following, sigmas[1])
        x = peer.mean(derivative, x, sigma, following, sigmas[1])
        if std > 0:
            x = x + std * normal(shape, seed, step=k + 1, sample_offset=first)
    return x
