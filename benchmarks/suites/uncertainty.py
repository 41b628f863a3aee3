"""Uncertainty maps: which covariance states honest ones, and which ones tell something.

On held-out images the errors of x0_hat are known, and each map is compared with them
(:mod:`ocm.evaluation.maps`): standardised errors near 1 are honest, and the correlation of the map
with the errors is what it tells. The networks are those of other suites, a U-Net on Fashion-MNIST
(``flow``) and one on CIFAR-10 (``estimators``), and one of videos that is trained here in about a
minute. What is trained is kept below ``.cache/benchmarks``.

A second part decodes latents of known covariance by a small autoencoder with random weights, by
draws and by Jacobian products, against very many draws.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cifar10.parts import as_json, say
from fashion import training as fashion
from fashion.sizes import QUICK as QUICK_FASHION
from fashion.sizes import REDUCED
from harness import moving_images
from harness.timing import Setting
from harness.trained_unet import cifar10_images, trained_unet
from safetensors.torch import load_file, save_file
from torch import Tensor

import hessdiag
import ocm
from ocm.covariances.hutchinson import floored
from ocm.covariances.operators import diagonal
from ocm.diffusion.noise import noisy_prediction
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.maps import Reliability, compared, draw_maps, draw_reliability
from ocm.evaluation.markdown import markdown_table
from ocm.evaluation.scores import Estimate
from ocm.integrations.latents import decode
from ocm.integrations.uncertainty import std_by_products, std_of_draws
from ocm.training.loop import mean_of_last

SEED = 0
_CACHE = Path(__file__).parents[2] / ".cache" / "benchmarks"
# Half of one of 256 grey levels of [-1, 1]: what negative estimates are clipped to.
_CLIPPED = 1 / 255
DEFAULT = "coloring, floor"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the suite.

    Attributes:
        name: Of the directory of what is kept.
        timesteps: Noise levels.
        num_scored: Test images.
        num_calibration: Images that calibrations are fitted to, which nothing was trained on.
        num_probes: M of Hutchinson and of the coloring.
        head: Training of a head that no other suite trains.
        num_frames: Of a video.
        num_videos: To train on.
        video: Training of their denoiser.
        num_shown: Images of a picture.
        widths: Standard deviations of latents that are decoded.
        num_draws: M of their decoding.
        num_true: Draws that stand for the truth.
    """

    name: str = "uncertainty"
    timesteps: tuple[int, ...] = (50, 200, 500, 800)
    num_scored: int = 64
    num_calibration: int = 64
    num_probes: int = 48
    head: ocm.TrainingSettings = REDUCED.head
    num_frames: int = 8
    num_videos: int = 4000
    video: ocm.TrainingSettings = replace(  # noqa: RUF009, frozen
        REDUCED.denoiser, num_steps=400, batch_size=16, learning_rate=3e-3, ema_decay=0.98
    )
    num_shown: int = 5
    widths: tuple[float, ...] = (0.05, 0.3, 1.0)
    num_draws: int = 64
    num_true: int = 2000


QUICK = Sizes(
    "uncertainty-quick",
    timesteps=(200, 800),
    num_scored=4,
    num_calibration=4,
    num_probes=12,
    head=QUICK_FASHION.head,
    num_videos=8,
    video=replace(QUICK_FASHION.denoiser, num_steps=3, batch_size=2),
    num_shown=2,
    widths=(0.3,),
    num_draws=4,
    num_true=50,
)


@dataclass(frozen=True, eq=False)
class Task:
    """A trained denoiser with its heads, and images.

    Attributes:
        name: Of the data.
        description: Of network and training.
        denoiser: The denoiser.
        heads: Covariances with a trained head, by name.
        calibration: Images that nothing was trained on.
        test: Others.
        is_folded: Whether 2x2 pixels are channels of one place.
    """

    name: str
    description: str
    denoiser: ocm.Denoiser
    heads: dict[str, ocm.LearnedCovariance]
    calibration: Tensor
    test: Tensor
    is_folded: bool = False


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    sizes = QUICK if setting.quick else Sizes()
    tasks: list[Task] = []
    if (setting.fashion_mnist / "train.parquet").exists():
        tasks.append(_fashion(setting, sizes))
    if (setting.data / "train.parquet").exists():
        tasks.append(_cifar10(setting, sizes))
    found = []
    for task in tasks:
        start = time.perf_counter()
        rows = scores(task, sizes)
        found.append({"name": task.name, "network": task.description, "rows": rows})
        say(f"{task.name}: scored in {time.perf_counter() - start:.0f} s")
        _keep_maps(task, sizes)
    video = None
    if (setting.fashion_mnist / "train.parquet").exists():
        video = _video(setting, sizes)
    else:
        print(f"no train.parquet in {setting.fashion_mnist}: no maps of it, nor of videos")
    record: Row = {
        "suite": "uncertainty",
        "seeds": SEED,
        "sizes": as_json(asdict(sizes)),
        "environment": environment(setting.device),
        "tasks": found,
        "video": video,
        "decoders": decoders(sizes),
    }
    return record, report(record)


