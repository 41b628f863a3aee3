"""Standard errors of probes at equal products, and the time to a standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

import ocm
from likelihoods.sizes import LikelihoodSize
from ocm.diffusion.denoiser import Denoiser
from ocm.evaluation.environment import Row

SEED = 0
# How many standard errors an estimate may be from the exact divergence before nothing is timed.
_TOO_FAR = 6.0
KEPT = "Rademacher, kept"
OURS = "coloring, drawn anew"


def settings_by_name(size: LikelihoodSize, max_probes: int) -> dict[str, ocm.LikelihoodSettings]:
    """Return the ways to place probes: kept for a whole solution, or drawn anew."""
    base = ocm.LikelihoodSettings(num_steps=size.num_steps, max_probes=max_probes)
    return {
        KEPT: replace(base, probes="rademacher", new_probes=False),
        "coloring, kept": replace(base, probes="coloring", new_probes=False),
        "Rademacher, drawn anew": replace(base, probes="rademacher"),
        OURS: replace(base, probes="coloring"),
    }


def dequantised(x0: Tensor, levels: int) -> Tensor:
    """Return images with uniform noise within their bins: one draw, the same for all."""
    generator = torch.Generator().manual_seed(SEED)
    return x0 + (2 * torch.rand(x0.shape, generator=generator) - 1) / (levels - 1)


def compared(denoiser: Denoiser, y: Tensor, size: LikelihoodSize) -> list[Row]:
    """Return root mean square standard errors at equal products an evaluation.

    Raises:
        AssertionError: If an estimate is far from the exact divergence, on the first image.
    """
    D = y[0].numel()
    exact = ocm.log_likelihood(
        denoiser, y[:1], ocm.LikelihoodSettings(num_steps=size.num_steps, max_probes=D)
    )
    assert exact.stderr.max() == 0
    rows: list[Row] = []
    for name, settings in settings_by_name(size, size.num_products).items():
        found = ocm.log_likelihood(denoiser, y, settings, seed=SEED)
        off = ((found.value[0] - exact.value[0]) / found.stderr[0]).item()
        assert abs(off) < _TOO_FAR, f"{name} is {off:.1f} standard errors from the exact divergence"
        rows.append(
            {
                "probes": name,
                "products": size.num_products,
                "evaluations": found.num_evaluations,
                "standard_error": rms(found.bits_per_dim_stderr),
                "off_in_standard_errors": off,
            }
        )
    kept = rows[0]["standard_error"]
    return [row | {"ratio": kept / row["standard_error"]} for row in rows]


def timed(denoiser: Denoiser, y: Tensor, size: LikelihoodSize, rows: list[Row]) -> list[Row]:
    """Return the seconds that each way takes to the standard error of the target, for all images.

    The number of probes comes from the standard errors at equal products, by 1 / M; each run says
    what it reached, and its time is taken to the target by the same law. Only ways that reach it in
    one run are run: with all kept probes in one solution.

    Args:
        denoiser: The denoiser.
        y: Dequantised images.
        size: The target.
        rows: Of :func:`compared`.
    """
    found: list[Row] = []
    for row in rows:
        name = row["probes"]
        if name == "coloring, kept":
            continue
        # By one product, as if of Rademacher probes: colors are worth more when they are many.
        each = row["standard_error"] * math.sqrt(row["products"])
        wanted = max(2, math.ceil((each / size.target) ** 2))
        if name == OURS:
            wanted = max(24, wanted // 2 * 2)
        wanted = min(wanted, y[0].numel() // 2)
        settings = settings_by_name(size, wanted)[name]
        start = time.perf_counter()
        reached = ocm.log_likelihood(denoiser, y, settings, seed=SEED + 1)
        seconds = time.perf_counter() - start
        error = rms(reached.bits_per_dim_stderr)
        # What is missing comes from repeats; what is too much is not given back.
        repeats = max(1.0, (error / size.target) ** 2)
        found.append(
            {
                "probes": name,
                "products": wanted,
                "standard_error": error,
                "seconds": seconds,
                "seconds_to_target": seconds * repeats,
            }
        )
    kept = found[0]["seconds_to_target"]
    return [row | {"times_faster": kept / row["seconds_to_target"]} for row in found]


def one_probe(denoiser: Denoiser, y: Tensor, size: LikelihoodSize) -> Row:
    """Return the time to the target of one fixed Rademacher probe, the solution repeated."""
    settings = ocm.LikelihoodSettings(
        num_steps=size.num_steps, max_probes=1, probes="rademacher", new_probes=False
    )
    return _repeated(
        "one Rademacher probe, kept; solutions repeated",
        lambda k: ocm.log_likelihood(denoiser, y, settings, seed=SEED + k).value,
        y[0].numel(),
        size,
    )


def flow_matching_row(denoiser: Denoiser, y: Tensor, size: LikelihoodSize) -> Row | None:
    """Return the same of flow_matching's ``compute_likelihood``, None where it is not installed.

    By its midpoint rule with as many evaluations, two a step. It integrates to the data themselves.
    """
    if find_spec("flow_matching") is None:
        return None
    from flow_matching.solver import ODESolver

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        # Its time runs from noise to data; the network is told N sigma and predicts n - x0.
        return -_predicted(denoiser, x, 1 - t.item())

    solver = ODESolver(velocity_model=velocity)
    D = y[0].numel()

    def log_prior(z: Tensor) -> Tensor:
        return -0.5 * (z.square().flatten(1).sum(1) + D * math.log(2 * math.pi))

    def value(k: int) -> Tensor:
        torch.manual_seed(SEED + k)
        _, log_prob = solver.compute_likelihood(
            y.clone(), log_prior, step_size=1 / (2 * size.num_steps), method="midpoint"
        )
        return log_prob.detach().double()

    return _repeated("flow_matching: one Rademacher probe, kept", value, D, size)


def _predicted(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """Return n - x0 of a network that predicts it, at any sigma in [0, 1]."""
    time_told = torch.full((len(x),), denoiser.schedule.num_timesteps * sigma)
    output: Tensor = denoiser.backbone(x, time_told).sample
    return output


def _repeated(name: str, value: Callable[[int], Tensor], D: int, size: LikelihoodSize) -> Row:
    start = time.perf_counter()
    values = torch.stack([value(k) for k in range(size.num_repeats)])
    seconds = (time.perf_counter() - start) / size.num_repeats
    error = rms(values.std(0)) / (D * math.log(2))
    return {
        "probes": name,
        "products": 1,
        "bits_per_dim": -values.mean().item() / (D * math.log(2)),
        "standard_error": error,
        "seconds": seconds,
        "seconds_to_target": seconds * max(1.0, (error / size.target) ** 2),
    }


def coverage(denoiser: Denoiser, y: Tensor, size: LikelihoodSize) -> list[Row]:
    """Return how often 95% intervals hold the log-likelihood by the exact divergence.

    Args:
        denoiser: The denoiser.
        y: One dequantised image, whose copies are samples of other probes.
        size: Number of seeds and steps.
    """
    D = y[0].numel()
    exact = ocm.log_likelihood(
        denoiser, y, ocm.LikelihoodSettings(num_steps=size.num_steps, max_probes=D)
    ).value
    rows: list[Row] = []
    for name, max_probes in (("Rademacher, drawn anew", 4), (OURS, 24), (KEPT, 4)):
        settings = settings_by_name(size, max_probes)[name]
        found = ocm.log_likelihood(
            denoiser, y.repeat(size.num_seeds, *[1] * (y.dim() - 1)), settings, seed=SEED
        )
        low, high = found.interval(0.95)
        error = found.value - exact
        rows.append(
            {
                "probes": name,
                "products": max_probes,
                "seeds": size.num_seeds,
                "coverage": ((low <= exact) & (exact <= high)).double().mean().item(),
                "error_over_stated": rms(error) / rms(found.stderr),
                "mean_error_in_standard_errors": (
                    error.mean() / error.std() * size.num_seeds**0.5
                ).item(),
                "standard_error": rms(found.bits_per_dim_stderr),
            }
        )
    return rows


def rms(values: Tensor) -> float:
    """Return the root mean square."""
    return values.square().mean().sqrt().item()
