"""Sampling methods at equal numbers of network evaluations, a Jacobian product counting as one.

A diagonal head costs one evaluation a step; a covariance that takes n products costs 1 + n, but for
the last step, to x_0, which adds no noise and takes none. So within a budget of E evaluations the
covariances of products take fewer steps, and so does a second-order solver:

    head, analytic, beta_tilde      K = E
    n products a step               K + n (K - 1) <= E, the most steps that fit
    DPM-Solver++ (order 2, multistep)   K = E
    Heun                            2 K - 1 <= E

A product may run the network forward again to make its graph, which is part of it: the counted
``forward_passes`` can exceed K, and the evaluations are what is compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ocm
from harness.timing import synchronize
from hessdiag.kernels import normal
from ocm.checkpoints.catalogue import build_covariance
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances.names import label
from ocm.evaluation.environment import Row
from ocm.evaluation.features import FeatureExtractor
from ocm.evaluation.markdown import markdown_table
from ocm.evaluation.samples import quality
from ocm.sampling.samplers import Sampler, last_step_noise

BUDGETS = (5, 10, 20, 40)
# Below two steps nothing is left of a reverse process.
_FEWEST_STEPS = 2
# Grey levels that the last noisy step of a covariance may move a pixel by on average; solvers add
# no noise at all.
LAST_NOISE_LEVELS = 1.0
# Half of the logarithm of the SNR that solvers begin at, as diffusers advises for the cosine
# schedule.
_LEAST_LOG_SNR = -5.1
# Of the spacing of Karras et al.
_RHO = 7.0

Draw = Callable[[Checkpoint, int, int, int, int], Tensor]
"""(checkpoint, K, number of images, seed, number of the first image) -> images on the device."""


@dataclass(frozen=True)
class Method:
    """A way to spend network evaluations on samples.

    Attributes:
        name: What spends them: a covariance, or a solver.
        sampler: The reverse process, "" for a solver.
        products: Jacobian products of a step with noise.
        evaluations_of: From K steps to the evaluations that they take.
        draw: Draws a batch of images with K steps.
    """

    name: str
    sampler: str
    products: int
    evaluations_of: Callable[[int], int]
    draw: Draw

    def steps_within(self, budget: int) -> int:
        """Return the most steps K whose evaluations do not exceed ``budget``; 0 for none."""
        fitting = [K for K in range(1, budget + 1) if self.evaluations_of(K) <= budget]
        return max(fitting, default=0)


def with_products(K: int, products: int) -> int:
    """Return the evaluations of K steps, of which all but the last take that many products.

    Example:
        >>> with_products(5, 0), with_products(5, 3)
        (5, 17)
    """
    return K + products * (K - 1)


def _covariance_method(
    name: str,
    sampler: str,
    build: Callable[[Checkpoint, int], ocm.Covariance],
    products: int = 0,
) -> Method:
    process: Sampler = {"ddpm": ocm.ddpm, "ddim": partial(ocm.ddim, eta=0.0)}[sampler]

    def draw(checkpoint: Checkpoint, K: int, count: int, seed: int, first: int) -> Tensor:
        return ocm.sample(
            checkpoint.denoiser,
            build(checkpoint, seed),
            (count, *checkpoint.image_shape),
            K,
            sampler=process,
            seed=seed,
            sample_offset=first,
            x0_range=checkpoint.x0_range,
            max_last_noise=last_step_noise(LAST_NOISE_LEVELS),
        )

    return Method(name, sampler, products, partial(with_products, products=products), draw)


def _named(name: str, sampler: str) -> Method:
    return _covariance_method(name, sampler, lambda c, seed: build_covariance(name, c))


def dpm_solver(checkpoint: Checkpoint, K: int, order: int = 2) -> Any:
    """Return diffusers' DPM-Solver++ (Lu et al., 2022), multistep, set to K steps.

    x0_hat is clipped to [-1, 1] as in every other method here: dynamic thresholding whose largest
    threshold is 1. Timesteps by the scheduler's own "linspace".
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **_of_schedule(checkpoint),
        algorithm_type="dpmsolver++",
        solver_order=order,
        thresholding=checkpoint.x0_range is not None,
        sample_max_value=1.0,
        lambda_min_clipped=_LEAST_LOG_SNR,
    )
    scheduler.set_timesteps(K)
    return scheduler


