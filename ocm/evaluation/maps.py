"""Uncertainty maps as pictures, and whether they may be believed.

For example::

    maps = [ocm.uncertainty(model, t, image=images) for t in (200, 500)]
    ocm.evaluation.maps.draw_maps(maps, path)
    rows = ocm.evaluation.maps.reliability(model, held_out, [50, 200, 500, 800])
    ocm.evaluation.maps.draw_reliability({"OCM head": rows}, path)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.conditions import Condition
from ocm.evaluation.pictures import pyplot, save_figure
from ocm.evaluation.scores import Estimate, estimate
from ocm.integrations.uncertainty import UncertaintyMap, uncertainty

_MARKERS = "osD^v<>P"


@dataclass(frozen=True)
class Reliability:
    """How the errors of held-out images compare with the stated standard deviations, at one t.

    Attributes:
        t: The noise level.
        standardised_error: Mean of (x0 - x0_hat)^2 / std^2: 1 for honest maps, above 1 for those
            that are too sure. With its standard error over images.
        within_two: Share of errors within two standard deviations, 0.954 for Gaussian ones.
        correlation: Spearman's, of std and the absolute error of all dimensions: what a map tells.
            None where std is the same everywhere. Even the true std stays far below 1.
        log_density: Mean log N(x0; x0_hat, std^2) of a dimension, a proper score: of two maps the
            better one has the higher. Minus infinity where an error is taken for impossible.
        predicted: Root mean square of std in bins of as many dimensions each, from the surest.
        observed: Root mean square error of the same dimensions.
    """

    t: float
    standardised_error: Estimate
    within_two: float
    correlation: float | None
    log_density: float
    predicted: tuple[float, ...]
    observed: tuple[float, ...]


def reliability(
    model: Any,
    images: Tensor,
    timesteps: Sequence[float],
    *,
    conditions: Sequence[Condition] | None = None,
    batch_size: int = 16,
    num_bins: int = 10,
    seed: int = 0,
    **options: Any,
) -> tuple[Reliability, ...]:
    """Return how :func:`ocm.uncertainty` does on held-out images, a result for each noise level.

    Args:
        model: As :func:`ocm.uncertainty` takes it.
        images: Held-out images, shape (n, C, ...); some dozens are enough, as every pixel counts.
        timesteps: Noise levels.
        conditions: That of each batch.
        batch_size: Images at a time.
        num_bins: Bins of ``Reliability.predicted``.
        seed: Seed of all noise.
        options: Other arguments of :func:`ocm.uncertainty`.

    Raises:
        TypeError: If ``batch_size`` or ``num_bins`` is no int.
        ValueError: If one is below 1.
    """
    check_positive_int("batch_size", batch_size)
    check_positive_int("num_bins", num_bins)
    rows = []
    for t in timesteps:
        stds, errors = [], []
        for k, first in enumerate(range(0, len(images), batch_size)):
            batch = images[first : first + batch_size]
            condition = None if conditions is None else conditions[k]
            given: dict[str, Any] = {"image": batch, "condition": condition, "seed": seed}
            found = uncertainty(model, t, sample_offset=first, **given, **options)
            assert found.x0 is not None  # the image is given
            stds.append(found.std.double().cpu())
            errors.append((found.x0 - found.mean).double().cpu())
        rows.append(compared(t, torch.cat(stds), torch.cat(errors), num_bins))
    return tuple(rows)


def compared(t: float, std: Tensor, error: Tensor, num_bins: int = 10) -> Reliability:
    """Return the comparison of errors with standard deviations, both of shape (n, ...).

    Example:
        >>> std = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> row = compared(500, std, 2 * std, num_bins=2)
        >>> row.standardised_error.mean, row.within_two, round(row.correlation, 3)
        (4.0, 1.0, 1.0)
        >>> [round(value, 3) for value in (*row.predicted, *row.observed)]
        [1.581, 3.536, 3.162, 7.071]
    """
    std, error = std.double().flatten(1), error.double().flatten(1)
    standardised = torch.where(error == 0, 0.0, (error / std).square())
    log_density = -0.5 * standardised - std.log() - 0.5 * math.log(2 * math.pi)
    log_density = torch.where(standardised.isinf(), -math.inf, log_density)
    by_std = std.flatten().argsort()
    bins = by_std.tensor_split(num_bins)
    return Reliability(
        t,
        estimate(standardised.mean(dim=1)),
        (standardised <= 4).double().mean().item(),
        _spearman(std.flatten(), error.abs().flatten()),
        log_density.mean().item(),
        tuple(std.flatten()[b].square().mean().sqrt().item() for b in bins),
        tuple(error.flatten()[b].square().mean().sqrt().item() for b in bins),
    )


def _spearman(a: Tensor, b: Tensor) -> float | None:
    correlation = torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].item()
    return None if math.isnan(correlation) else correlation  # equal numbers alone


def _ranks(values: Tensor) -> Tensor:
    """Return ranks, float64; equal values share their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return middle[place]


