"""The experiment on mixtures: errors of every covariance, samples in few steps, three checks.

All heads are the same network on the same features, trained by the same number of steps on the
same data, noise and timesteps; they differ in their loss and in what their output means. A task is
one mixture with one score and one seed; tasks are independent, and run in processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from mixtures.checks import degraded_scores, one_head
from mixtures.errors import WeightedPoints, off_diagonal_share, variance_error, weighted_points
from mixtures.samples import discrepancies, discrepancy_of_data, training_free
from mixtures.settings import HEADS, MIXTURES, MixtureSettings
from mixtures.trained import fitted_analytic, learned_denoiser, trained_head
from mixtures.true_score import mixture_denoiser
from ocm.covariances import Covariance, Exact, Hutchinson
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.parameterisation import PAPER, Parameterisation
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import linear
from ocm.evaluation.environment import Row, environment
from ocm.progress import tracked

# What is measured of a task, and the keys of a record.
_PARTS = ("training", "errors", "samples", "off_diagonal", "degraded", "one_head")


@dataclass(frozen=True)
class Task:
    """One mixture, one score, one seed.

    Attributes:
        mixture: A name of :data:`mixtures.settings.MIXTURES`.
        score: "true", or "learned" by a denoiser that is trained first.
        seed: Seed of data, weights, noise and probes.
        first: Whether it is the first seed, with which the papers' units and the checks run too.
    """

    mixture: str
    score: str
    seed: int
    first: bool


def run(
    settings: MixtureSettings, device: torch.device, *, progress: bool = True
) -> dict[str, Any]:
    """Run the experiment and return its record, as JSON values.

    Args:
        settings: Sizes.
        device: Where to train and measure: on a CPU a process for every core, with a thread each,
            since networks this small gain nothing from more; on a GPU one process.
        progress: Whether to show a progress bar.
    """
    tasks = [
        Task(mixture, score, seed, seed == settings.seeds[0])
        for score in ("learned", "true")  # the longer ones first
        for mixture in MIXTURES
        for seed in settings.seeds
    ]
    start = time.perf_counter()
    parts: dict[str, list[Row]] = {part: [] for part in _PARTS}
    results = dict(_results(tasks, settings, device, progress))
    order = list(MIXTURES)
    for task in sorted(results, key=lambda t: (order.index(t.mixture), t.score != "true", t.seed)):
        origin = {"mixture": task.mixture, "score": task.score, "seed": task.seed}
        for part, rows in results[task].items():
            parts[part] += [origin | row for row in rows]
    return {
        "suite": "mixtures",
        "schedule": "linear",
        "prediction_type": "epsilon",
        "seeds": list(settings.seeds),
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(device) | {"threads": 1},
        **parts,
    }


def _results(
    tasks: list[Task], settings: MixtureSettings, device: torch.device, progress: bool
) -> Iterator[tuple[Task, dict[str, list[Row]]]]:
    workers = min(len(tasks), os.cpu_count() or 1) if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_task, task, settings, device): task for task in tasks}
        done = as_completed(futures)
        bar = tracked(range(len(tasks)), "mixtures", "tasks", shown=progress)
        for _, future in zip(bar, done, strict=True):
            yield futures[future], future.result()


def run_task(task: Task, settings: MixtureSettings, device: torch.device) -> dict[str, list[Row]]:
    """Return the rows of a task, by part of the record."""
    torch.set_num_threads(1)
    mixture, schedule = MIXTURES[task.mixture](), linear()
    points = [
        weighted_points(mixture, schedule, t, settings.num_test, task.seed + 2000)
        for t in settings.timesteps
    ]
    if task.score == "true":
        denoiser = mixture_denoiser(mixture, schedule)
        denoiser.backbone.to(device)
    else:
        denoiser = learned_denoiser(mixture, schedule, settings, task.seed, device)
    parts: dict[str, list[Row]] = {part: [] for part in _PARTS}
    counts = settings.step_counts if task.score == "true" else ()
    analytic = fitted_analytic(denoiser, mixture, settings, counts, task.seed)
    free = training_free(denoiser, analytic)
    measure = partial(_errors, denoiser)
    # The noise of probes is seen at a few points as well, and costs most of all.
    fewer = [
        weighted_points(mixture, schedule, t, settings.num_test // 5, task.seed + 2000)
        for t in settings.timesteps
    ]
    # Without a head nothing is in float32 but a learned score's own weights.
    precise = torch.float64 if task.score == "true" else torch.float32
    for M in settings.probes:
        probed = Hutchinson(denoiser, M, seed=task.seed, floor=None)
        parts["errors"] += measure(fewer, f"hutchinson-{M}", "", probed, precise)
    parts["errors"] += measure(points, "exact", "", Exact(denoiser), precise)
    parts["errors"] += measure(points, "analytic", "", analytic)
    heads: dict[str, LearnedCovariance] = {}
    units = Parameterisation(data_std=mixture.std)
    kinds = [(name, "preconditioned", units) for name in HEADS]
    if task.first and task.score == "true":
        kinds += [(name, "paper", PAPER) for name in ("npr", "ocm")]
    for name, kind, parameterisation in kinds:
        covariance, cost = trained_head(
            name,
            parameterisation,
            denoiser,
            mixture,
            settings,
            task.seed,
            true_score=task.score == "true",
        )
        parts["training"].append({"covariance": name, "parameterisation": kind} | cost)
        parts["errors"] += measure(points, name, kind, covariance)
        if kind == "preconditioned":
            heads[name] = covariance
    sizes: dict[str, Any] = {"num_samples": settings.num_samples, "bandwidth": settings.bandwidth}
    if task.score == "true":
        order = ("beta", "beta_tilde", "analytic", *HEADS, "exact", "full", "lanczos")
        stated: dict[str, Covariance] = {**free, **heads}
        covariances = {name: stated[name] for name in order}
        parts["samples"] = discrepancies(
            denoiser, mixture, covariances, settings.step_counts, seed=task.seed, **sizes
        )
        of_data = discrepancy_of_data(mixture, seed=task.seed, **sizes)
        parts["samples"].append({"sampler": "data", "covariance": "data", "K": 0, "mmd": of_data})
        parts["off_diagonal"] = [{"t": at.t, "share": off_diagonal_share(at)} for at in points]
    elif task.first:
        sizes_and_seed = (points, settings, task.seed)
        parts["degraded"] = degraded_scores(mixture, schedule, denoiser, *sizes_and_seed)
        parts["one_head"] = one_head(mixture, schedule, heads["ocm"], *sizes_and_seed)
    return parts


def _errors(
    denoiser: Denoiser,
    points: list[WeightedPoints],
    name: str,
    kind: str,
    covariance: Covariance,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    rows: list[Row] = []
    for at in points:
        error = variance_error(covariance, denoiser, at, dtype)
        rows.append(
            {
                "covariance": name,
                "parameterisation": kind,
                "t": at.t,
                **error._asdict(),
                "relative": error.relative,
            }
        )
    return rows
