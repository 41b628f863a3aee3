"""Covariances on 2-D mixtures with the true score, against the closed form at every noise level.

All heads are the same network on the same features, trained by the same number of steps on the same
data, noise and timesteps; they differ in their loss and in what their output means. The error is
that of Var[x0 | x_t] as stated, before anything is clipped, over draws of q(x_t).
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import Setting, markdown
from torch import Tensor

import ocm
from ocm.environment import Row, environment
from ocm.toy import Mixture, correlated_mixture, mixture_denoiser, nine_gaussians
from ocm.training import mean_of_last

MIXTURES = {"nine Gaussians": nine_gaussians, "correlated mixture": correlated_mixture}
TIMESTEPS = (5, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
HEADS: dict[str, type[Any]] = {
    "NPR": ocm.NPR,
    "SN": ocm.SN,
    "I-DDPM": ocm.ImprovedDDPM,
    "OCM": ocm.OptimalCovarianceMatching,
}
PROBES = (1, 10, 100)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_STYLES = {
    "NPR": ("#E69F00", "s"),
    "SN": ("#009E73", "^"),
    "I-DDPM": ("#CC79A7", "D"),
    "OCM": ("#0072B2", "o"),
    "Analytic": ("#000000", "x"),
    "Hutchinson-1": ("#777777", "v"),
    "Hutchinson-100": ("#777777", "P"),
}
_LINES = {"paper": ":", "preconditioned": "-", "preconditioned, positive": "--", "": "-"}


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its Markdown tables."""
    settings = _training_settings(setting.quick)
    data_size, test_size = _sizes(setting.quick)
    # A thread each: networks this small gain nothing from more.
    with ProcessPoolExecutor(len(MIXTURES), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_of_mixture, MIXTURES, [setting] * len(MIXTURES)))
    record = {
        "suite": "toy",
        "schedule": "linear",
        "prediction_type": "epsilon",
        "training": {
            "num_steps": settings.num_steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "warmup_steps": settings.warmup_steps,
            "ema_decay": settings.ema_decay,
            "seed": settings.seed,
            "points": data_size,
            "probes_per_target": 1,
        },
        "test_points": test_size,
        "environment": environment(setting.device) | {"threads": 1},
        "heads": [head for heads, _ in results for head in heads],
        "rows": [row for _, rows in results for row in rows],
    }
    return record, _report(record)


def _training_settings(quick: bool) -> ocm.TrainingSettings:
    return ocm.TrainingSettings(
        num_steps=20 if quick else 2000,
        batch_size=64 if quick else 512,
        learning_rate=5e-3,
        warmup_steps=5 if quick else 100,
        ema_decay=0.9 if quick else 0.998,
    )


def _sizes(quick: bool) -> tuple[int, int]:
    """Return the number of points to train on and to test on."""
    return (1000, 500) if quick else (100_000, 20_000)


def _of_mixture(name: str, setting: Setting) -> tuple[list[Row], list[Row]]:
    """Return what the training of each head took, and the errors, on one mixture."""
    torch.set_num_threads(1)
    settings, (data_size, test_size) = _training_settings(setting.quick), _sizes(setting.quick)
    schedule, mixture = ocm.linear(), MIXTURES[name]()
    denoiser = mixture_denoiser(mixture, schedule)
    denoiser.backbone.to(setting.device)
    x0 = mixture.sample(data_size, seed=0).to(setting.device)
    test = mixture.sample(test_size, seed=1)
    points = {t: _noisy(mixture, schedule, test, t, setting.device) for t in TIMESTEPS}
    rows: list[Row] = []
    for M in PROBES:
        probed = ocm.Hutchinson(denoiser, M)
        rows += _errors(name, f"Hutchinson-{M}", "", denoiser, probed, points, torch.float64)
    analytic = ocm.fit_analytic(denoiser, x0, TIMESTEPS)
    rows += _errors(name, "Analytic", "", denoiser, analytic, points)
    training: list[Row] = []
    for method, kind, covariance in _heads(denoiser, mixture):
        start = time.perf_counter()
        losses = ocm.train_head(covariance, x0, settings, progress=False)
        training.append(
            {
                "mixture": name,
                "method": method,
                "parameterisation": kind,
                "seconds": time.perf_counter() - start,
                "final_loss": mean_of_last(losses),
            }
        )
        rows += _errors(name, method, kind, denoiser, covariance, points)
        cells = " ".join(f"{row['relative']:.1e}" for row in rows[-len(TIMESTEPS) :])
        print(f"{name}, {method}, {kind}: {training[-1]['seconds']:.0f} s, {cells}", flush=True)
    return training, rows


