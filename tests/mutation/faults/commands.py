"""Faults of the command line: options that do not arrive."""

from __future__ import annotations

from faults.fault import Fault

PASSED_ON = ("tests/ocm/cli/test_options_passed_on.py",)

TRAIN = "ocm/cli/train.py"
SAMPLE = "ocm/cli/sample.py"
EVALUATE = "ocm/cli/evaluate.py"
CALIBRATE = "ocm/cli/calibrate.py"

FAULTS = [
    Fault(
        "heads trained on the denoiser's noise",
        TRAIN,
        "learning_rate=head_learning_rate, seed=seed + 1",
        "learning_rate=head_learning_rate, seed=seed",
        PASSED_ON,
    ),
    Fault("--flip lost", TRAIN, "horizontal_flip=flip,", "", PASSED_ON),
    Fault("--accumulation lost", TRAIN, "gradient_accumulation_steps=accumulation,", "", PASSED_ON),
    Fault("--mixed-precision lost", TRAIN, "mixed_precision=mixed_precision,", "", PASSED_ON),
    Fault(
        "--head-learning-rate lost",
        TRAIN,
        "num_steps=head_steps, learning_rate=head_learning_rate,",
        "num_steps=head_steps,",
        PASSED_ON,
    ),
    Fault("--checkpoint-every lost", TRAIN, "checkpoint_every=checkpoint_every,", "", PASSED_ON),
    Fault("--limit lost", TRAIN, "limit=limit,", "", PASSED_ON),
    Fault(
        "--eta lost", SAMPLE, "partial(samplers.ddim, eta=eta or 0.0)", "samplers.ddim", PASSED_ON
    ),
    Fault(
        "--eta lost for second order", SAMPLE, "SecondOrder(eta or 0.0)", "SecondOrder()", PASSED_ON
    ),
    Fault(
        "--seed lost for probes",
        SAMPLE,
        "CovarianceSettings(num_probes, lanczos_probes, seed)",
        "CovarianceSettings(num_probes, lanczos_probes)",
        PASSED_ON,
    ),
    Fault("--batch-size lost", SAMPLE, "batch_size=batch_size,", "", PASSED_ON),
    Fault(
        "--last-noise as a standard deviation",
        SAMPLE,
        "samplers.last_step_noise(last_noise)",
        "last_noise",
        PASSED_ON,
    ),
    Fault(
        "calibrated samples take trailing steps",
        SAMPLE,
        '("even" if calibrated else "trailing")',
        '"trailing"',
        PASSED_ON,
    ),
    Fault("--decoder lost", EVALUATE, "decoder=decoder,", "", PASSED_ON),
    Fault("--tolerance lost", EVALUATE, "tolerance=tolerance,", "", PASSED_ON),
    Fault("--fit-images lost", EVALUATE, "fit_images=fit_images,", "", PASSED_ON),
    Fault("--num-samples lost", EVALUATE, "num_samples=num_samples,", "", PASSED_ON),
    Fault(
        "--seed of the evaluation lost",
        EVALUATE,
        "seed=seed,\n        batch_size",
        "batch_size",
        PASSED_ON,
    ),
    Fault(
        "levels of the checkpoint for --data",
        EVALUATE,
        "loaded = replace(loaded, levels=images.levels)",
        "pass",
        PASSED_ON,
    ),
    Fault(
        "--seed of the calibration lost",
        CALIBRATE,
        "CovarianceSettings(num_probes, seed=seed)",
        "CovarianceSettings(num_probes)",
        PASSED_ON,
    ),
    Fault(
        "--num-images of the calibration lost",
        CALIBRATE,
        "held_back(loaded, images, num_images)",
        "held_back(loaded, images, 512)",
        PASSED_ON,
    ),
    Fault(
        "--steps of the calibration lost",
        CALIBRATE,
        "steps or [5, 10, 25, 50]",
        "[5, 10, 25, 50]",
        PASSED_ON,
    ),
]
