"""Faults of the command line: options that do not arrive, progress that is not so."""

from __future__ import annotations

from faults.fault import in_file

PASSED_ON = ("tests/ocm/cli/test_options_passed_on.py",)

FAULTS = [
    *in_file(
        "ocm/cli/train.py",
        PASSED_ON,
        (
            "heads trained on the denoiser's noise",
            "learning_rate=head_learning_rate, seed=seed + 1",
            "learning_rate=head_learning_rate, seed=seed",
        ),
        ("--flip lost", "horizontal_flip=flip,", ""),
        ("--accumulation lost", "gradient_accumulation_steps=accumulation,", ""),
        ("--mixed-precision lost", "mixed_precision=mixed_precision,", ""),
        (
            "--head-learning-rate lost",
            "num_steps=head_steps, learning_rate=head_learning_rate,",
            "num_steps=head_steps,",
        ),
        ("--checkpoint-every lost", "checkpoint_every=checkpoint_every,", ""),
        ("--limit lost", "limit=limit,", ""),
    ),
    *in_file(
        "ocm/cli/sample.py",
        PASSED_ON,
        ("--eta lost", "partial(samplers.ddim, eta=eta or 0.0)", "samplers.ddim"),
        ("--eta lost for second order", "SecondOrder(eta or 0.0)", "SecondOrder()"),
        (
            "--seed lost for probes",
            "CovarianceSettings(num_probes, lanczos_probes, seed)",
            "CovarianceSettings(num_probes, lanczos_probes)",
        ),
        ("--batch-size lost", "batch_size=batch_size,", ""),
        (
            "--last-noise as a standard deviation",
            "samplers.last_step_noise(last_noise)",
            "last_noise",
        ),
        (
            "calibrated samples take trailing steps",
            '("even" if calibrated else "trailing")',
            '"trailing"',
        ),
    ),
    *in_file(
        "ocm/cli/evaluate.py",
        PASSED_ON,
        ("--decoder lost", "decoder=decoder,", ""),
        ("--tolerance lost", "tolerance=tolerance,", ""),
        ("--fit-images lost", "fit_images=fit_images,", ""),
        ("--num-samples lost", "num_samples=num_samples,", ""),
        ("--seed of the evaluation lost", "seed=seed,\n        batch_size", "batch_size"),
        (
            "levels of the checkpoint for --data",
            "loaded = replace(loaded, levels=images.levels)",
            "pass",
        ),
    ),
    *in_file(
        "ocm/cli/calibrate.py",
        PASSED_ON,
        (
            "--seed of the calibration lost",
            "CovarianceSettings(num_probes, seed=seed)",
            "CovarianceSettings(num_probes)",
        ),
        (
            "--num-images of the calibration lost",
            "held_back(loaded, images, num_images)",
            "held_back(loaded, images, 512)",
        ),
        ("--steps of the calibration lost", "steps or [5, 10, 25, 50]", "[5, 10, 25, 50]"),
    ),
    *in_file(
        "ocm/progress.py",
        ("tests/ocm/test_progress.py",),
        (
            "the time left of what was done before too",
            "elapsed / (count - done)",
            "elapsed / count",
        ),
        ("a log as often as a bar", "_REDRAW if console.is_terminal else _RELOG", "_REDRAW"),
        ("no picture at the end", "if count == total or time.", "if time."),
        ("the rest of a longer picture left", "{text:{room}.{room}}", "{text:.{room}}"),
        (
            "an error on the line of a bar",
            "    finally:\n        end_line()",
            "    finally:\n        pass",
        ),
    ),
    *in_file(
        "ocm/cli/app.py",
        ("tests/ocm/test_progress.py", "-k", "ends_its_bar"),
        (
            "an error on a bar",
            '        end_line()\n        typer.echo(f"error',
            '        typer.echo(f"error',
        ),
        ("an interruption on a bar", "                end_line()\n", ""),
    ),
]
