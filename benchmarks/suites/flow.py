"""Few steps on any path: exact moments on Gaussian data, and samples of Fashion-MNIST.

The first part has no noise and no training: with a perfect network on Gaussian data every step of a
sampler is affine, so the mean and the covariance of its samples are computed, and not estimated.
They are checked once by drawing samples.

The second part trains a flow and a variance-preserving model on Fashion-MNIST, where it is at hand.
Its states and finished parts are kept below ``.cache/benchmarks``; a run that was interrupted goes
on there, and a finished one is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fashion import evaluation
from fashion import report as fashion_report
from fashion.sizes import QUICK as QUICK_FASHION
from fashion.sizes import REDUCED
from harness.gaussian_flow import (
    PATHS,
    PEERS,
    AffineStep,
    Gaussian,
    correlated_gaussian,
    covariances,
    exact_denoiser,
    moments,
    sampled,
    steps_of_sampler,
    velocity,
)
from harness.timing import Setting
from torch import Tensor

import ocm
from ocm.diffusion.timesteps import trailing_timesteps
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.evaluation.pictures import pyplot, save_figure
from ocm.sampling.samplers import Sampler, renoised

SEED = 0
LAMBDAS = (0.0, 0.3, 0.7, 1.0)
SAMPLERS: dict[str, Sampler] = {
    **{f"λ = {noise:g} σ": partial(renoised, noise=noise) for noise in LAMBDAS},
    "DDIM": ocm.ddim,
    "DDPM": ocm.ddpm,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the exact moments.

    Attributes:
        dimensions: Of the data.
        step_counts: Numbers of steps K.
        checked: The K at which samples are drawn.
        num_samples: How many.
    """

    dimensions: int = 8
    step_counts: tuple[int, ...] = (2, 3, 5, 10)
    checked: int = 3
    num_samples: int = 5_000


QUICK = Sizes(dimensions=4, step_counts=(2, 3), num_samples=500)


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    sizes = QUICK if setting.quick else Sizes()
    record: Row = {
        "suite": "flow",
        "seeds": {"data, and samples that check the moments": SEED},
        "environment": environment(setting.device),
        "moments": exact_moments(sizes),
        "fashion": None,
    }
    if (setting.fashion_mnist / "train.parquet").exists():
        size = QUICK_FASHION if setting.quick else REDUCED
        found = evaluation.evaluate(work_directory(size.name), setting.fashion_mnist, size)
        record["fashion"] = found
        record["seeds"] |= found["seeds"]
    else:
        print(f"no train.parquet in {setting.fashion_mnist}: no model is trained")
    return record, report(record)


def work_directory(size: str) -> Path:
    """Return where the suite keeps what it trains and has finished."""
    return Path(__file__).parents[2] / ".cache" / "benchmarks" / f"fashion-{size}"


# Exact moments


def exact_moments(sizes: Sizes) -> Row:
    """Return errors of mean and covariance for every path, sampler, covariance and K."""
    data, rows = correlated_gaussian(sizes.dimensions, SEED), []
    for path in PATHS:
        denoiser = exact_denoiser(path, data)
        for K in sizes.step_counts:
            timesteps = trailing_timesteps(denoiser.schedule, K)
            check = sizes.num_samples if K == sizes.checked else 0
            stated = covariances(denoiser, data, timesteps)
            for name, sampler in SAMPLERS.items():
                for kind, covariance in stated.items():
                    steps = steps_of_sampler(denoiser, covariance, sampler, timesteps)
                    row = {"path": path, "K": K, "method": name, "covariance": kind}
                    draw = partial(_by_ocm, denoiser, covariance, sampler, timesteps)
                    rows.append(row | _errors(denoiser, data, steps, check, draw))
            rows += _peers(path, denoiser, data, timesteps, check)
    correlations = (
        data.covariance / data.covariance.diagonal().outer(data.covariance.diagonal()).sqrt()
    )
    return {
        "dimensions": sizes.dimensions,
        "num_samples": sizes.num_samples,
        "mean_variance": data.covariance.diagonal().mean().item(),
        "largest_correlation": (correlations - torch.eye(sizes.dimensions)).abs().max().item(),
        "sources": {peer.name: peer.source for peer in PEERS},
        "rows": rows,
    }