# Networks


def _fashion(setting: Setting, sizes: Sizes) -> Task:
    size = QUICK_FASHION if setting.quick else REDUCED
    images = fashion.load_images(setting.fashion_mnist, size)
    model, _ = fashion.train_model("cosine", _CACHE / f"fashion-{size.name}", images, size)
    npr = ocm.NPR(
        model.denoiser,
        ocm.make_head(model.denoiser, "residual", seed=SEED),
        model.ocm.parameterisation,
    )
    _train_head(npr, images.train, sizes, "fashion-npr")
    return Task(
        "Fashion-MNIST",
        "16x16 pixels, cosine schedule, velocity; the network of the suite flow",
        model.denoiser,
        {"ocm": model.ocm, "npr": npr},
        images.validation[: sizes.num_calibration],
        images.test[: sizes.num_scored],
        is_folded=True,
    )


def _cifar10(setting: Setting, sizes: Sizes) -> Task:
    trained = trained_unet(setting.data, _CACHE, torch.device("cpu"), quick=setting.quick)
    train = trained.train_images
    units = ocm.Parameterisation(round(train.std().item(), 4), positive=True)
    heads: dict[str, ocm.LearnedCovariance] = {}
    for name, kind in (("ocm", ocm.OptimalCovarianceMatching), ("npr", ocm.NPR)):
        head = ocm.make_head(trained.denoiser, "residual", seed=SEED)
        heads[name] = kind(trained.denoiser, head, units)
        _train_head(heads[name], train, sizes, f"cifar10-{name}")
    # Between those of training, which begin with image 0.
    others = cifar10_images(setting.data / "train.parquet", len(train), first=1)
    every = len(others) // sizes.num_calibration
    return Task(
        "CIFAR-10",
        trained.description,
        trained.denoiser,
        heads,
        others[::every][: sizes.num_calibration],
        trained.test_images[: sizes.num_scored],
    )


def _train_head(covariance: ocm.LearnedCovariance, images: Any, sizes: Sizes, name: str) -> None:
    start = time.perf_counter()
    directory = _CACHE / sizes.name / name
    ocm.train_head(covariance, images, sizes.head, directory=directory, progress=False)
    say(f"{name}: head ready after {time.perf_counter() - start:.0f} s")


# Scores


@torch.no_grad()
def scores(task: Task, sizes: Sizes) -> list[Row]:
    """Return a row for every covariance at every noise level."""
    denoiser, M = task.denoiser, sizes.num_probes
    # The estimates themselves, of which negative ones are clipped or raised.
    by_products = {
        "Hutchinson": ocm.Hutchinson(denoiser, M, SEED, floor=None),
        "coloring": ocm.Hutchinson(denoiser, M, SEED, hessdiag.Coloring(M), floor=None),
    }
    rows: list[Row] = []
    for t in sizes.timesteps:
        prediction = noisy_prediction(denoiser, task.test, t, SEED)
        analytic = ocm.fit_analytic_from_data(denoiser, task.calibration, [t], seed=SEED)
        variances: dict[str, Tensor] = {}
        negative = {}
        for name, covariance in by_products.items():
            estimated = covariance.at(prediction).diagonal()
            negative[name] = (estimated < 0).float().mean().item()
            variances[f"{name}, clipped"] = estimated.clamp(min=_CLIPPED**2)
            variances[f"{name}, floor"] = floored(estimated)
            with_floor = replace(covariance, floor="error")
            variances[f"{name}, calibrated"] = _calibrated(
                task, with_floor, variances[f"{name}, floor"], t
            )
        for name, head in task.heads.items():
            variances[name] = head.at(prediction).diagonal()
            variances[f"{name}, calibrated"] = _calibrated(task, head, variances[name], t)
        variances["analytic"] = analytic.at(prediction).diagonal()
        error = task.test - prediction.x0_hat.clamp(-1, 1)
        for name, variance in variances.items():
            std = variance.clamp(max=1.0).sqrt().expand(error.shape)
            share = negative.get(name.removesuffix(", clipped").removesuffix(", floor"))
            row = asdict(compared(t, std, error)) | {"covariance": name, "negative": share}
            means = {"mean_std": std.mean(), "rmse": error.square().mean().sqrt()}
            rows.append(row | {key: value.item() for key, value in means.items()})
    found: list[Row] = as_json(rows)
    return found


