"""``ocm calibrate``: what covariances need from a pass over training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ocm.cli import configuration, lasting, options
from ocm.files import write_json


def calibrate(
    context: typer.Context,
    checkpoint: options.CheckpointPath,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for calibration.json. Default: the checkpoint's own."),
    ] = None,
    covariance: Annotated[
        list[options.CovarianceName] | None,
        typer.Option(
            metavar=options.NAME,
            help="Covariance to calibrate; may be given several times. Default: the analytic ones "
            f"and those with a trained head. {options.ALL_NAMES}",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Fit at the timesteps of K steps; may be given several times. Numbers between "
            "them are interpolated. Default: 5, 10, 25, 50.",
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(
            min=2,
            help="Most images to fit to. Those kept from training are taken, if there are any.",
        ),
    ] = 512,
    data: options.Data = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images before --vae encodes them.")
    ] = None,
    vae: options.Vae = None,
    num_probes: options.NumProbes = 8,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: configuration.Config = None,
    quiet: options.Quiet = False,
) -> None:
    """Fit analytic variances and calibrations, and store them in a checkpoint.

    A calibrated covariance is a_t Cov + b_t, and is called NAME_calibrated. The two numbers of each
    timestep maximise the Gaussian likelihood of training images around the denoiser's mean.

    What is fitted is kept in OUT/unfinished until all is: the same command goes on from there.
    """
    from ocm import checkpoints
    from ocm.checkpoints.catalogue import CovarianceSettings, available, build_covariance
    from ocm.checkpoints.fitting import fitted
    from ocm.checkpoints.held_back import held_back
    from ocm.checkpoints.unfinished import Parts, digest, fingerprint
    from ocm.cli.inputs import images_for
    from ocm.covariances.names import has_density, named
    from ocm.evaluation.environment import environment
    from ocm.evaluation.scores import steps_of

    place = options.resolve_device(device)
    record_folder = out or checkpoint
    loaded = checkpoints.load(checkpoint, place)
    options.prepare_directory(checkpoint, "CHECKPOINT")
    options.prepare_directory(record_folder)
    trajectories = steps_of(loaded.denoiser.schedule, steps or [5, 10, 25, 50])
    chosen = list(dict.fromkeys(name.value for name in covariance or []))
    names = chosen or [n for n in available(loaded) if n in named("fitted", "learned")]
    settings = CovarianceSettings(num_probes, seed=seed)
    for name in names:
        if not has_density(name):
            raise ValueError(f"--covariance {name} has no density, and so nothing to calibrate")
        if name not in named("fitted"):
            build_covariance(name, loaded, settings)  # raises without what it needs
    images = images_for(loaded, data, vae, image_size, progress=not quiet)
    x0, labels = held_back(loaded, images, num_images)
    deciding = {
        "covariances": names,
        "steps": trajectories,
        "num_probes": num_probes,
        "seed": seed,
        # What is fitted here does not depend on what was fitted before.
        "fingerprint of the checkpoint": fingerprint(checkpoint, without=("tables.json",)),
        "digest of the images": digest({"x0": x0, "labels": labels}),
    }

    def tables(parts: Parts) -> str:
        return f"{len(parts.names())} of {len(names) + len({*names} & {*named('fitted')})} tables"

    folder = record_folder / "unfinished" / "calibrate"
    with lasting.kept_parts(folder, deciding, tables) as parts:
        result = fitted(
            loaded,
            x0,
            names,
            trajectories,
            calibrated=names,
            labels=labels,
            settings=settings,
            seed=seed,
            parts=parts,
            progress=not quiet,
        )
        checkpoints.save_tables(result, checkpoint)
        record = {
            "checkpoint": str(checkpoint),
            "data": images.name,
            "num_images": len(x0),
            "seed": seed,
            "calibrations": {name: result.calibrations[name].to_json() for name in names},
            "environment": environment(place),
        }
        configuration.record(context, record_folder)
        write_json(record_folder / "calibration.json", record)
    parts.remove()
    typer.echo("covariance       scale a and shift b at the lowest, a middle and the highest t")
    for name in names:
        table = result.calibrations[name]
        shown = [0, len(table.values) // 2, len(table.values) - 1]
        cells = "   ".join(f"{table.values[i, 0]:.3g}, {table.values[i, 1]:.3g}" for i in shown)
        typer.echo(f"{name:<16} {cells}")
    typer.echo(f"written into {checkpoint}; figures: {record_folder / 'calibration.json'}")