def _peers(
    path: str, denoiser: ocm.Denoiser, data: Gaussian, timesteps: Sequence[float], check: int
) -> list[Row]:
    sigmas = [*denoiser.schedule.sigma(torch.tensor(timesteps)).tolist()[::-1], 0.0]
    rows = []
    for peer in PEERS:
        if path in peer.paths:
            steps = peer.steps(velocity(denoiser), sigmas, len(data.mean))
            row = {"path": path, "K": len(timesteps), "method": peer.name, "covariance": None}
            draw: Callable[[int], Tensor] = partial(
                sampled, steps, denoiser.schedule.prior_std, seed=SEED
            )
            if path == "flow" and peer.name in _OF_DIFFUSERS:
                draw = partial(_by_diffusers, denoiser, sigmas[:-1], **_OF_DIFFUSERS[peer.name])
            rows.append(row | _errors(denoiser, data, steps, check, draw))
    return rows


_OF_DIFFUSERS: dict[str, dict[str, bool]] = {
    "Euler": {},
    "stochastic_sampling": {"stochastic_sampling": True},
}


def _errors(
    denoiser: ocm.Denoiser,
    data: Gaussian,
    steps: Sequence[AffineStep],
    check: int,
    draw: Callable[[int], Tensor],
) -> Row:
    """Return how far the samples' moments are from the data's, and drawn ones from the exact.

    In the covariance and of the drawn one relative Frobenius norms; in the mean, relative to the
    root of the covariance's trace.
    """
    mean, covariance = moments(denoiser.schedule.prior_std, steps)
    scale = data.covariance.norm()
    row: Row = {
        "mean_error": ((mean - data.mean).norm() / data.covariance.trace().sqrt()).item(),
        "covariance_error": ((covariance - data.covariance).norm() / scale).item(),
        "variance_ratio": (covariance.trace() / data.covariance.trace()).item(),
    }
    if check:
        drawn = draw(check).double()
        # Of a sample covariance: E |S - C|_F^2 = (tr C^2 + (tr C)^2) / n.
        expected = ((covariance.square().sum() + covariance.trace() ** 2) / check).sqrt()
        row["sampled_covariance_in_standard_errors"] = (
            (drawn.T.cov() - covariance).norm() / expected
        ).item()
        row["sampled_mean_in_standard_errors"] = (
            (drawn.mean(0) - mean).norm() / (covariance.trace() / check).sqrt()
        ).item()
    return row


def _by_ocm(
    denoiser: ocm.Denoiser,
    covariance: ocm.Covariance,
    sampler: Sampler,
    timesteps: Sequence[float],
    count: int,
) -> Tensor:
    return ocm.sample(
        denoiser,
        covariance,
        (count, denoiser.backbone.data.mean.numel()),
        timesteps,
        sampler=sampler,
        seed=SEED,
        x0_range=None,
        noise_at_end=True,
        dtype=torch.float64,
    )


@torch.no_grad()
def _by_diffusers(
    denoiser: ocm.Denoiser, sigmas: Sequence[float], count: int, **options: Any
) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(sigmas=list(sigmas))
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(count, denoiser.backbone.data.mean.numel(), generator=generator)
    for t in scheduler.timesteps:
        output = denoiser.predict(x, t.item()).output
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


# Tables


def report(record: Row) -> str:
    """Return the tables of a record."""
    sections = _moments_tables(record["moments"])
    if record["fashion"] is None:
        return "\n\n".join([*sections, "Fashion-MNIST was not at hand: no model was trained."])
    return "\n\n".join([*sections, *fashion_report.tables(record["fashion"])])


