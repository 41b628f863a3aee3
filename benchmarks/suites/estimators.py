"""Estimators on a trained U-Net: what each costs, how far off it is, and how soon it is near.

The truth is the whole Jacobian of the U-Net at held-out images, at five noise levels. From it
follows the variance of every design in closed form; measured errors are compared with it before
anything is timed. The time to an error is then the time measured for a probe, times the probes
that the closed form asks for: the slow ways would take hours to get there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness.memory import peak_bytes
from harness.peers import ScoreFunction, curvlinops_diagonals, skerch_diagonals
from harness.timing import Setting, time_together
from harness.trained_unet import trained_unet
from torch import Tensor, nn

import hessdiag
from hessdiag.compat import forward_mode_operators
from hessdiag.probes import BalancedColoring, Coloring, ProbeDesign, Rademacher
from ocm import Denoiser
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.training.small_unet import small_unet
from suites.products import naive_loop

TIMESTEPS = (5, 50, 200, 500, 900)
_QUICK_TIMESTEPS = (50, 200)
PROBES = (1, 4, 12, 48, 192)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_CACHE = Path(__file__).parent.parent.parent / ".cache" / "benchmarks"


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    device, quick = setting.device, setting.quick
    trained = trained_unet(setting.data, _CACHE, device, quick=quick)
    images = trained.test_images[: 2 if quick else 8].to(device)
    timesteps = _QUICK_TIMESTEPS if quick else TIMESTEPS
    points = {t: _noisy(trained.denoiser, images, t) for t in timesteps}
    functions = {t: partial(trained.denoiser.output, t=t) for t in timesteps}
    jacobians = {t: hessdiag.jacobian(functions[t], x) for t, x in points.items()}

    checks = _check(functions, points, jacobians, quick)
    passes = _passes(functions[200], points[200], quick)
    errors = _errors(functions, points, jacobians, quick)
    loop = _seconds_per_probe(passes, "loop over probes")
    ours = _seconds_per_probe(passes, "hutchinson, vjp")
    arrival = _time_to_error(jacobians, points, loop, ours)
    peers = _peers(functions[50], points[50][:1], jacobians[50][0], quick)
    growth = _growth(device, quick)
    memory = _memory(device)
    record = {
        "suite": "estimators",
        "network": trained.description,
        "images": len(images),
        "seeds": {"network": 0, "probes": "0 and on, as the rows say", "noise": "the timestep"},
        "checks": checks,
        "environment": environment(device),
        "passes": passes,
        "errors": errors,
        "time_to_error": arrival,
        "peers": peers,
        "growth": growth,
        "memory": memory,
    }
    return record, report(record)


def _noisy(denoiser: Denoiser, images: Tensor, t: int) -> Tensor:
    alpha_bar = denoiser.schedule.alpha_bar[t].item()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(t)).to(images)
    return math.sqrt(alpha_bar) * images + math.sqrt(1.0 - alpha_bar) * noise


# Variances in closed form


def variance(J: Tensor, design: ProbeDesign, max_probes: int, shape: tuple[int, ...]) -> Tensor:
    """Return the variance of each entry with whole blocks of a design, from J of (B, D, D).

    In reverse mode, where the product is with the transpose of J.
    """
    blocks = max_probes // design.block_size(shape)
    squares = J.double().square()
    features = torch.arange(J.shape[-1], device=J.device)
    squares[:, features, features] = 0.0
    if isinstance(design, Coloring):
        colors = design.colors(shape, J.device).flatten()
        squares = squares * (colors[:, None] == colors)
    energy = squares.sum(dim=1)
    if isinstance(design, BalancedColoring):
        count, colors = len(features), design.num_colors
        sizes = [len(range(color, count, colors)) for color in range(colors)]
        energy = energy * sum(size * (size - 1) for size in sizes) / (count * (count - 1))
    return energy / blocks


def strides(stride: int, shape: tuple[int, ...]) -> Tensor:
    """Return the usual coloring (row mod s, column mod s, channel), to compare with."""
    channels, height, width = (torch.arange(size) for size in shape)
    rows, columns = height % stride, width % stride
    return (channels[:, None, None] * stride + rows[:, None]) * stride + columns


def _stride_variance(J: Tensor, stride: int, shape: tuple[int, ...]) -> Tensor:
    colors = strides(stride, shape).flatten().to(J.device)
    squares = J.double().square() * (colors[:, None] == colors)
    features = torch.arange(J.shape[-1], device=J.device)
    squares[:, features, features] = 0.0
    return squares.sum(dim=1)


def _check(
    functions: dict[int, ScoreFunction],
    points: dict[int, Tensor],
    jacobians: dict[int, Tensor],
    quick: bool,
) -> Row:
    """Compare the Jacobian with jacrev's, and measured errors with the closed form, or raise."""
    t = 50
    x, J = points[t], jacobians[t]
    image, size = x[0], x[0].numel()
    rows = torch.func.vjp(lambda z: functions[t](z[None])[0], image)[1]
    picked = torch.linspace(0, size - 1, 16).long()
    units = torch.eye(size, device=x.device)[picked].reshape(-1, *image.shape)
    expected = torch.stack([rows(unit)[0] for unit in units]).reshape(16, size)
    checks: Row = {
        "jacobian to torch.func.vjp": ((J[0, picked] - expected).norm() / expected.norm()).item()
    }
    if not checks["jacobian to torch.func.vjp"] < 1e-4:
        raise RuntimeError(f"the Jacobian is wrong: {checks}")
    seeds = 20 if quick else 30
    for name, design in (("rademacher", Rademacher()), ("coloring 12", Coloring(12))):
        errors = torch.stack(
            [
                hessdiag.estimate(
                    functions[t], x, probes=design, max_probes=12, seed=seed, mode="vjp"
                ).diagonal.flatten(1)
                - J.diagonal(dim1=1, dim2=2)
                for seed in range(seeds)
            ]
        )
        ratio = errors.double().square().mean() / variance(J, design, 12, x.shape[1:]).mean()
        checks[f"measured over exact variance, {name}"] = ratio.item()
        if not 0.85 < ratio < 1.15:
            raise RuntimeError(f"{name}: the measured variance is {ratio:.2f} times the exact one")
    return checks