def heun_solver(checkpoint: Checkpoint, K: int) -> Any:
    """Return diffusers' Heun (Karras et al., 2022, algorithm 1), set to K steps.

    x0_hat is clipped to [-1, 1]. The noise levels are those of that paper, evenly spaced in
    sigma^(1/7), sigma^2 = beta_bar / alpha_bar, from the same largest one as :func:`dpm_solver`:
    evenly spaced timesteps would begin at a sigma of 2e4 with the cosine schedule.
    """
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(
        **_of_schedule(checkpoint),
        clip_sample=checkpoint.x0_range is not None,
        clip_sample_range=1.0,
    )
    log_sigmas = -0.5 * checkpoint.denoiser.schedule.snr[1:].log().numpy()
    most = min(log_sigmas[-1], -_LEAST_LOG_SNR)
    roots = np.linspace(math.exp(most / _RHO), math.exp(log_sigmas[0] / _RHO), K)
    # diffusers counts levels from 0, and interpolates between them.
    levels = np.interp(_RHO * np.log(roots), log_sigmas, np.arange(len(log_sigmas)))
    scheduler.set_timesteps(timesteps=levels)
    return scheduler


def _of_schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    schedule = checkpoint.denoiser.schedule
    if checkpoint.x0_range not in (None, (-1.0, 1.0)):
        raise ValueError(f"x0_range must be (-1, 1) or None for solvers, got {checkpoint.x0_range}")
    N = schedule.num_timesteps
    return {
        "num_train_timesteps": N,
        "trained_betas": [schedule.beta(t - 1, t) for t in range(1, N + 1)],
        "prediction_type": checkpoint.denoiser.prediction_type,
        "timestep_spacing": "linspace",
    }


@torch.no_grad()
def solve(
    checkpoint: Checkpoint,
    make_scheduler: Callable[[Checkpoint, int], Any],
    K: int,
    count: int,
    seed: int,
    first: int,
) -> Tensor:
    """Draw images by a scheduler of diffusers, from the noise that :func:`ocm.sample` starts from.

    Args:
        checkpoint: The denoiser.
        make_scheduler: From the checkpoint and K to a scheduler that is set to K steps.
        K: Number of steps.
        count: Number of images.
        seed: Seed of the noise that the process starts from.
        first: Number of the first image.
    """
    # Its tables are on the CPU, where look-ups wait for no device.
    denoiser, scheduler = checkpoint.denoiser, make_scheduler(checkpoint, K)
    shape = (count, *checkpoint.image_shape)
    x = normal(shape, seed, sample_offset=first, device=denoiser.device)
    x = x * float(scheduler.init_noise_sigma)
    for level in scheduler.timesteps:
        # diffusers counts levels from 0, and Heun's lie between those of training.
        t = torch.full((count,), level.item() + 1, dtype=level.dtype, device=denoiser.device)
        output = denoiser.output(scheduler.scale_model_input(x, level), t)
        x = scheduler.step(output, level, x).prev_sample
    return x


METHODS = (
    _named("ocm", "ddpm"),
    _named("ocm", "ddim"),
    _named("analytic", "ddpm"),
    _named("analytic", "ddim"),
    _named("beta_tilde", "ddpm"),
    _named("beta_tilde", "ddim"),
    _covariance_method(
        "cosine, M = 1", "ddpm", lambda c, seed: ocm.CosineDiagonal(c.denoiser, 1, seed), 1
    ),
    _covariance_method("lanczos, k = 3", "ddpm", lambda c, seed: ocm.Lanczos(c.denoiser, 3), 3),
    _covariance_method(
        "lanczos, k = 3, symmetric",
        "ddpm",
        lambda c, seed: ocm.Lanczos(c.denoiser, 3, symmetric=True),
        6,
    ),
    Method(
        "DPM-Solver++", "", 0, lambda K: K,
        lambda c, K, count, seed, first: solve(c, dpm_solver, K, count, seed, first),
    ),
    Method(
        "Heun", "", 0, lambda K: 2 * K - 1,
        lambda c, K, count, seed, first: solve(c, heun_solver, K, count, seed, first),
    ),
)  # fmt: skip