# In the plot: what is compared, from the least error on.
_DRAWN = {
    ("λ = 1 σ", "diagonal"): "λ = σ, exact diagonal",
    ("λ = 0 σ", "diagonal"): "λ = 0, exact diagonal",
    ("λ = 0 σ", "analytic"): "λ = 0, analytic",
    ("Heun", None): "Heun, K steps",
    ("Euler", None): "Euler",
    ("stochastic_sampling", None): "stochastic sampling",
    ("Flow-SDE, a = 0.7", None): "Flow-SDE, a = 0.7",
    ("CPS, 0.8", None): "CPS, 0.8",
}


def plot(record: Row, path: Path) -> None:
    """Draw errors of the covariance on a flow, distances, and samples of each model."""
    fashion = record["fashion"]
    models = [] if fashion is None else fashion["models"]
    figure, axes = pyplot().subplots(
        1, 1 + len(models), figsize=(5.2 * (1 + len(models)), 5.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    axis = axes[0, 0]
    for (method, kind), name in _DRAWN.items():
        rows = [
            row
            for row in record["moments"]["rows"]
            if (row["path"], row["method"], row["covariance"]) == ("flow", method, kind)
        ]
        axis.plot(
            [row["K"] for row in rows],
            [row["covariance_error"] for row in rows],
            marker="o",
            linestyle="-" if kind else ":",
            label=name,
        )
    axis.set(yscale="log", xlabel="steps K", ylabel="relative error of the covariance")
    axis.set_title("Gaussian data, a flow; the full covariance errs by 0", fontsize=10)
    for axis, model in zip(axes.flat[1:], models, strict=True):
        fashion_report.draw_distances(axis, model)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    save_figure(figure, path)
    if fashion is not None:
        fashion_report.plot(fashion, work_directory(fashion["settings"]["name"]), path)


def _moments_tables(found: Row) -> list[str]:
    rows = found["rows"]
    counts = sorted({row["K"] for row in rows})
    sections = [
        "**Exact moments.** A perfect network on Gaussian data in "
        f"{found['dimensions']} dimensions (mean variance {found['mean_variance']:.2f}, largest "
        f"correlation {found['largest_correlation']:.2f}), K steps at trailing timesteps, noise at "
        "the end. The relative error of the samples' covariance in the Frobenius norm, computed "
        "and not estimated. A zero covariance is the sampler as others have it.",
    ]
    for path in dict.fromkeys(row["path"] for row in rows):
        lines: dict[tuple[str, str], Row] = {}
        for row in rows:
            if row["path"] == path:
                kind = row["covariance"] or ""
                line = lines.setdefault(
                    (row["method"], kind), {"sampler": row["method"], "covariance": kind}
                )
                line[f"K = {row['K']}"] = _number(row["covariance_error"])
        columns = {"sampler": "", "covariance": ""} | {f"K = {K}": ">" for K in counts}
        sections += [f"Path {path}", markdown_table(list(lines.values()), columns)]
    checked = [row for row in rows if "sampled_covariance_in_standard_errors" in row]
    for what in ("covariance", "mean"):
        worst = max(checked, key=lambda row: row[f"sampled_{what}_in_standard_errors"])
        sections.append(
            f"{found['num_samples']:,} samples drawn by each sampler at K = {worst['K']} have the "
            f"{what} computed here up to {worst[f'sampled_{what}_in_standard_errors']:.2f} of the "
            "root mean square error of that many samples."
        )
    means = max(rows, key=lambda row: row["mean_error"])
    sections.append(
        f"The error of the mean is at most {_number(means['mean_error'])} of the root of the "
        f"covariance's trace ({means['path']}, {means['method']}, K = {means['K']})."
    )
    sources = "; ".join(f"{name}: {source}" for name, source in found["sources"].items())
    return [*sections, f"Formulas of the others are from {sources}."]


def _number(value: float) -> str:
    """Return a figure with three digits, or what is zero but for rounding."""
    return "0" if value < 1e-10 else f"{value:.3g}" if value < 1e-3 else f"{value:.3f}"