# Costs


def _passes(score_fn: ScoreFunction, x: Tensor, quick: bool) -> list[Row]:
    """Time of M probes in passes, against the loop that runs the network for each."""
    rows: list[Row] = []
    for M in (4,) if quick else (4, 16, 48):
        candidates: dict[str, Callable[[], object]] = {
            "forward pass alone": lambda: torch.no_grad()(score_fn)(x),
            "loop over probes": lambda M=M: naive_loop(score_fn, x, M),
            "hutchinson, vjp": lambda M=M: hessdiag.hutchinson(score_fn, x, M, mode="vjp"),
            "coloring, vjp": lambda M=M: hessdiag.estimate(
                score_fn, x, probes=Coloring(M), max_probes=M, mode="vjp"
            ),
            "hutchinson, vjp, fold": lambda M=M: hessdiag.estimate(
                score_fn, x, max_probes=M, mode="vjp", batching="fold"
            ),
            "hutchinson, jvp": lambda M=M: hessdiag.hutchinson(score_fn, x, M, mode="jvp"),
        }
        timings, ratios = time_together(
            candidates, device=x.device, rounds=3 if quick else 5, baseline="loop over probes"
        )
        forward = timings["forward pass alone"].median
        rows += [
            {
                "way": name,
                "B": len(x),
                "M": M,
                "milliseconds": 1e3 * timing.median,
                "milliseconds_min": 1e3 * timing.minimum,
                "milliseconds_max": 1e3 * timing.maximum,
                "over_loop": ratios[name],
                "over_forward": timing.median / forward,
                "megabytes": peak_bytes(candidates[name]) / 1e6,
            }
            for name, timing in timings.items()
        ]
    return rows


def _seconds_per_probe(passes: list[Row], way: str) -> Callable[[float], float]:
    """Return the seconds of M probes: those measured, a straight line beyond and between."""
    times = {row["M"]: row["milliseconds"] / 1e3 for row in passes if row["way"] == way}
    low, high = min(times), max(times)
    if low == high:
        return lambda M: times[low] * M / low
    slope = (times[high] - times[low]) / (high - low)
    return lambda M: times[low] + slope * (M - low)