def equal_evaluations(
    checkpoint: Checkpoint,
    real_features: Tensor,
    extractor: FeatureExtractor,
    budgets: Sequence[int] = BUDGETS,
    *,
    num_images: int,
    methods: Sequence[Method] = METHODS,
    seed: int = 0,
    batch_size: int = 256,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Return the sample quality of every method at every budget of network evaluations.

    All start from the same noise. A method of which fewer than two steps fit a budget has no row
    there.

    Args:
        checkpoint: The denoiser, with an OCM head and an analytic covariance if ``methods`` name
            them.
        real_features: Features of real images, shape (n, d).
        extractor: What made them.
        budgets: Network evaluations E, products included, for an image.
        num_images: Samples for each row.
        methods: What to compare.
        seed: Seed of the noise and the probes.
        batch_size: Samples at a time.
        report: Called with a line for each finished row.

    Returns:
        Rows of method, sampler, budget, evaluations, products, forward_passes, K, frechet,
        precision, recall, seconds (of drawing) and num_images.

    Raises:
        FloatingPointError: If a sample is not finite.
        ValueError: If the denoiser takes class labels, or the checkpoint lacks what a method needs.
    """
    if checkpoint.denoiser.takes_labels:
        raise ValueError("checkpoint must be of a denoiser without class labels, got one with them")
    rows: list[Row] = []
    for budget in budgets:
        for method in methods:
            K = method.steps_within(budget)
            if K < _FEWEST_STEPS:
                continue
            images, passes, seconds = _drawn(checkpoint, method, K, num_images, seed, batch_size)
            features = extractor(images)
            found = quality(real_features, features)
            rows.append(
                {
                    "method": method.name,
                    "sampler": method.sampler,
                    "budget": budget,
                    "evaluations": method.evaluations_of(K),
                    "products": method.products * (K - 1),
                    "forward_passes": passes,
                    "K": K,
                    "frechet": found.frechet,
                    "precision": found.precision,
                    "recall": found.recall,
                    "seconds": seconds,
                    "num_images": num_images,
                }
            )
            report(
                f"E = {budget}, {method.name} {method.sampler}: K = {K}, Fréchet "
                f"{found.frechet:.3f}, {seconds:.1f} s"
            )
    return rows


def _drawn(
    checkpoint: Checkpoint, method: Method, K: int, num_images: int, seed: int, batch_size: int
) -> tuple[Tensor, int, float]:
    """Return images, the forward passes that each of them took, and the seconds."""
    device = checkpoint.denoiser.device
    batches = []
    synchronize(device)
    start = time.perf_counter()
    with forward_passes(checkpoint.denoiser.backbone) as counted:
        for first in range(0, num_images, batch_size):
            count = min(batch_size, num_images - first)
            batches.append(method.draw(checkpoint, K, count, seed, first))
        synchronize(device)
    seconds = time.perf_counter() - start
    passes = counted[0] // len(batches)
    expected = method.evaluations_of(K)
    if not method.products and counted[0] != expected * len(batches):
        raise AssertionError(
            f"{method.name} {method.sampler} took {counted[0]} forward passes for {len(batches)} "
            f"batches of {K} steps, not {expected} each"
        )
    images = torch.cat(batches)
    if not bool(torch.isfinite(images).all()):
        raise FloatingPointError(f"the samples of {method.name} at K = {K} hold NaN or infinity")
    return images, passes, seconds


@contextmanager
def forward_passes(backbone: Any) -> Iterator[list[int]]:
    """Count the calls of a backbone: yields a list of one number, which grows.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> with forward_passes(layer) as counted:
        ...     _ = layer(torch.zeros(1)), layer(torch.zeros(1))
        >>> counted
        [2]
    """
    counted = [0]

    def count(*_: object) -> None:
        counted[0] += 1

    hook = backbone.register_forward_pre_hook(count)
    try:
        yield counted
    finally:
        hook.remove()


def name_of(row: Row) -> str:
    """Return how the method of a row is written."""
    name = label(row["method"])
    return f"{name}, {row['sampler'].upper()}" if row["sampler"] else name


def table(rows: Sequence[Row]) -> str:
    """Return the Fréchet distances of rows by method, a column for each budget, in Markdown."""
    lines: dict[str, Row] = {}
    for row in rows:
        cells = lines.setdefault(name_of(row), {"method": name_of(row)})
        cells[f"E = {row['budget']}"] = f"{row['frechet']:.2f} ({row['K']})"
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    return markdown_table(list(lines.values()), {"method": ""} | {f"E = {E}": "" for E in budgets})