def _heads(
    denoiser: ocm.Denoiser, mixture: Mixture
) -> list[tuple[str, str, ocm.LearnedCovariance]]:
    preconditioned = ocm.Parameterisation(data_std=mixture.std)
    kinds = {"paper": ocm.PAPER, "preconditioned": preconditioned}
    heads = []
    for method, make in HEADS.items():
        several = dict(kinds)
        if method == "OCM":
            positive = ocm.Parameterisation(data_std=mixture.std, positive=True)
            several["preconditioned, positive"] = positive
        # The score is the true one: no error of a network is to be weighted down.
        options = {"network_error": 0.0} if method in ("NPR", "OCM") else {}
        for kind, parameterisation in several.items():
            head = ocm.make_head(denoiser)
            heads.append((method, kind, make(denoiser, head, parameterisation, **options)))
    return heads


def _noisy(
    mixture: Mixture, schedule: ocm.Schedule, x0: Tensor, t: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return draws of q(x_t), float32, and their Var[x0 | x_t], float64."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
    x_t = schedule.diffuse(x0, t, noise)
    truth = mixture.posterior_covariance(x_t, t, schedule).diagonal(dim1=1, dim2=2)
    return x_t.to(device), truth


def _errors(
    mixture: str,
    method: str,
    kind: str,
    denoiser: ocm.Denoiser,
    covariance: ocm.Covariance,
    points: dict[int, tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    rows: list[Row] = []
    for t, (x_t, truth) in points.items():
        variance = covariance.at(denoiser.predict(x_t.to(dtype), t)).diagonal().double().cpu()
        squares = (variance - truth).square().mean(dim=1)
        mse, size = squares.mean().item(), truth.square().mean().item()
        rows.append(
            {
                "mixture": mixture,
                "method": method,
                "parameterisation": kind,
                "t": t,
                "mse": mse,
                "mse_standard_error": (squares.std() / len(squares) ** 0.5).item(),
                "mean_squared_variance": size,
                "relative": mse / size,
            }
        )
    return rows


def _report(record: Row) -> str:
    settings = record["training"]
    sections = [
        "Mean squared error of Var[x0 | x_t] over the mean squared variance, with the true score "
        f"({record['schedule']} schedule). Heads: {settings['num_steps']} steps of "
        f"{settings['batch_size']} points, one probe a target; {record['test_points']} test points "
        "a noise level. Hutchinson in float64, the rest in float32."
    ]
    for mixture in MIXTURES:
        table: dict[tuple[str, str], Row] = {}
        for row in record["rows"]:
            if row["mixture"] == mixture:
                key = (row["method"], row["parameterisation"])
                cells = table.setdefault(key, {"method": key[0], "parameterisation": key[1]})
                cells[f"t = {row['t']}"] = row["relative"]
        columns = {"method": "", "parameterisation": ""} | {f"t = {t}": ".1e" for t in TIMESTEPS}
        sections.append(f"**{mixture}**\n\n" + markdown(list(table.values()), columns))
    return "\n\n".join(sections)


def plot(record: Row, out: Path) -> None:
    """Draw the relative error against the noise level, a panel for each mixture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for panel, mixture in zip(panels, MIXTURES, strict=True):
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in record["rows"]:
            if row["mixture"] == mixture and row["method"] in _STYLES:
                key = (row["method"], row["parameterisation"])
                curves.setdefault(key, []).append((row["t"], row["relative"]))
        for (method, kind), points in curves.items():
            # Exact on a product density, which no logarithmic axis shows.
            if method.startswith("Hutchinson") and mixture == "nine Gaussians":
                continue
            colour, marker = _STYLES[method]
            ts, errors = zip(*points, strict=True)
            panel.plot(
                ts,
                errors,
                marker=marker,
                markersize=5,
                linestyle=_LINES[kind],
                linewidth=2.2 if method == "OCM" else 1.2,
                markerfacecolor="white" if kind == "paper" else colour,
                color=colour,
                label=f"{method}, {kind}" if kind else method,
                zorder=3 if method == "OCM" else 2,
            )
        panel.set(xlabel="timestep t", yscale="log")
        panel.set_title(mixture, fontsize=10)
        panel.grid(alpha=0.25)
    panels[0].set(ylabel=r"relative squared error of $\mathrm{Var}[x_0 \mid x_t]$")
    panels[0].text(
        0.02, 0.02, "Hutchinson is exact here", transform=panels[0].transAxes, fontsize=8
    )
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=8, handlelength=4.0
    )
    figure.savefig(out, dpi=130, facecolor="white")
    plt.close(figure)
