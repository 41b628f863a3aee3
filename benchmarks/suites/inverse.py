"""Inverse problems beside azula's solvers, on the same denoiser: error and calibration.

Every method has the same timesteps, measurements, starting noise and noise of the steps; several
draws for each measurement say how uncertain it is. On Gaussian data the posterior is known. On
Fashion-MNIST, where it is at hand, the truth is: with J draws that are as likely as the truth its
rank among them is uniform, so that intervals between two draws have a known coverage.

The denoiser is that of the suite ``flow``, made here if that suite has not made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from fashion.report import jackknife
from fashion.sizes import QUICK as QUICK_FASHION
from fashion.sizes import REDUCED
from fashion.training import load_images, train_model, unfolded
from harness import azula_solvers
from harness.azula_solvers import Problem
from harness.gaussian_flow import correlated_gaussian, exact_denoiser
from harness.timing import Setting
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pixel_unshuffle

import ocm
from hessdiag.kernels import normal
from ocm.diffusion.noise import noisy_prediction
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.evaluation.pictures import pyplot, save_figure
from ocm.sampling.samplers import X0_RANGE
from suites.flow import work_directory

SEED = 0
# Of the noise of measurements, and of the draws on validation images.
MEASUREMENT_SEED, TUNING_SEED = 1, 1000
# A variance-preserving model, and where its sampling begins: azula divides by alpha.
PATH, LAST = "cosine", 960
NOISE_STD = 0.1
_DIVERGED = 10.0
OURS, AZULA = "ocm", "azula"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the comparison.

    Attributes:
        num_images: Test images.
        num_draws: Draws for each, J: of 19 the middle 10 and 18 steps of rank hold 50% and 90%.
        first_image: Which of the test images is the first.
        step_counts: Numbers of steps K on Gaussian data; on images the last of them.
        tuning_images: Validation images that the length of DPS's steps is chosen on.
        lengths: What it is chosen from.
        gaussian_measurements: Measurements of Gaussian data.
        gaussian_draws: Draws for each of them.
        num_shown: Images of the picture.
    """

    num_images: int = 32
    num_draws: int = 19
    first_image: int = 1000
    step_counts: tuple[int, ...] = (5, 10)
    tuning_images: int = 16
    lengths: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    gaussian_measurements: int = 8
    gaussian_draws: int = 1000
    num_shown: int = 6


QUICK = Sizes(
    num_images=3,
    step_counts=(2,),
    tuning_images=2,
    lengths=(0.1, 0.3),
    gaussian_measurements=2,
    gaussian_draws=50,
    num_shown=2,
)


@dataclass(frozen=True)
class Method:
    """A way to draw x0 given y.

    Attributes:
        library: :data:`OURS` or :data:`AZULA`.
        name: Of the method.
        evaluations: Of the network in a step, a product with its Jacobian counted as one.
        draw: From (problem, y, shape, timesteps, seed, length of DPS's steps) to samples.
    """

    library: str
    name: str
    evaluations: int
    draw: Callable[[Problem, Tensor, Sequence[int], Sequence[float], int, float], Tensor]


@dataclass(frozen=True)
class Ways:
    """How covariances are taken.

    Attributes:
        diagonal: A diagonal covariance, for what takes it alone.
        products_of_diagonal: How many products that takes.
        products: Of Lanczos, wherever C is applied: two say which way C v lies, and keep v^T C v
            from being negative.
        iterations: Of conjugate gradients, for MMPS of both libraries.
        x0_range: Where the data lie.
        dtype: Type of the samples.
    """

    diagonal: ocm.Covariance
    products_of_diagonal: int = 0
    products: int = 2
    iterations: int = 1
    x0_range: tuple[float, float] | None = X0_RANGE
    dtype: torch.dtype = torch.float32