def _calibrated(task: Task, covariance: ocm.Covariance, variance: Tensor, t: int) -> Tensor:
    fitted = ocm.calibrate(task.denoiser, covariance, task.calibration, [t], seed=SEED)
    scale, shift = fitted.weights.at(None, t).tolist()
    return scale * variance.clamp(0.0, 1.0) + shift


# Pictures

_KINDS = ("x_t", "mean", "std", "x0")


def _keep_maps(task: Task, sizes: Sizes) -> None:
    """Write the maps of the first test images, by the default of :func:`ocm.uncertainty`."""
    maps = [
        ocm.uncertainty(task.denoiser, t, image=task.test[: sizes.num_shown], seed=SEED)
        for t in sizes.timesteps[1:]
    ]
    unfold = fashion.unfolded if task.is_folded else (lambda x: x)
    _write(maps, unfold, sizes.name, task.name)


def _video(setting: Setting, sizes: Sizes) -> Row:
    """Train a denoiser of videos, write a map, and return how honest it is."""
    size = QUICK_FASHION if setting.quick else REDUCED
    images = fashion.load_images(setting.fashion_mnist, size)

    def latents(some: Tensor, seed: int) -> Tensor:
        videos = moving_images.moving(fashion.unfolded(some), sizes.num_frames, seed)
        return moving_images.folded(videos).contiguous()

    train = latents(images.train[: sizes.num_videos], SEED)
    test = latents(images.test[: sizes.num_shown], SEED + 1)
    denoiser, start = moving_images.video_denoiser(SEED), time.perf_counter()
    directory = _CACHE / sizes.name / "video"
    losses = ocm.train_denoiser(denoiser, train, sizes.video, directory=directory, progress=False)
    say(f"video: denoiser ready after {time.perf_counter() - start:.0f} s")
    denoiser.freeze()
    rows, maps = [], []
    for t in sizes.timesteps[1:]:
        found = ocm.uncertainty(denoiser, t, image=test, seed=SEED)
        assert found.x0 is not None
        row = asdict(compared(t, found.std, found.x0 - found.mean))
        rows.append(row | {"negative": found.raised})
        maps.append(found)
    _write(maps, moving_images.unfolded, sizes.name, "video")
    made: Row = as_json({"loss": mean_of_last(losses), "rows": rows})
    return made


def _write(maps: Sequence[ocm.UncertaintyMap], unfold: Any, directory: str, name: str) -> None:
    tensors = {
        f"{found.t} {kind}": unfold(getattr(found, kind)).contiguous().clone()
        for found in maps
        for kind in _KINDS
    }
    tensors |= {f"{found.t} raised": torch.tensor(found.raised) for found in maps}
    (_CACHE / directory).mkdir(parents=True, exist_ok=True)
    save_file(tensors, _CACHE / directory / f"maps-{name}.safetensors")


def _read(file: Path) -> list[ocm.UncertaintyMap]:
    tensors = load_file(file)
    levels = sorted({int(key.split()[0]) for key in tensors})
    return [
        ocm.UncertaintyMap(
            t,
            **{kind: tensors[f"{t} {kind}"] for kind in _KINDS},
            raised=tensors[f"{t} raised"].item(),
        )
        for t in levels
    ]


# Decoders


