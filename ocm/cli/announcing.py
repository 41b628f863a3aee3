"""What an evaluation will do, and about how long that takes, said before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

import hessdiag
from ocm.checkpoints.catalogue import available, build_covariance, num_products
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.covariances.names import CALIBRATED, named
from ocm.data import Images
from ocm.diffusion.noise import labelled, noisy_prediction
from ocm.evaluation.distances import frechet_caution
from ocm.evaluation.evaluation import SAMPLERS, EvaluationSettings, lacking
from ocm.evaluation.scores import steps_of

_MEASURED = 3


class Work(NamedTuple):
    """Evaluations of a denoiser, and products with its Jacobian, counted for single images."""

    evaluations: int
    products: int


def work_of(checkpoint: Checkpoint, settings: EvaluationSettings, num_fit: int) -> Work:
    """Count what an evaluation takes, without an ODE, which finds its number of steps by itself.

    Args:
        checkpoint: What is evaluated.
        settings: Of the evaluation.
        num_fit: Training images that are there to fit to.
    """
    steps = steps_of(checkpoint.denoiser.schedule, settings.step_counts)
    visited = {t for _, t in steps}
    variances, calibrations = lacking(checkpoint, settings)
    fitted = {*variances, *calibrations} & {*named("fitted")}
    scored = settings.num_images * len(visited)
    drawn = settings.num_samples * sum(settings.step_counts)

    def products(name: str) -> int:
        plain = name.removesuffix(CALIBRATED)
        return num_products(plain, checkpoint, settings.covariances)

    def calibrated_at(name: str) -> int:
        by_step = (
            name not in named("fitted")
            and build_covariance(name, checkpoint, settings.covariances).depends_on_s
        )
        return len(steps if by_step else visited | {1})

    # (evaluations, products beside each): all covariances are scored by the same evaluation.
    counted = [
        (scored, sum(map(products, settings.scored))),
        *((num_fit * len(visited | {1}), 0) for _ in fitted),
        *((num_fit * calibrated_at(name), products(name)) for name in calibrations),
        *((drawn, products(name)) for name in settings.drawn for _ in SAMPLERS),
    ]
    return Work(sum(number for number, _ in counted), sum(n * each for n, each in counted))


def seconds_of(work: Work, checkpoint: Checkpoint, settings: EvaluationSettings) -> float:
    """Return about how many seconds the work takes.

    Some evaluations and products are timed, at the batch size of the evaluation and on the device
    of its denoiser.
    """
    denoiser, count = checkpoint.denoiser, min(settings.batch_size, settings.num_images)
    x0 = torch.zeros(count, *checkpoint.image_shape)
    classes = torch.zeros(count, dtype=torch.int64) if denoiser.takes_labels else None
    visited = sorted({t for _, t in steps_of(denoiser.schedule, settings.step_counts)})
    num_probes = settings.covariances.num_probes

    @torch.no_grad()
    def with_products(number: int) -> None:
        condition = labelled(denoiser, classes, 0, count)
        prediction = noisy_prediction(
            denoiser, x0, visited[len(visited) // 2], 0, condition=condition
        )
        if number:
            prediction = prediction.by(denoiser)
            hessdiag.estimate(prediction.covariance_terms[2], max_probes=number)
        prediction.x0_hat.sum().item()  # waits for a GPU

    evaluation = _seconds(lambda: with_products(0)) / count
    seconds = work.evaluations * evaluation
    if work.products:
        more = _seconds(lambda: with_products(num_probes)) / count - evaluation
        seconds += work.products * max(more, 0.0) / num_probes
    return seconds


def _seconds(call: Callable[[], None]) -> float:
    call()
    start = time.perf_counter()
    for _ in range(_MEASURED):
        call()
    return (time.perf_counter() - start) / _MEASURED


def left_out(checkpoint: Checkpoint, settings: EvaluationSettings) -> str | None:
    """Return a sentence on the covariances that a choice by default leaves out, or None."""
    scored = [name for name in available(checkpoint) if name not in settings.names]
    drawn = [name for name in settings.names if settings.quality and name not in settings.drawn]
    products = math.prod(checkpoint.image_shape)
    parts = [f"{_listed(scored)}, which take {products} products a step"] if scored else []
    parts += [f"from the samples {_listed(drawn)}, which take products"] if drawn else []
    said = "left out, unless --covariance names them:"
    return f"{said} {'; '.join(parts)}" if parts else None


def announcement(
    checkpoint: Checkpoint, settings: EvaluationSettings, num_fit: int, images: Images
) -> list[str]:
    """Return what will be done, in lines.

    Args:
        checkpoint: What is evaluated.
        settings: Of the evaluation.
        num_fit: Training images that are there to fit to.
        images: The data set, with whose training images samples are compared.
    """
    variances, calibrations = lacking(checkpoint, settings)
    counts = _listed(map(str, settings.step_counts))
    lines = [
        f"bits/dim of {settings.num_images} images in K = {counts} steps (--steps) by the "
        f"covariances {_listed(settings.scored)}"
    ]
    if variances or calibrations:
        lines.append(
            f"fits to {num_fit} training images: {len(variances)} analytic variances, "
            f"{len(calibrations)} calibrations"
        )
    if settings.quality:
        lines.append(
            f"{settings.num_samples} samples for each of {len(settings.drawn)} covariances, each K "
            f"and each of {_listed(SAMPLERS)}, compared with {len(images.train)} images"
        )
        fewest = min(len(images.train), len(images.test))  # held-out ones are compared too
        caution = frechet_caution(fewest, settings.num_samples, settings.num_features)
        if caution is not None:
            lines.append(f"caution: {caution}")
    if settings.by_ode:
        lines.append("the likelihood by the ODE, which finds its number of steps by itself")
    work = work_of(checkpoint, settings, num_fit)
    count = min(settings.batch_size, settings.num_images)
    minutes = seconds_of(work, checkpoint, settings) / 60
    lines.append(
        f"in all {work.evaluations:,} evaluations of the denoiser for an image and "
        f"{work.products:,} products with its Jacobian: an estimated {minutes:.1f} minutes, "
        f"by a few of them in batches of {count} on {checkpoint.denoiser.device}"
        + (", without the ODE" if settings.by_ode else "")
    )
    return lines


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