def _errors(
    functions: dict[int, ScoreFunction],
    points: dict[int, Tensor],
    jacobians: dict[int, Tensor],
    quick: bool,
) -> list[Row]:
    """Measured relative error, and the variance of Rademacher probes over that of each design."""
    rows: list[Row] = []
    for t, J in jacobians.items():
        x, shape = points[t], tuple(points[t].shape[1:])
        truth = J.diagonal(dim1=1, dim2=2)
        for M in PROBES:
            plain = variance(J, Rademacher(), M, shape).mean()
            row: Row = {"t": t, "M": M}
            row["rademacher_error"] = (plain / truth.double().square().mean()).sqrt().item()
            row["coloring_gain"] = (plain / variance(J, Coloring(M), M, shape).mean()).item()
            row["orthogonal_gain"] = (
                plain / variance(J, BalancedColoring(M), M, shape).mean()
            ).item()
            stride = math.isqrt(M // shape[0])
            if M == shape[0] * stride**2:
                row["stride_gain"] = (plain / _stride_variance(J, stride, shape).mean()).item()
            seeds = max(1, (48 if quick else 192) // M)
            measured = torch.stack(
                [
                    hessdiag.estimate(
                        functions[t], x, probes="auto", max_probes=M, seed=seed, mode="vjp"
                    ).diagonal.flatten(1)
                    - truth
                    for seed in range(seeds)
                ]
            )
            error = measured.double().square().mean()
            row["auto_gain_measured"] = (plain / error).item()
            if M in (12, 48):
                row["xdiag_gain_measured"] = (
                    plain / _xdiag_error(functions[t], x, truth, M)
                ).item()
            row["auto_error"] = (error / truth.double().square().mean()).sqrt().item()
            row["seeds"] = seeds
            rows.append(row)
    return rows


def _xdiag_error(score_fn: ScoreFunction, x: Tensor, truth: Tensor, M: int) -> Tensor:
    errors = [
        hessdiag.xdiag(score_fn, x, num_probes=M, seed=seed).flatten(1) - truth
        for seed in range(48 // M)
    ]
    return torch.stack(errors).double().square().mean()


def _time_to_error(
    jacobians: dict[int, Tensor],
    points: dict[int, Tensor],
    loop: Callable[[float], float],
    ours: Callable[[float], float],
) -> list[Row]:
    """Time of each method to the error that a coloring of 12, 48 or 192 colors has."""
    rows: list[Row] = []
    for t, J in jacobians.items():
        shape = tuple(points[t].shape[1:])
        norm = J.diagonal(dim1=1, dim2=2).double().square().mean()
        single = variance(J, Rademacher(), 1, shape).mean()
        for colors in (12, 48, 192):
            target = variance(J, Coloring(colors), colors, shape).mean()
            needed = max(1.0, (single / target).item())
            features = J.shape[-1]
            rows.append(
                {
                    "t": t,
                    "relative_error": (target / norm).sqrt().item(),
                    "colors": colors,
                    "rademacher_probes": math.ceil(needed),
                    "loop_seconds": loop(needed),
                    "hutchinson_seconds": ours(needed),
                    "exact_seconds": ours(features),
                    "coloring_seconds": ours(colors),
                    "times_faster": loop(needed) / ours(colors),
                    # The loop over unit vectors is exact: nobody needs more of its passes.
                    "times_faster_than_exact_loop": min(loop(needed), loop(features))
                    / ours(colors),
                }
            )
    return rows


def _peers(score_fn: ScoreFunction, x: Tensor, J: Tensor, quick: bool) -> list[Row]:
    """Time and error of other libraries on one image, which is what they take."""
    M = 12 if quick else 48
    truth, size = J.diagonal(), x.numel()

    def image_score(image: Tensor) -> Tensor:
        return score_fn(image[None])[0]

    def matrix_diagonal(jacobian_of: Callable[[Tensor], Tensor]) -> Tensor:
        # Without these, forward mode fails in group_norm and attention.
        with forward_mode_operators():
            return jacobian_of(x[0]).reshape(size, size).diagonal()

    candidates: dict[str, Callable[[], Tensor]] = {
        "loop over probes": lambda: naive_loop(score_fn, x, M),
        "hessdiag.hutchinson": lambda: hessdiag.hutchinson(score_fn, x, M),
        "hessdiag.estimate, auto": lambda: (
            hessdiag.estimate(score_fn, x, probes="auto", max_probes=M).diagonal
        ),
        "hessdiag.exact": lambda: hessdiag.exact(score_fn, x),
    }
    if not quick:
        candidates |= {
            f"torch.func.jacrev, chunks of {chunk}": lambda chunk=chunk: matrix_diagonal(
                torch.func.jacrev(image_score, chunk_size=chunk)
            )
            for chunk in (1, 48)
        }
        candidates["torch.func.jacfwd"] = lambda: matrix_diagonal(torch.func.jacfwd(image_score))
    candidates |= curvlinops_diagonals(score_fn, x, M) | skerch_diagonals(score_fn, x, M)
    rows: list[Row] = []
    working = {}
    for name, compute in candidates.items():
        row: Row = {"method": name, "M": M}
        try:
            error = (compute().reshape(-1) - truth).norm() / truth.norm()
        except RuntimeError as failure:
            # Some peers cannot differentiate every network; the table says so. Ours must.
            if name.startswith("hessdiag"):
                raise
            row["note"] = str(failure).strip().splitlines()[0][:90]
        else:
            row["relative_error"], working[name] = error.item(), compute
        rows.append(row)
    timings, ratios = time_together(
        working, device=x.device, rounds=1 if quick else 3, baseline="loop over probes"
    )
    for row in rows:
        if row["method"] in timings:
            row["milliseconds"] = 1e3 * timings[row["method"]].median
            row["over_loop"] = ratios[row["method"]]
            row["megabytes"] = peak_bytes(working[row["method"]]) / 1e6
    return rows


def _growth(device: torch.device, quick: bool) -> list[Row]:
    """Time against image size, batch and probes, and where the exact diagonal costs as much."""
    rows: list[Row] = []
    # Image size, batch, probes.
    cases = [(size, 4, 16) for size in (8, 16, 32)]
    cases += [(16, batch, 16) for batch in (1, 16)] + [(16, 4, probes) for probes in (1, 4, 64)]
    for size, batch, M in cases[:1] if quick else cases:
        module = small_unet((3, size, size)).eval().requires_grad_(False).to(device)
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)

        def score_fn(z: Tensor, module: nn.Module = module) -> Tensor:
            return module(z, 200).sample

        candidates: dict[str, Callable[[], object]] = {
            "forward": lambda score_fn=score_fn, x=x: torch.no_grad()(score_fn)(x),
            "estimate": lambda score_fn=score_fn, x=x, M=M: hessdiag.hutchinson(score_fn, x, M),
        }
        if size <= 16 and batch <= 4 and M == 16:
            candidates["exact"] = lambda score_fn=score_fn, x=x: hessdiag.exact(score_fn, x)
        timings, _ = time_together(candidates, device=device, rounds=3, baseline="forward")
        features = x[0].numel()
        row: Row = {
            "D": features,
            "B": batch,
            "M": M,
            "forward_milliseconds": 1e3 * timings["forward"].median,
            "estimate_milliseconds": 1e3 * timings["estimate"].median,
            "passes": timings["estimate"].median / timings["forward"].median,
        }
        if "exact" in timings:
            exact = timings["exact"].median
            row["exact_milliseconds"] = 1e3 * exact
            row["crossing_probes"] = M * exact / timings["estimate"].median
        rows.append(row)
    return rows


def _memory(device: torch.device) -> list[Row]:
    """Peak memory against depth, in sizes of the input."""
    rows: list[Row] = []
    x = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    for depth in (4, 8, 16, 32):
        torch.manual_seed(0)
        layers = [
            layer
            for _ in range(depth)
            for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        ]
        module = nn.Sequential(*layers).requires_grad_(False).to(device)
        row: Row = {"layers": depth}
        for mode in ("vjp", "jvp"):
            peak = peak_bytes(
                lambda mode=mode, module=module: hessdiag.hutchinson(module, x, 4, mode=mode)
            )
            row[f"{mode}_inputs"] = peak / x.nbytes
        rows.append(row)
    return rows


def report(record: Row) -> str:
    """Return the tables of a record."""
    checks = ", ".join(f"{name}: {value:.2g}" for name, value in record["checks"].items())
    sections = [
        f"U-Net trained on {record['network']}; {record['images']} held-out images.",
        f"Checks: {checks}.",
        "**Cost of M probes**\n\n"
        + markdown_table(
            record["passes"],
            {
                "way": "",
                "B": "d",
                "M": "d",
                "milliseconds": ".1f",
                "over_loop": ".3f",
                "over_forward": ".1f",
                "megabytes": ".1f",
            },
        ),
        "**Error**: of Rademacher probes, relative to the diagonal; and the variance of Rademacher "
        "probes over that of others: exact, and of XDiag and `auto` as measured\n\n"
        + markdown_table(
            record["errors"],
            {
                "t": "d",
                "M": "d",
                "rademacher_error": ".4f",
                "coloring_gain": ".2f",
                "stride_gain": ".2f",
                "orthogonal_gain": ".2f",
                "xdiag_gain_measured": ".2f",
                "auto_gain_measured": ".2f",
                "seeds": "d",
            },
        ),
        "**Time to an error**, that of a coloring; the loop runs the network for each Rademacher "
        "probe\n\n"
        + markdown_table(
            record["time_to_error"],
            {
                "t": "d",
                "relative_error": ".5f",
                "colors": "d",
                "rademacher_probes": "d",
                "loop_seconds": ".2f",
                "hutchinson_seconds": ".2f",
                "exact_seconds": ".2f",
                "coloring_seconds": ".3f",
                "times_faster": ".1f",
                "times_faster_than_exact_loop": ".1f",
            },
        ),
        "**Other libraries**, one image at t = 50\n\n"
        + markdown_table(
            record["peers"],
            {
                "method": "",
                "M": "d",
                "relative_error": ".1e",
                "milliseconds": ".0f",
                "over_loop": ".3f",
                "megabytes": ".1f",
                "note": "",
            },
        ),
        "**Growth** with the number of features D, the batch B and the probes M; "
        "`crossing_probes` cost as much as the exact diagonal\n\n"
        + markdown_table(
            record["growth"],
            {
                "D": "d",
                "B": "d",
                "M": "d",
                "forward_milliseconds": ".1f",
                "estimate_milliseconds": ".1f",
                "passes": ".1f",
                "exact_milliseconds": ".0f",
                "crossing_probes": ".0f",
            },
        ),
        "**Peak memory** of 4 probes against depth, in sizes of the input\n\n"
        + markdown_table(
            record["memory"], {"layers": "d", "vjp_inputs": ".1f", "jvp_inputs": ".1f"}
        ),
    ]
    return "\n\n".join(sections)


def plot(record: Row, out: Path) -> None:
    """Draw the gain in variance against the number of probes, and peak memory against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    styles = zip(TIMESTEPS, _COLOURS, "osv^D", strict=True)
    for t, colour, marker in styles:
        rows = [row for row in record["errors"] if row["t"] == t]
        if not rows:
            continue
        gains = [row["coloring_gain"] for row in rows]
        left.plot([row["M"] for row in rows], gains, marker + "-", color=colour, label=f"t = {t}")
    left.axhline(1.0, color="#999999", linewidth=1.0)
    left.set(xscale="log", yscale="log", xlabel="probes M")
    left.set_xticks(PROBES, [str(M) for M in PROBES])
    left.set_title("Variance: Rademacher over coloring", fontsize=10)
    left.legend(fontsize=8)
    layers = [row["layers"] for row in record["memory"]]
    for mode, name, style in (("vjp", "reverse mode", "o-"), ("jvp", "forward mode", "s--")):
        inputs = [row[f"{mode}_inputs"] for row in record["memory"]]
        right.plot(layers, inputs, style, color=_COLOURS[mode == "jvp"], label=name)
    right.set(xlabel="convolutions", ylabel="sizes of the input", ylim=(0, None))
    right.set_xticks(layers)
    right.set_title("Peak memory of 4 probes", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(out, dpi=130, facecolor="white")
    plt.close(figure)
