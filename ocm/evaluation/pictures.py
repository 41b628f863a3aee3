"""Pictures: grids of samples, and the plots of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ocm.covariances.names import CALIBRATED, NAMES, label
from ocm.files import replacing

# Times the lowest value that an evaluation's plot reaches up to.
_TALLEST = 2.5


def sample_rows(rows: Mapping[str, Tensor], path: str | Path, *, title: str = "") -> None:
    """Draw one row of images in [-1, 1] for each entry, with its name at the left.

    Args:
        rows: Name and images, shape (n, C, H, W) with C = 1 or 3.
        path: Where the PNG goes.
        title: Stands above.
    """
    import torch
    from torch.nn.functional import pad

    longest = max(rows.values(), key=len)
    most, side = len(longest), longest.shape[-2] + 1  # a white pixel apart
    strips = []
    for images in rows.values():
        pixels = pad((images.detach().cpu().clamp(-1, 1) + 1) / 2, (0, 1, 0, 1), value=1.0)
        strip = torch.cat(list(pixels), dim=2)
        strips.append(pad(strip, (0, (most - len(images)) * pixels.shape[-1]), value=1.0))
    picture = torch.cat(strips, dim=1).permute(1, 2, 0).squeeze(-1)
    figure, axis = pyplot().subplots(
        figsize=(0.3 + 0.08 * max(map(len, rows)) + 0.58 * most, 0.4 + 0.58 * len(rows)),
        layout="compressed",
    )
    axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([row * side + side / 2 - 1 for row in range(len(rows))], list(rows))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)
    save_figure(figure, path)


def evaluation_plot(record: Mapping[str, Any], path: str | Path, *, title: str = "") -> None:
    """Draw bits/dim, and Fréchet distances where there are some, against the number of steps.

    Args:
        record: What `ocm evaluate` writes as JSON, or that file read again. Errors of variances, if
            it holds ``variance_relative_rms_error``, are drawn against the timestep.
        path: Where the PNG goes.
        title: Stands above.
    """
    bits, unit = record["nll_bits_per_dim"], "bits/dim on held-out images"
    plain = {name: row for name, row in bits.items() if not name.endswith(CALIBRATED)}
    calibrated = {name: row for name, row in bits.items() if name.endswith(CALIBRATED)}
    panels = [("Likelihood bound", unit, plain), ("Likelihood bound, calibrated", unit, calibrated)]
    for sampler, table in record.get("quality", {}).items():
        distances = {
            name: {K: cell["frechet"] for K, cell in row.items()}
            for name, row in table.items()
            if not name.endswith(CALIBRATED)
        }
        panels.append((f"Samples of {sampler.upper()}", "Fréchet distance", distances))
    panels = [panel for panel in panels if panel[2]]
    errors = record.get("variance_relative_rms_error")
    count = len(panels) + bool(errors)
    figure, axes = pyplot().subplots(
        1, count, figsize=(4.2 * count + 1.8, 4.2), squeeze=False, layout="constrained"
    )
    for axis, (heading, unit, rows) in zip(axes.flat, panels, strict=False):
        rows = {name: {int(K): value for K, value in row.items()} for name, row in rows.items()}
        _lines(axis, rows)
        lowest, top = axis.dataLim.ymin, _TALLEST * axis.dataLim.ymin
        if axis.dataLim.ymax > top:
            axis.set_ylim(lowest - 0.05 * (top - lowest), top)
            heading += "\n(what is higher leaves the plot)"
        axis.set(xscale="log", xlabel="steps K", ylabel=unit, title=heading)
        ticks = sorted({K for row in rows.values() for K in row})
        axis.set_xticks(ticks, [str(K) for K in ticks])
        axis.xaxis.minorticks_off()
    if errors:
        axis = axes.flat[-1]
        _lines(axis, errors)
        axis.set(yscale="log", xlabel="timestep t", ylabel="relative RMS error of Var[x₀ | xₜ]")
        axis.set_title("Variance against the exact diagonal")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    lines = max((axis.lines for axis in axes.flat), key=len)
    names = [line.get_label().removesuffix(", calibrated") for line in lines]
    figure.legend(lines, names, loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _lines(axis: Any, rows: Mapping[str, Mapping[int, float]]) -> None:
    for name, row in rows.items():
        color, marker = style(name)
        axis.plot(list(row), list(row.values()), color=color, marker=marker, label=label(name))


def style(name: str) -> tuple[str, str]:
    """Return the colour and the marker of a covariance, the same in every plot."""
    entry = NAMES.get(name.removesuffix(CALIBRATED))
    return ("#56B4E9", "d") if entry is None else (entry.colour, entry.marker)


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``, imported late and without a window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure on white, for readers of dark pages too, and close it."""
    with replacing(path) as file:
        figure.savefig(file, dpi=150, facecolor="white")
    figure.clear()
    pyplot().close(figure)