def methods(denoiser: ocm.Denoiser, ways: Ways) -> list[Method]:
    """Return every method, azula's where it is installed."""

    def ours(
        name: str,
        evaluations: int,
        covariance: ocm.Covariance,
        weighting: ocm.Covariance | Literal["row_sums"] | None = None,
        by_length: bool = False,
        **options: Any,
    ) -> Method:
        def draw(
            problem: Problem,
            y: Tensor,
            shape: Sequence[int],
            timesteps: Sequence[float],
            seed: int,
            length: float,
        ) -> Tensor:
            return ocm.sample_given_measurement(
                denoiser,
                covariance,
                y,
                problem.operator,
                noise_std=problem.noise_std,
                shape=shape,
                steps=timesteps,
                weighting=length if by_length else weighting,
                seed=seed,
                x0_range=ways.x0_range,
                dtype=ways.dtype,
                **options,
            )

        return Method(OURS, name, evaluations, draw)

    def azulas(name: str, evaluations: int, method: str, **options: Any) -> Method:
        def draw(
            problem: Problem,
            y: Tensor,
            shape: Sequence[int],
            timesteps: Sequence[float],
            seed: int,
            length: float,
        ) -> Tensor:
            return azula_solvers.solve(
                method, denoiser, problem, y, shape, timesteps, seed=seed, zeta=length, **options
            )

        return Method(AZULA, name, evaluations, draw)

    diagonal, for_diagonal = ways.diagonal, 1 + ways.products_of_diagonal
    full, k = ocm.Lanczos(denoiser, ways.products), ways.products
    few: dict[str, Any] = {"tolerance": None, "max_iterations": ways.iterations}
    solving = 1 + k * (ways.iterations + 1)
    found = [
        ours("DPS", 1 + k, full, by_length=True, draw_x0=False),
        ours("PiGDM", 1 + k, full, ocm.Beta(denoiser), draw_x0=False),
        ours("TMPD", 1 + 2 * k, full, "row_sums", draw_x0=False),
        ours(f"MMPS ({ways.iterations} CG)", solving, full, draw_x0=False, **few),
        ours("diagonal alone, drawn", for_diagonal, diagonal),
        ours("TMPD, drawn", 1 + 3 * k, full, "row_sums"),
        ours(f"MMPS ({ways.iterations} CG), drawn", solving + k, full, **few),
    ]
    if azula_solvers.is_installed():
        found += [
            azulas("DPS", 2, "DPS"),
            azulas("PiGDM", 2, "PGDM"),
            azulas("TMPD", 3, "TMPD"),
            azulas("MMPS (1 GMRES)", 3, "MMPS"),
            *(
                azulas(f"MMPS ({n} CG)", 2 + n, "MMPS", solver="cg", iterations=n)
                for n in dict.fromkeys((ways.iterations, max(2, ways.iterations)))
            ),
        ]
    return found


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    sizes = QUICK if setting.quick else Sizes()
    if not azula_solvers.is_installed():
        print("azula is not installed (benchmarks/peers.txt): its solvers are left out")
    record: Row = {
        "suite": "inverse",
        "seeds": {
            "samples": SEED,
            "noise of measurements": MEASUREMENT_SEED,
            "choice of a length": TUNING_SEED,
        },
        "sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(sizes).items()},
        "environment": environment(setting.device),
        "azula": _version(),
        "gaussian": gaussian(sizes),
        "fashion": None,
    }
    if (setting.fashion_mnist / "train.parquet").exists():
        record["fashion"] = fashion(setting, sizes)
    else:
        print(f"no train.parquet in {setting.fashion_mnist}: no images are restored")
    return record, report(record)


def _version() -> str | None:
    if not azula_solvers.is_installed():
        return None
    import azula

    return str(azula.__version__)


def _timesteps(K: int) -> list[float]:
    return [float(round(LAST * k / K)) for k in range(1, K + 1)]


# Gaussian data