def draw_reliability(
    rows: Mapping[str, Sequence[Reliability]],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Draw standardised errors by noise level, and predicted against observed errors.

    Args:
        rows: Name and results of :func:`reliability`; each has a colour of its own.
        path: Where the PNG goes.
        title: Stands above.
    """
    levels = sorted({row.t for found in rows.values() for row in found})
    figure, axes = pyplot().subplots(
        1, 1 + len(levels), figsize=(3.6 * (1 + len(levels)), 4.0), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    first, *others = axes.flat
    first.axhline(1.0, color="black", linewidth=1)
    first.set(yscale="log", xlabel="timestep t", ylabel="mean of (x₀ - mean)² / std²")
    first.set_title("Standardised error: 1 is right,\nabove it a map is too sure", fontsize=10)
    own = pyplot().rcParams["axes.prop_cycle"].by_key()["color"]
    for k, (name, found) in enumerate(rows.items()):
        marker = _MARKERS[k % len(_MARKERS)]
        look: dict[str, Any] = {"color": own[k % len(own)], "marker": marker, "label": name}
        finite = [row for row in found if row.standardised_error.mean < math.inf]
        errors = [2 * (row.standardised_error.standard_error or 0.0) for row in finite]
        means = [row.standardised_error.mean for row in finite]
        first.errorbar([row.t for row in finite], means, errors, capsize=2, **look)
        for axis, t in zip(others, levels, strict=True):
            for row in (row for row in found if row.t == t):
                axis.plot(row.predicted, row.observed, markersize=4, **look)
    for axis, t in zip(others, levels, strict=True):
        low = min(min(row.observed) for found in rows.values() for row in found if row.t == t)
        high = max(max(row.observed) for found in rows.values() for row in found if row.t == t)
        ends = [0.6 * max(low, 1e-3 * high), 1.5 * high]
        axis.plot(ends, ends, color="black", linewidth=1)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted std, by bins")
        for along in (axis.xaxis, axis.yaxis):
            _plain_ticks(along, ends)
        axis.set_title(f"t = {t:g}", fontsize=10)
        axis.set_aspect("equal")
    if others:
        others[0].set_ylabel("root mean square error of the bin")
    _plain_ticks(first.yaxis, first.get_ylim())
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _plain_ticks(along: Any, ends: Sequence[float]) -> None:
    """Label a logarithmic axis by plain numbers: 1, 2 and 5, or powers of ten if it is long."""
    from matplotlib.ticker import NullLocator

    digits = (1, 2, 5) if ends[1] < 100 * ends[0] else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 7) for digit in digits]
    ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    along.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    along.set_minor_locator(NullLocator())


def draw_maps(
    maps: UncertaintyMap | Sequence[UncertaintyMap],
    path: str | Path,
    *,
    title: str = "",
    most: int = 6,
) -> None:
    """Draw noisy images, means and maps side by side, and errors where the truth is known.

    Images have a row each, noise levels stand beside one another. Of videos the first one is drawn:
    its frames run along the columns, and noise levels stand below one another. Maps and errors of
    a noise level share a scale of colours, in the units of x0; over channels they are root mean
    squares. Latents are shown by their first three channels.

    Args:
        maps: One or several noise levels, of the same images.
        path: Where the PNG goes.
        title: Stands above.
        most: Most images or frames that are drawn.
    """
    maps = [maps] if isinstance(maps, UncertaintyMap) else list(maps)
    is_video = maps[0].x_t.dim() == 5
    kinds = ("noisy", "mean", "std") + ("|error|",) * (maps[0].x0 is not None)
    count = min(most, maps[0].x_t.shape[2] if is_video else len(maps[0].x_t))
    rows, columns = (len(kinds), count) if is_video else (count, len(kinds))
    parts = (len(maps), 1) if is_video else (1, len(maps))
    width, height = 1.2 * columns * parts[1], (1.05 if is_video else 1.2) * rows * parts[0]
    size = (width + 0.9, height + (0.4 if is_video else 0.9) * parts[0])
    figure = pyplot().figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure.suptitle(title, fontsize=10)
    for part, found in zip(figure.subfigures(*parts, squeeze=False).flat, maps, strict=True):
        axes = part.subplots(rows, columns, squeeze=False)
        raised = f", {found.raised:.0%} of the variances raised" if found.raised >= 0.005 else ""
        part.suptitle(f"t = {found.t:g}{raised}", fontsize=9)
        values = _scalars(found)
        # The scale is that of the map; errors go beyond, and a few pixels of a map would darken it.
        highest = float(np.quantile(values[0].numpy(), 0.995))
        for k in range(count):
            shown = [_frame(x, k) for x in (found.x_t, found.mean, *values)]
            for kind, (name, pixels) in enumerate(zip(kinds, shown, strict=True)):
                row, column = (kind, k) if is_video else (k, kind)
                axis = axes[row, column]
                if kind < 2:
                    axis.imshow(_picture(pixels), cmap="gray", vmin=0, vmax=1)
                else:
                    scale = axis.imshow(pixels[0].numpy(), cmap="inferno", vmin=0, vmax=highest)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                if k == 0:
                    label = axis.set_ylabel if is_video else axis.set_title
                    label(name, fontsize=8)
        part.colorbar(
            scale,
            ax=axes,
            location="right" if is_video else "bottom",
            fraction=0.05,
            label="std of x₀, and error" if len(values) > 1 else "std of x₀",
            extend="max",
        )
    save_figure(figure, path)


def _scalars(found: UncertaintyMap) -> list[Tensor]:
    """Return the map, and the error if there is one: root mean squares over the channels."""
    values = [found.std] if found.x0 is None else [found.std, found.x0 - found.mean]
    return [v.detach().float().cpu().square().mean(dim=1, keepdim=True).sqrt() for v in values]


def _frame(values: Tensor, k: int) -> Tensor:
    """Return image k, or frame k of the first video, (C, H, W)."""
    chosen = values[0, :, k] if values.dim() == 5 else values[k]
    return chosen.detach().float().cpu()


def _picture(pixels: Tensor) -> Any:
    """Return pixels in [0, 1] of an image in [-1, 1], or of the channels of latents."""
    channels = len(pixels)
    if channels not in (1, 3):
        pixels = pixels[:3] if channels > 3 else pixels[:1]
        low, high = pixels.aminmax()
        pixels = 2 * (pixels - low) / (high - low).clamp(min=1e-12) - 1
    return ((pixels.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).squeeze(-1).numpy()