@torch.no_grad()
def decoders(sizes: Sizes) -> list[Row]:
    """Return the relative errors of both ways to decode the spread of latents, and their time."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        scaling_factor=0.4,
    ).eval()
    mean = torch.randn(1, 4, 8, 8)
    rows = []
    for width in sizes.widths:
        posterior = diagonal(2 * width**2 * torch.rand(mean.shape), mean.shape)
        draws = torch.cat([posterior.noise(torch.randn(mean.shape)) for _ in range(sizes.num_true)])
        true = decode(vae, mean + draws).std(dim=0, keepdim=True)
        normals = [posterior.noise(torch.randn(mean.shape)) for _ in range(sizes.num_draws)]
        row: Row = {"width": f"{width:g}"}  # a name, by which rows are told apart
        for name, spread in (("draws", std_of_draws), ("products", std_by_products)):
            start = time.perf_counter()
            std = spread(vae, mean, normals.__getitem__, sizes.num_draws)
            row[f"{name}_seconds"] = time.perf_counter() - start
            row[f"{name}_error"] = ((std - true).norm() / true.norm()).item()
        rows.append(row)
    return rows


# Tables


def report(record: Row) -> str:
    """Return the tables of a record."""
    sizes = record["sizes"]
    sections = []
    for task in record["tasks"]:
        sections += [
            f"**{task['name']}** ({task['network']}), {sizes['num_scored']} test images, "
            f"calibrated on {sizes['num_calibration']} others, M = {sizes['num_probes']} products: "
            "mean of (x₀ - mean)² / std², which is 1 for honest maps, and in brackets Spearman's "
            "correlation of the map with the errors. Clipped estimates are raised to half a grey "
            "level; the log density, of a dimension, is the mean over t, the higher the better",
            _table(task["rows"]),
            f"`ocm.uncertainty` without a covariance and without a head states the line "
            f"*{DEFAULT}*. Negative estimates: " + _negative(task["rows"]) + ".",
        ]
    if record["video"] is not None:
        lines = [
            f"t = {row['t']}: {row['standardised_error']['mean']:.2f}, correlation "
            f"{row['correlation']:.2f}"
            for row in record["video"]["rows"]
        ]
        sections.append(
            f"**Videos**, {sizes['num_frames']} frames of Fashion-MNIST that moves, as latents of "
            f"four channels, after {sizes['video']['num_steps']} steps of training; standardised "
            f"errors of {sizes['num_shown']} videos: {'; '.join(lines)}."
        )
    rows = [
        {
            "std of latents": row["width"],
            "draws": row["draws_error"],
            "products": row["products_error"],
            "time of products / draws": row["products_seconds"] / row["draws_seconds"],
        }
        for row in record["decoders"]
    ]
    columns = {"std of latents": "", "draws": ".2f", "products": ".2f"}
    sections += [
        f"**Decoding** by a small AutoencoderKL, M = {sizes['num_draws']}: relative error of the "
        f"standard deviation against {sizes['num_true']} draws. Of a linear decoder both would err "
        f"by {(2 * sizes['num_draws']) ** -0.5:.2f}.",
        markdown_table(rows, columns | {"time of products / draws": ".1f"}),
    ]
    return "\n\n".join(sections)


_LABELS = {"ocm": "OCM head", "npr": "NPR head"}


def _label(name: str) -> str:
    first, *rest = name.split(", ")
    return ", ".join([_LABELS.get(first, first), *rest])


def _table(rows: Sequence[Row]) -> str:
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["covariance"], {"covariance": _label(row["covariance"])})
        correlation = "" if row["correlation"] is None else f" ({row['correlation']:.2f})"
        line[f"t = {row['t']}"] = f"{row['standardised_error']['mean']:.2f}{correlation}"
        line.setdefault("densities", []).append(row["log_density"])
    for line in lines.values():
        densities = line.pop("densities")
        line["log_density"] = sum(densities) / len(densities)
    levels = {f"t = {row['t']}": ">" for row in rows}
    return markdown_table(
        list(lines.values()), {"covariance": ""} | levels | {"log_density": ".2f"}
    )


def _negative(rows: Sequence[Row]) -> str:
    shares = {row["t"]: row["negative"] for row in rows if row["covariance"] == DEFAULT}
    return ", ".join(f"{share:.1%} at t = {t}" for t, share in shares.items())


# Of those in the tables; clipped estimates leave every scale.
_DRAWN = (
    "coloring, clipped",
    "coloring, floor",
    "coloring, calibrated",
    "ocm",
    "ocm, calibrated",
    "npr",
    "analytic",
)


def plot(record: Row, path: Path) -> None:
    """Draw calibrations beside ``path``, and maps where the same run left them."""
    for k, task in enumerate(record["tasks"]):
        rows = {
            _label(name): [_reliability(row) for row in task["rows"] if row["covariance"] == name]
            for name in _DRAWN
        }
        file = path if k == 0 else path.with_name(f"{path.stem}_{_slug(task['name'])}.png")
        draw_reliability(rows, file, title=f"{task['name']}, held-out images")
    for name in [*(task["name"] for task in record["tasks"]), "video"]:
        maps = _CACHE / record["sizes"]["name"] / f"maps-{name}.safetensors"
        if not maps.exists():
            print(f"maps are not drawn: {maps.name} is not in {maps.parent.name}")
            continue
        draw_maps(
            _read(maps),
            path.with_name(f"{path.stem}_maps_{_slug(name)}.png"),
            title=f"{name}: coloring of {record['sizes']['num_probes']} products",
        )


def _slug(name: str) -> str:
    return name.lower().replace("-", "")


def _reliability(row: Row) -> Reliability:
    names = ("t", "within_two", "correlation", "log_density", "predicted", "observed")
    return Reliability(
        standardised_error=Estimate(**row["standardised_error"]),
        **{name: row[name] for name in names},
    )