def gaussian(sizes: Sizes) -> Row:
    """Return how far each method's draws are from the exact posterior of Gaussian data."""
    data = correlated_gaussian(8, SEED)
    denoiser, D = exact_denoiser("linear", data), len(data.mean)
    A = normal((D // 2, D), MEASUREMENT_SEED).double()
    problem = Problem(
        "Gaussian", lambda x: x @ A.T, lambda y: y @ torch.linalg.pinv(A).T, NOISE_STD
    )
    count = sizes.gaussian_measurements
    root = torch.linalg.cholesky(data.covariance)
    truth = data.mean + normal((count, D), MEASUREMENT_SEED, step=1).double() @ root.T
    y = truth @ A.T + NOISE_STD * normal((count, D // 2), MEASUREMENT_SEED, step=2).double()
    marginal = A @ data.covariance @ A.T + NOISE_STD**2 * torch.eye(D // 2)
    gain = data.covariance @ A.T @ torch.linalg.inv(marginal)
    means = data.mean + (y - A @ data.mean) @ gain.T
    variances = (data.covariance - gain @ A @ data.covariance).diagonal()
    rows = []
    ways = Ways(ocm.Exact(denoiser), D, D, D // 2, x0_range=None, dtype=torch.float64)
    for K in sizes.step_counts:
        for method in methods(denoiser, ways):
            found = []
            for length in sizes.lengths if method.name == "DPS" else (1.0,):
                x = method.draw(
                    problem,
                    y.repeat_interleave(sizes.gaussian_draws, dim=0),
                    (count * sizes.gaussian_draws, D),
                    _timesteps(K),
                    SEED,
                    length,
                ).reshape(count, -1, D)
                error = ((x.mean(1) - means).square() / variances).mean().sqrt().item()
                ratio = (x.var(1).mean(0).sum() / variances.sum()).item()
                found.append({"mean_error": error, "variance_ratio": ratio, "length": length})
            best = min(found, key=lambda row: row["mean_error"])
            length = best.pop("length") if method.name == "DPS" else best.pop("length") and None
            row = {"K": K, "library": method.library, "method": method.name}
            rows.append(row | best | {"length": length})
    return {
        "dimensions": D,
        "measured": D // 2,
        "noise_std": NOISE_STD,
        "floor": sizes.gaussian_draws**-0.5,
        "rows": rows,
    }


# Fashion-MNIST


def problems() -> list[Problem]:
    """Return what is measured of images (B, 4, h, w), whose 2x2 pixels are channels."""

    def upper(x: Tensor) -> Tensor:
        images = unfolded(x)
        return images[..., : images.shape[-2] // 2, :].flatten(1)

    def upper_back(y: Tensor) -> Tensor:
        side = round((2 * y.shape[1]) ** 0.5)
        images = y.reshape(-1, 1, side // 2, side)
        return pixel_unshuffle(torch.cat([images, 0 * images], dim=2), 2)

    def coarse_back(y: Tensor) -> Tensor:
        side = round(y.shape[1] ** 0.5)
        return pixel_unshuffle(interpolate(y.reshape(-1, 1, side, side), scale_factor=4), 2)

    return [
        Problem("the upper half", upper, upper_back, NOISE_STD),
        Problem(
            "means of 4x4 pixels",
            lambda x: avg_pool2d(unfolded(x), 4).flatten(1),
            coarse_back,
            NOISE_STD,
        ),
    ]


def fashion(setting: Setting, sizes: Sizes) -> Row:
    """Return error and calibration of every method on test images."""
    size = QUICK_FASHION if setting.quick else REDUCED
    work = work_directory(size.name)
    images = load_images(setting.fashion_mnist, size)
    model, training = train_model(PATH, work, images, size)
    denoiser = model.denoiser.freeze()
    truth = images.test[sizes.first_image : sizes.first_image + sizes.num_images]
    tuning = images.validation[: sizes.tuning_images]
    ways = Ways(model.ocm)
    every = methods(denoiser, ways)
    rows, shown, lengths, same = [], {"truth": unfolded(truth[: sizes.num_shown])}, [], []
    for problem in problems():
        length = {
            method.library: _length(problem, method, tuning, sizes)
            for method in every
            if method.name == "DPS"
        }
        lengths.append({"problem": problem.name, **length})
        same.append({"problem": problem.name, **_differences(denoiser, problem, truth)})
        y = _measured(problem, truth, SEED)
        shown[f"{problem.name}/y"] = y[: sizes.num_shown].contiguous()
        for K in sizes.step_counts[-1:]:
            plain = _plain_seconds(denoiser, truth, sizes.num_draws, K)
            for method in every:
                start = time.perf_counter()
                x = _draws(
                    problem, method, y, truth, K, sizes.num_draws, SEED, length[method.library]
                )
                seconds = time.perf_counter() - start
                row = {"problem": problem.name, "K": K, "library": method.library}
                rows.append(
                    row
                    | {"method": method.name, "evaluations": method.evaluations * K}
                    | {"times_plain_sampling": seconds / plain}
                    | scores(unfolded(truth), x)
                )
                print(f"{row['problem']}, K = {K}, {method.library} {method.name}", flush=True)
                if K == max(sizes.step_counts):
                    key = f"{problem.name}/{method.library} {method.name}"
                    shown[f"{key}/mean"] = x.mean(1)[: sizes.num_shown].contiguous()
                    shown[f"{key}/std"] = x.std(1)[: sizes.num_shown].contiguous()
    save_file(shown, work / "inverse.safetensors")
    return {
        "name": size.name,
        "image_size": size.image_size,
        "noise_std": NOISE_STD,
        "iterations": ways.iterations,
        "products": ways.products,
        "denoiser_loss": training["denoiser"]["loss"],
        "lengths": lengths,
        "difference_to_azula": same,
        "rows": rows,
    }


def _measured(problem: Problem, truth: Tensor, first: int) -> Tensor:
    clean = problem.operator(truth)
    return clean + problem.noise_std * normal(
        clean.shape, MEASUREMENT_SEED, sample_offset=first
    ).to(clean)


def _draws(
    problem: Problem,
    method: Method,
    y: Tensor,
    truth: Tensor,
    K: int,
    count: int,
    seed: int,
    length: float,
) -> Tensor:
    """Return ``count`` draws for each measurement, (n, count, 1, h, w)."""
    x = method.draw(
        problem,
        y.repeat_interleave(count, dim=0),
        (len(y) * count, *truth.shape[1:]),
        _timesteps(K),
        seed,
        length,
    )
    images = unfolded(x)
    return images.reshape(len(y), count, *images.shape[1:])


def _length(problem: Problem, dps: Method, truth: Tensor, sizes: Sizes) -> float:
    """Return the length of DPS's steps whose draws score best on validation images."""
    y, K = _measured(problem, truth, TUNING_SEED), max(sizes.step_counts)
    found = {
        length: scores(unfolded(truth), _draws(problem, dps, y, truth, K, 9, TUNING_SEED, length))[
            "crps"
        ]
        for length in sizes.lengths
    }
    return min(found, key=lambda length: torch.inf if found[length] is None else found[length])


def _plain_seconds(denoiser: ocm.Denoiser, truth: Tensor, count: int, K: int) -> float:
    shape = (len(truth) * count, *truth.shape[1:])
    start = time.perf_counter()
    ocm.sample(denoiser, ocm.BetaTilde(denoiser), shape, _timesteps(K), seed=SEED)
    return time.perf_counter() - start


def _differences(denoiser: ocm.Denoiser, problem: Problem, truth: Tensor) -> Row:
    """Return the largest relative difference of E[x0 | x_t, y] to azula's, by the same solver."""
    if not azula_solvers.is_installed():
        return {"difference": None}
    y, found = _measured(problem, truth, SEED), []
    for t in _timesteps(10):
        prediction = noisy_prediction(denoiser, truth, t, SEED)
        stated = ocm.Lanczos(denoiser, 1).at(prediction)  # C itself, by one product
        try:
            ours = ocm.posterior_mean_given_measurement(
                prediction.x0_hat,
                stated,
                y,
                problem.operator,
                noise_std=problem.noise_std,
                tolerance=None,
                max_iterations=1,
            )
        except ValueError:  # C is not positive there
            continue
        model = azula_solvers.guided(denoiser, problem, y, solver="cg", iterations=1)
        theirs = model(prediction.x_t, torch.tensor(t)).mean
        found.append(((ours - theirs).norm() / theirs.norm()).item())
    return {"difference": max(found), "timesteps": len(found)}


def scores(truth: Tensor, draws: Tensor) -> Row:
    """Return error and calibration of draws (n, J, ...) of a truth (n, ...).

    - ``rmse_of_mean`` and ``rmse_of_draw``: of the mean of the draws, and of single ones.
    - ``squared_error_over_variance``: mean squared error of the mean over (1 + 1/J) times the
      mean variance of the draws; 1 if the truth is as likely as a draw.
    - ``within_50`` and ``within_90``: how often it lies between draws that hold 50% and 90%.
    - ``crps``: E|X - x| - E|X - X'| / 2 for single pixels, unbiased; lower is better.

    Each has a standard error, by leaving out one image after another. All are None where draws err
    by more than ten times half the range of the data: they diverged.
    """
    J, flat = draws.shape[1], draws.flatten(2).double()
    x = truth.flatten(1).double()[:, None]
    # Of J + 1 ranks that are equally likely; where draws equal the truth, any of theirs.
    lowest = (flat < x).sum(1)
    highest = lowest + (flat == x).sum(1)
    outside = {level: round((1 - level) / 2 * (J + 1)) for level in (0.5, 0.9)}
    ordered = flat.sort(dim=1).values
    weights = 2.0 * torch.arange(J) - J + 1
    between = (weights[:, None] * ordered).sum(1) * 2.0 / (J * (J - 1))  # mean of |X - X'|
    terms = {
        "mean": (flat.mean(1) - x[:, 0]).square(),
        "draw": (flat - x).square().mean(1),
        "variance": flat.var(1),
        "crps": (flat - x).abs().mean(1) - between / 2,
        **{
            f"within_{round(100 * level)}": (
                highest.clamp(max=J - k) - lowest.clamp(min=k) + 1
            ).clamp(min=0)
            / (highest - lowest + 1)
            for level, k in outside.items()
        },
    }
    means = {name: value.mean(1) for name, value in terms.items()}

    def figures(kept: Tensor) -> dict[str, float]:
        of = {name: value[kept].mean().item() for name, value in means.items()}
        return {
            "rmse_of_mean": of["mean"] ** 0.5,
            "rmse_of_draw": of["draw"] ** 0.5,
            "squared_error_over_variance": of["mean"] / max((1 + 1 / J) * of["variance"], 1e-300),
            **{name: of[name] for name in ("within_50", "within_90", "crps")},
        }

    every = torch.ones(len(x), dtype=torch.bool)
    left_out = [figures(every & (torch.arange(len(x)) != i)) for i in range(len(x))]
    found = figures(every)
    if not found["rmse_of_draw"] < _DIVERGED:
        return {name + end: None for name in found for end in ("", "_error")}
    return found | {f"{name}_error": jackknife([row[name] for row in left_out]) for name in found}


# Tables and picture


_FIGURES: Mapping[str, tuple[str, str]] = {
    "rmse_of_mean": ("RMSE of mean", ".3g"),
    "rmse_of_draw": ("RMSE of a draw", ".3g"),
    "crps": ("CRPS", ".3g"),
    "squared_error_over_variance": ("squared error / variance", ".2f"),
    "within_50": ("in 50%", ".2f"),
    "within_90": ("in 90%", ".2f"),
}


def report(record: Row) -> str:
    """Return the tables of a record."""
    found = record["gaussian"]
    sections = []
    if record["azula"] is None:
        sections.append("azula was not installed: its solvers are missing.")
    sections += [
        f"**Gaussian data, a perfect denoiser.** {found['measured']} of {found['dimensions']} "
        f"dimensions are measured with noise of standard deviation {found['noise_std']}. Draws "
        "against the exact posterior of x0 given y, which has a mean error of 0 and a variance "
        f"ratio of 1: error of their mean, in standard deviations of each dimension (that many "
        f"draws leave {found['floor']:.3f}), / their variance over the true one. DPS has the "
        "length of steps whose mean errs least here. A has entries of both signs, so that sums of "
        "rows, TMPD's, may be near 0 where the variance is not.",
        _by_steps(
            found["rows"],
            lambda row: (
                f"{row['mean_error']:.3f} / {row['variance_ratio']:.2f}"
                if row["mean_error"] < _DIVERGED
                else "diverged"
            ),
        ),
    ]
    if record["fashion"] is None:
        return "\n\n".join([*sections, "Fashion-MNIST was not at hand: no images were restored."])
    fashion, sizes = record["fashion"], record["sizes"]
    side = fashion["image_size"]
    sections.append(
        f"**Fashion-MNIST, {side}x{side}, pixels in [-1, 1].** The trained variance-preserving "
        f"denoiser, {sizes['num_images']} test images, {sizes['num_draws']} draws for each, noise "
        f"of standard deviation {fashion['noise_std']}. Draws that are as likely as the truth have "
        "a squared error of their mean over their variance of 1, and hold it 50% and 90% of the "
        "time in their intervals of that name. Standard errors, by leaving out one image in turn, "
        "are beside. Evaluations of the network count products with its Jacobian; time is relative "
        "to sampling without a measurement. “Drawn” are those whose steps have the covariance of "
        "x0 given x_t and y; the others take its mean, as in the papers."
    )
    for problem in dict.fromkeys(row["problem"] for row in fashion["rows"]):
        lengths = next(row for row in fashion["lengths"] if row["problem"] == problem)
        chosen = ", ".join(f"{lengths[key]:g} of {key}" for key in (OURS, AZULA) if key in lengths)
        for K in sizes["step_counts"][-1:]:
            rows = [r for r in fashion["rows"] if (r["problem"], r["K"]) == (problem, K)]
            sections += [
                f"Measured: {problem}, K = {K} steps (length of DPS: {chosen}, by the CRPS on "
                f"{sizes['tuning_images']} validation images)",
                _scores_table(rows),
            ]
    notes = _NOTES.format(iterations=fashion["iterations"], products=fashion["products"])
    sections += [_same(fashion["difference_to_azula"]), notes]
    return "\n\n".join(section for section in sections if section)


_NOTES = (
    "“Diagonal alone” is that of OCM's head, which costs nothing, on Gaussian data the exact one; "
    "it is C in all places. azula's PiGDM is for measurements without noise. azula's DPS divides "
    "by the norm of the misfit of the whole batch; its length is multiplied by the root of the "
    "number of samples. MMPS of ocm takes {iterations} conjugate gradient a step with {products} "
    "products of Lanczos, which keep C "
    "positive; azula's takes products with the Jacobian as it is."
)


def _by_steps(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["library"], row["method"])
        line = lines.setdefault(key, {"library": key[0], "method": key[1]})
        line[f"K = {row['K']}"] = cell(row)
    columns = {"library": "", "method": ""} | {f"K = {row['K']}": ">" for row in rows}
    return markdown_table(list(lines.values()), columns)


def _scores_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: torch.inf if row["crps"] is None else row["crps"]):
        line = {key: row[key] for key in ("library", "method", "evaluations")}
        line["time"] = row["times_plain_sampling"]
        for key, (name, spec) in _FIGURES.items():
            if row[key] is None:
                line[name] = "diverged"
                continue
            line[name] = f"{row[key]:{spec}} ± {row[f'{key}_error']:.1g}"
        lines.append(line)
    columns = {"library": "", "method": ""} | {name: ">" for name, _ in _FIGURES.values()}
    return markdown_table(lines, columns | {"evaluations": "d", "time": ".1f"})


def _same(found: Sequence[Row]) -> str:
    compared = [row for row in found if row["difference"] is not None]
    if not compared:
        return ""
    worst = max(compared, key=lambda row: row["difference"])
    return (
        "With one conjugate gradient and products with the same Jacobian, E[x0 | x_t, y] of "
        f"`ocm.posterior_mean_given_measurement` is azula's MMPS up to {worst['difference']:.1g} "
        f"of its norm, at {min(row['timesteps'] for row in compared)} noise levels and more."
    )


# Of the picture: the best of each kind.
_SHOWN = {
    f"{AZULA} DPS": "azula DPS",
    f"{AZULA} MMPS (1 GMRES)": "azula MMPS",
    f"{OURS} MMPS (1 CG)": "ocm MMPS",
    f"{OURS} MMPS (1 CG), drawn": "ocm MMPS,\ndrawn",
}


def plot(record: Row, path: Path) -> None:
    """Draw truths, measurements, and means and standard deviations of the draws."""
    if record["fashion"] is None:
        return
    file = work_directory(record["fashion"]["name"]) / "inverse.safetensors"
    if not file.exists():
        print(f"{file} is not there: no picture is drawn")
        return
    shown = load_file(file)
    found = [problem.name for problem in problems()]
    kinds = [key for key in _SHOWN if f"{found[0]}/{key}/mean" in shown]
    names = ["truth", "measured", *(f"{_SHOWN[k]}" for k in kinds for _ in range(2))]
    columns = shown["truth"].shape[0]
    figure, axes = pyplot().subplots(
        len(names),
        2 * columns,
        figsize=(1.0 * 2 * columns + 1.4, 1.02 * len(names) + 0.4),
        layout="constrained",
    )
    for half, problem in enumerate(found):
        rows = [shown["truth"], _seen(problem, shown[f"{problem}/y"])]
        for kind in kinds:
            rows += [shown[f"{problem}/{kind}/{what}"] for what in ("mean", "std")]
        for i, images in enumerate(rows):
            is_std = i >= 2 and i % 2 == 1
            for j in range(columns):
                axis = axes[i, half * columns + j]
                low, high = (0.0, 0.6) if is_std else (-1.0, 1.0)
                colors = "magma" if is_std else "gray"
                axis.imshow(images[j].squeeze(), cmap=colors, vmin=low, vmax=high)
                axis.set(xticks=[], yticks=[], facecolor="lightsteelblue")
        axes[0, half * columns + columns // 2].set_title(problem, fontsize=10)
    for i, name in enumerate(names):
        what = "" if i < 2 else ("\nstd, 0 to 0.6" if i % 2 else "\nmean")
        axes[i, 0].set_ylabel(
            name + what, rotation=0, ha="right", va="center", fontsize=8, labelpad=6
        )
    save_figure(figure, path)


def _seen(problem: str, y: Tensor) -> Tensor:
    """Return a measurement as an image."""
    if problem.startswith("the upper"):
        side = round((2 * y.shape[1]) ** 0.5)
        images = y.reshape(-1, side // 2, side)
        return torch.cat([images, torch.full_like(images, torch.nan)], dim=1)
    side = round(y.shape[1] ** 0.5)
    return y.reshape(-1, side, side)
