"""The command line. Each command is a thin wrapper: options in, JSON and pictures out."""

# The modules that do the work are imported inside the commands, so that --help is quick.
from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer

app = typer.Typer(
    help=(
        "Diffusion models with the optimal covariance: train a covariance head, sample in few "
        "steps, and score likelihoods."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class CovarianceName(str, Enum):
    """Covariances of x0 given x_t."""

    beta = "beta"
    beta_tilde = "beta_tilde"
    ocm = "ocm"
    hutchinson = "hutchinson"
    exact = "exact"


class SamplerName(str, Enum):
    """Samplers."""

    ddpm = "ddpm"
    ddim = "ddim"


class ScheduleName(str, Enum):
    """Noise schedules."""

    linear = "linear"
    cosine = "cosine"


# In the picture; all of them are in samples.safetensors.
_IMAGES_SHOWN = 256

CheckpointPath = Annotated[
    Path, typer.Argument(help="Directory of a checkpoint, as `ocm train` writes it.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 2, help="Seed of all randomness.")]
Device = Annotated[
    str, typer.Option(help="'cpu', 'cuda', 'cuda:1', ..., or 'auto': CUDA where there is one.")
]
NumProbes = Annotated[
    int, typer.Option(min=1, help="Rademacher probes M of the 'hutchinson' covariance.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint.")] = Path("runs/train"),
    data: Annotated[str, typer.Option(help="Data set: 'digits'.")] = "digits",
    denoiser: Annotated[
        Path | None,
        typer.Option(help="Checkpoint whose denoiser is kept, so that only the head is trained."),
    ] = None,
    schedule: Annotated[
        ScheduleName | None,
        typer.Option(help="Noise schedule of a new denoiser, N = 1000. Default: cosine."),
    ] = None,
    denoiser_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps for a new denoiser. Default: 900.")
    ] = None,
    head_steps: Annotated[int, typer.Option(min=1, help="Steps for the OCM head.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of a new denoiser. Default: 0.001.")
    ] = None,
    head_learning_rate: Annotated[float, typer.Option(help="Peak rate of the head.")] = 1e-2,
    target_probes: Annotated[
        int, typer.Option(min=1, help="Probes M in each target of the head.")
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint in --out.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a denoiser and its OCM head, or a head alone on a denoiser that exists."""
    from ocm import checkpoints
    from ocm import data as datasets
    from ocm.backbones import small_unet
    from ocm.denoiser import Denoiser
    from ocm.environment import environment
    from ocm.heads import CovarianceHead
    from ocm.schedules import SCHEDULES
    from ocm.training import TrainingSettings, mean_of_last, train_denoiser, train_head

    place = resolve_device(device)
    prepare_directory(out)
    if (out / "ocm.json").exists() and not overwrite:
        raise ValueError(f"--out {out} holds a checkpoint; choose another or pass --overwrite")
    images = datasets.load(data)
    # Another seed: the head sees other noisy images than those the denoiser was fitted to.
    head_settings = TrainingSettings(head_steps, batch_size, head_learning_rate, seed=seed + 1)
    record: dict[str, Any] = {"data": data, "head": asdict(head_settings)}
    record["head"]["target_probes"] = target_probes
    start = time.perf_counter()
    if denoiser is None:
        settings = TrainingSettings(
            denoiser_steps or 900, batch_size, learning_rate or 1e-3, seed=seed
        )
        name = (schedule or ScheduleName.cosine).value
        model = Denoiser(small_unet(images.shape, seed=seed).to(place), SCHEDULES[name](1000))
        losses = train_denoiser(model, images.train, settings, progress=not quiet)
        record["denoiser"] = asdict(settings) | {"schedule": name}
        record["denoiser_loss"] = mean_of_last(losses)
    else:
        for option, value in (
            ("--schedule", schedule),
            ("--denoiser-steps", denoiser_steps),
            ("--learning-rate", learning_rate),
        ):
            if value is not None:
                raise ValueError(
                    f"{option} {getattr(value, 'value', value)} is for a new denoiser; leave it "
                    "out with --denoiser"
                )
        loaded = checkpoints.load(denoiser, place)
        if loaded.image_shape != images.shape:
            raise ValueError(
                f"--denoiser takes images of shape {loaded.image_shape}, but those of --data "
                f"{data} have {images.shape}"
            )
        model = loaded.denoiser
        record["denoiser"] = str(denoiser)
    head = CovarianceHead.for_denoiser(model)
    losses = train_head(
        model, head, images.train, head_settings, num_probes=target_probes, progress=not quiet
    )
    record["head_loss"] = mean_of_last(losses)
    record["seconds"] = round(time.perf_counter() - start, 2)
    record["environment"] = environment(place)
    checkpoints.save(
        checkpoints.Checkpoint(model, head, images.shape, images.levels, images.name), out
    )
    _write_json(out / "train.json", record)
    typer.echo(f"head loss {record['head_loss']:.4f} after {record['seconds']:.0f} s")
    typer.echo(f"checkpoint: {out}   settings and losses: {out / 'train.json'}")


@app.command()
def sample(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Directory for the images.")] = Path("runs/sample"),
    covariance: Annotated[
        CovarianceName, typer.Option(help="Covariance of x0 given x_t.")
    ] = CovarianceName.ocm,
    sampler: Annotated[SamplerName, typer.Option(help="Reverse process.")] = SamplerName.ddpm,
    eta: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="DDIM's noise: 0 none, 1 DDPM's. Default: 0."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps K, evenly spaced.")] = 10,
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    last_noise: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Bound on the noise of the last noisy step, in grey levels of 256 (the paper "
            "uses 1 or 2); no bound if left out.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    num_probes: NumProbes = 8,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw images: writes samples.png, samples.safetensors and samples.json."""
    import torch
    from safetensors.torch import save_file

    from ocm import checkpoints, samplers
    from ocm.environment import environment
    from ocm.evaluation import CovarianceSettings, build_covariance
    from ocm.plots import sample_rows
    from ocm.schedules import even_timesteps

    place = resolve_device(device)
    prepare_directory(out)
    step: samplers.Sampler = samplers.ddpm
    if sampler is SamplerName.ddim:
        step = partial(samplers.ddim, eta=eta or 0.0)
    elif eta is not None:
        raise ValueError(f"--eta {eta} is for --sampler ddim; ddpm has no such choice")
    loaded = checkpoints.load(checkpoint, place)
    start = time.perf_counter()
    images = torch.cat(
        [
            samplers.sample(
                loaded.denoiser,
                build_covariance(covariance.value, loaded, CovarianceSettings(num_probes, seed)),
                (min(batch_size, num_images - first), *loaded.image_shape),
                even_timesteps(loaded.denoiser.schedule.num_timesteps, steps),
                sampler=step,
                seed=seed,
                sample_offset=first,
                max_last_noise=(
                    None if last_noise is None else samplers.last_step_noise(last_noise)
                ),
                progress=not quiet,
            ).cpu()
            for first in range(0, num_images, batch_size)
        ]
    )
    if not bool(torch.isfinite(images).all()):
        raise FloatingPointError("the samples hold NaN or infinity; does the denoiser?")
    record = {
        "checkpoint": str(checkpoint),
        "covariance": covariance.value,
        "sampler": sampler.value,
        "eta": (eta or 0.0) if sampler is SamplerName.ddim else None,
        "steps": steps,
        "num_images": num_images,
        "last_noise": last_noise,
        "num_probes": num_probes if covariance is CovarianceName.hutchinson else None,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 3),
        "pixel_mean": images.mean().item(),
        "pixel_std": images.std().item(),
        "environment": environment(place),
    }
    save_file({"images": images.contiguous()}, out / "samples.safetensors")
    shown = images[:_IMAGES_SHOWN]
    rows = {str(first): shown[first : first + 16] for first in range(0, len(shown), 16)}
    title = f"{sampler.value}, {steps} steps, covariance {covariance.value}, seed {seed}"
    sample_rows(rows, out / "samples.png", title=title)
    _write_json(out / "samples.json", record)
    typer.echo(
        f"{num_images} images in {record['seconds']:.1f} s, pixel mean {images.mean():.3f}, "
        f"standard deviation {images.std():.3f}"
    )
    typer.echo(f"first {len(shown)}: {out / 'samples.png'}   all: {out / 'samples.safetensors'}")


@app.command()
def evaluate(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Directory for evaluation.json.")] = Path(
        "runs/evaluate"
    ),
    covariance: Annotated[
        list[CovarianceName] | None,
        typer.Option(help="Covariance to score; may be given several times. Default: all."),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Steps K; may be given several times. Default: 5, 10, 25, 50."),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Held-out images to score.")] = 64,
    data: Annotated[
        str | None, typer.Option(help="Data set; default: the checkpoint's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    num_probes: NumProbes = 8,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Score held-out images in bits/dim, for every covariance and number of steps."""
    from ocm import checkpoints
    from ocm import data as datasets
    from ocm.environment import environment
    from ocm.evaluation import CovarianceSettings, likelihood_record, likelihood_table
    from ocm.report import likelihood_markdown

    place = resolve_device(device)
    prepare_directory(out)
    loaded = checkpoints.load(checkpoint, place)
    images = datasets.load(data or loaded.data)
    if images.shape != loaded.image_shape:
        raise ValueError(
            f"the checkpoint takes images of shape {loaded.image_shape}, but those of --data "
            f"{images.name} have {images.shape}"
        )
    if num_images > len(images.test):
        raise ValueError(
            f"--num-images must be at most {len(images.test)}, the held-out images of "
            f"{images.name}, got {num_images}"
        )
    names = [name.value for name in covariance or CovarianceName]
    step_counts = sorted(set(steps or (5, 10, 25, 50)))
    table = likelihood_table(
        loaded,
        images.test[:num_images],
        names,
        step_counts,
        settings=CovarianceSettings(num_probes, seed),
        seed=seed,
        batch_size=batch_size,
        progress=not quiet,
    )
    record = likelihood_record(table) | {
        "checkpoint": str(checkpoint),
        "data": images.name,
        "num_images": num_images,
        "num_probes": num_probes,
        "seed": seed,
        "environment": environment(place),
    }
    _write_json(out / "evaluation.json", record)
    typer.echo(f"Bits/dim on {num_images} held-out images of {images.name}\n")
    typer.echo(likelihood_markdown(table, step_counts))
    typer.echo(f"\nfigures: {out / 'evaluation.json'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and images: shows that it runs.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint in --out.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a denoiser and its OCM head on real digits, and compare the covariances.

    Takes six minutes on two cores. Writes metrics.json, report.md, samples.png,
    likelihood.png and the checkpoint.
    """
    from ocm.demo import QUICK, DemoSettings, run

    place = resolve_device(device)
    prepare_directory(out)
    settings = DemoSettings(seed=seed, **(QUICK if quick else {}))
    result = run(out, settings, device=place, progress=not quiet)
    typer.echo(result.summary)
    typer.echo(f"report: {out / 'report.md'}   pictures: {out / 'samples.png'}")


def resolve_device(name: str) -> Any:
    """Return the torch device called ``name``, with 'auto' for CUDA where there is one.

    Raises:
        ValueError: If there is no such device on this machine.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error}") from error
    return device


def prepare_directory(path: Path) -> None:
    """Make the directory of --out, before any work is done.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"--out {path} must be a directory to write to: {error}") from error


def run() -> None:
    """Run the command line; an error of input or arithmetic ends in one line and status 2."""
    try:
        app(prog_name="ocm")
    except (ValueError, FloatingPointError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _write_json(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
