"""``ocm sample``: images from a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ocm.cli import configuration, lasting, options
from ocm.files import write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ocm.checkpoints.checkpoint import Checkpoint

# In the picture; all of them are in samples.safetensors.
_IMAGES_SHOWN = 256
# Of a process that has drawn its samples for one that starts again.
_LONGEST_WAIT = timedelta(days=7)


def sample(
    context: typer.Context,
    checkpoint: options.ModelPath,
    out: Annotated[Path, typer.Option(help="Directory for the images.")] = Path("runs/sample"),
    covariance: Annotated[
        options.CovarianceName | None,
        typer.Option(
            metavar=options.NAME,
            help="Covariance of x0 given x_t. Default: a head, ml, else ocm, else another. "
            f"{options.ALL_NAMES}",
        ),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Take it as `ocm calibrate` fitted it.")
    ] = False,
    sampler: Annotated[
        Literal["ddpm", "ddim", "second-order"], typer.Option(help="Reverse process.")
    ] = "ddpm",
    eta: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=options.finite,
            help="Noise of ddim and second-order: 0 is none, 1 is DDPM's. Default: 0.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps K.")] = 10,
    spacing: Annotated[
        Literal["even", "trailing", "leading", "quadratic", "optimal"] | None,
        typer.Option(
            help="Which timesteps to take. The optimal ones come from dynamic programming on the "
            "analytic variances of `ocm calibrate`. Default: trailing; with --calibrated even, "
            "since `ocm calibrate` fits those."
        ),
    ] = None,
    label: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Class label, for models with classes; several take turns."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text, for models that take texts; several take turns."),
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(help="Pipeline whose text encoders read --prompt. Default: the model's own."),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings in place of --prompt: a file as for `ocm train --conditions`, whose "
            "rows take turns."
        ),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            callback=options.finite, help="Scale w of classifier-free guidance; 1 is none."
        ),
    ] = 1.0,
    vae: options.Vae = None,
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    last_noise: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            callback=options.finite,
            help="Bound on the noise of the last noisy step, in grey levels of 256; the paper "
            "uses 1 or 2. Default: no bound.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    num_probes: options.NumProbes = 8,
    lanczos_probes: options.LanczosProbes = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: configuration.Config = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw images from a checkpoint or from a pipeline of diffusers.

    Writes samples.png, samples.safetensors and samples.json. A pipeline without an attached
    head needs a covariance that takes none: --covariance beta, hutchinson, coloring and others.

    Sample i is the same in any batch. Under torchrun each process draws a part of the samples, and
    the first one writes them all.

    Every batch is kept in OUT/unfinished until all are drawn: the same command goes on from there.
    """
    from ocm.checkpoints.catalogue import CovarianceSettings, preferred
    from ocm.checkpoints.unfinished import Parts, digest, fingerprint
    from ocm.cli.inputs import check_conditions, conditions_of, model_at
    from ocm.covariances.names import CALIBRATED
    from ocm.evaluation.environment import environment
    from ocm.evaluation.samples import draw
    from ocm.sampling import samplers
    from ocm.sampling.extrapolation import SecondOrder

    place = options.resolve_device(device)
    options.prepare_directory(out)
    if sampler == "ddpm" and eta is not None:
        raise ValueError(
            f"--eta {eta} is for --sampler ddim or second-order; ddpm has no such choice"
        )
    reverse_processes: dict[str, samplers.Sampler | samplers.Multistep] = {
        "ddpm": samplers.ddpm,
        "ddim": partial(samplers.ddim, eta=eta or 0.0),
        "second-order": SecondOrder(eta or 0.0),
    }
    loaded = model_at(checkpoint, place)
    if vae is not None and loaded.x0_range is not None:
        raise ValueError(f"--vae {vae} is for a model of latents, and {checkpoint} is of images")
    texts, no_text = conditions_of(conditions, prompt, encoders or checkpoint, place)
    check_conditions(loaded.denoiser, texts)
    spacing = spacing or ("even" if calibrated else "trailing")
    timesteps = _timesteps(loaded, spacing, steps)
    name = preferred(loaded) if covariance is None else covariance.value
    name += CALIBRATED if calibrated else ""
    rank, processes, group = _join()
    first, end = (num_images * r // processes for r in (rank, rank + 1))
    chosen = {
        "covariance": name,
        "sampler": sampler,
        "eta": None if sampler == "ddpm" else eta or 0.0,
        "steps": steps,
        "timesteps": timesteps,
        "num_images": num_images,
        "labels": label,
        "prompts": prompt,
        "conditions": None if conditions is None else str(conditions),
        "guidance_scale": guidance,
        "last_noise": last_noise,
        "num_probes": num_probes,
        "lanczos_probes": lanczos_probes,
        "seed": seed,
        "processes": processes,
    }
    deciding = {
        **chosen,
        "batch_size": batch_size,
        "fingerprint of the checkpoint": fingerprint(checkpoint),
        "digest of the conditions": digest({**texts, **{f"no {k}": v for k, v in no_text.items()}}),
    }

    def drawn(parts: Parts) -> str:
        offsets = [int(name.removeprefix("from ")) for name in parts.names()]
        count = sum(min(batch_size, end - offset) for offset in offsets)
        return f"{count} of {end - first} images"

    own = f" {rank + 1} of {processes}" if processes > 1 else ""
    folder = out / "unfinished" / f"sample{own}"
    start = time.perf_counter()
    with lasting.kept_parts(folder, deciding, drawn) as parts:
        found = len(parts.names())
        images = draw(
            loaded,
            name,
            end - first,
            timesteps,
            sampler=reverse_processes[sampler],
            settings=CovarianceSettings(num_probes, lanczos_probes, seed),
            labels=label,
            conditions=texts,
            null_conditions=no_text,
            guidance_scale=guidance,
            seed=seed,
            first=first,
            batch_size=batch_size,
            max_last_noise=None if last_noise is None else samplers.last_step_noise(last_noise),
            parts=parts,
            progress=not quiet and rank == 0,
        )
        if processes > 1:
            images = _gathered(images, processes, group)
        if rank != 0:
            return
        if vae is not None:
            from ocm.integrations.latents import decode, load_autoencoder

            images = decode(load_autoencoder(vae, place), images)
        record = {
            "checkpoint": str(checkpoint),
            **chosen,
            "seconds": round(time.perf_counter() - start, 3),
            "batches_drawn_before": found,  # by the same command, which was interrupted
            "pixel_mean": images.mean().item(),
            "pixel_std": images.std().item(),
            "environment": environment(place),
        }
        configuration.record(context, out)
        _write(out, images, record)
    for finished in (out / "unfinished").glob("sample*"):
        Parts(finished).remove()
    typer.echo(
        f"{num_images} images in {record['seconds']:.1f} s, pixel mean {images.mean():.3f}, "
        f"standard deviation {images.std():.3f}"
    )
    shown = min(num_images, _IMAGES_SHOWN)
    typer.echo(f"first {shown}: {out / 'samples.png'}   all: {out / 'samples.safetensors'}")


def _write(out: Path, images: Tensor, record: Mapping[str, Any]) -> None:
    """Write samples, a picture of the first of them, and what is known of them."""
    from ocm.evaluation.pictures import sample_rows

    write_tensors(out / "samples.safetensors", {"images": images})
    shown = images[:_IMAGES_SHOWN]
    if shown.shape[1] not in (1, 3):  # latents: their first channel
        shown = shown[:, :1]
    rows = {str(first): shown[first : first + 16] for first in range(0, len(shown), 16)}
    title = "{sampler}, {steps} steps, covariance {covariance}, seed {seed}".format_map(record)
    sample_rows(rows, out / "samples.png", title=title)
    write_json(out / "samples.json", record)


def _timesteps(loaded: Checkpoint, spacing: str, steps: int) -> list[float]:
    """Return the K timesteps of the option --spacing."""
    from ocm.diffusion import timesteps

    schedule = loaded.denoiser.schedule
    if spacing in timesteps.SPACINGS:
        return timesteps.SPACINGS[spacing](schedule, steps)
    # From data, since near t = N the one from the score needs many images to be told from zero.
    if "analytic_data" not in loaded.analytic:
        raise ValueError(
            "--spacing optimal needs analytic variances, which this checkpoint has not got; "
            "`ocm calibrate` fits them"
        )
    variances = loaded.analytic["analytic_data"].variances(loaded.x0_range)
    return timesteps.optimal_timesteps(schedule, variances, steps)


def _join() -> tuple[int, int, Any]:
    """Return the number of this process, how many there are, and the group they are in, if any."""
    from torch import distributed

    from ocm.training.processes import join, naming_lost

    found = join("cpu")
    with naming_lost(found.count, lambda: "before all had come together"):
        group = None if found.count == 1 else distributed.new_group(timeout=_LONGEST_WAIT)
    return found.rank, found.count, group


def _gathered(images: Tensor, processes: int, group: Any) -> Tensor:
    """Return the samples of all processes in order."""
    import torch
    from torch import distributed

    from ocm.training.processes import naming_lost

    parts = [images] * processes
    with naming_lost(processes, lambda: "before all samples were drawn; those that were are kept"):
        distributed.all_gather_object(parts, images, group)
        distributed.barrier(group)  # not while another process still sends
    distributed.destroy_process_group()
    return torch.cat(parts)
