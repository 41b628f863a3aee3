"""Faults of checkpoints, what is fitted for them, and scores."""

from __future__ import annotations

from faults.fault import Fault

OF_HELD_BACK = ("tests/ocm/checkpoints/test_held_back.py",)
OF_CHECKPOINTS = (
    "tests/ocm/checkpoints/test_checkpoints.py",
    "tests/bad_input/test_checkpoints.py::test_what_is_spoiled_is_refused",
)
OF_CATALOGUE = ("tests/ocm/checkpoints/test_catalogue.py",)
OF_SCORES = ("tests/ocm/evaluation/test_scores.py",)
OF_EVALUATIONS = ("tests/ocm/evaluation/test_evaluation.py",)
OF_SAMPLES = ("tests/ocm/evaluation/test_samples.py",)
OF_DISTANCES = ("tests/ocm/evaluation/test_distances.py",)

HELD_BACK = "ocm/checkpoints/held_back.py"
FITTING = "ocm/checkpoints/fitting.py"
CATALOGUE = "ocm/checkpoints/catalogue.py"
WRITING = "ocm/checkpoints/writing.py"
READING = "ocm/checkpoints/reading.py"
WEIGHTS = "ocm/checkpoints/weights.py"
DISTANCES = "ocm/evaluation/distances.py"
SCORES = "ocm/evaluation/scores.py"
EVALUATION = "ocm/evaluation/evaluation.py"
SAMPLES = "ocm/evaluation/samples.py"
BY_ODE = "ocm/evaluation/by_ode.py"

FAULTS = [
    # Checkpoints and what they need.
    Fault(
        "calibrated on images that were trained on",
        HELD_BACK,
        "slice(len(images.train) - kept, len(images.train) - kept + count)",
        "slice(0, count)",
        OF_HELD_BACK,
    ),
    Fault(
        "calibrated with the labels of other images",
        HELD_BACK,
        "classes[chosen]",
        "classes[:count]",
        OF_HELD_BACK,
    ),
    Fault(
        "more images than were asked for",
        HELD_BACK,
        "len(images.train) - kept + count",
        "len(images.train)",
        OF_HELD_BACK,
    ),
    Fault(
        "analytic fits ignore the data's range",
        FITTING,
        '"x0_range": checkpoint.x0_range}',
        '"x0_range": None}',
        OF_CATALOGUE,
    ),
    Fault(
        "calibrations by timestep where s counts",
        FITTING,
        "steps if covariance.depends_on_s else timesteps",
        "timesteps",
        OF_SCORES,
    ),
    Fault(
        "fits without the first timestep",
        FITTING,
        "sorted({1, *(t for _, t in steps)})",
        "sorted({t for _, t in steps})",
        OF_CATALOGUE,
    ),
    Fault("fits lose their labels", FITTING, '"labels": labels', '"labels": None', OF_EVALUATIONS),
    Fault(
        "calibrations lose the data's range",
        CATALOGUE,
        "Calibrated((covariance,), weights, checkpoint.x0_range)",
        "Calibrated((covariance,), weights)",
        OF_CATALOGUE,
    ),
    Fault(
        "colorings without their colors",
        CATALOGUE,
        '{"probes": hessdiag.Coloring(settings.num_probes)} if name == "coloring" else {}',
        "{}",
        OF_CATALOGUE,
    ),
    Fault(
        "probes' seed lost",
        CATALOGUE,
        "entry.make(denoiser, settings.num_probes, settings.seed, **design)",
        "entry.make(denoiser, settings.num_probes, **design)",
        OF_CATALOGUE,
    ),
    Fault(
        "Lanczos with the probes of others",
        CATALOGUE,
        "entry.make(denoiser, settings.lanczos_probes)",
        "entry.make(denoiser)",
        OF_CATALOGUE,
    ),
    Fault(
        "heads on disk in other units",
        WRITING,
        '"parameterisation": covariance.parameterisation.to_json()',
        '"parameterisation": {"data_std": 0.5, "positive": True}',
        OF_CHECKPOINTS,
    ),
    Fault(
        "paths on disk without their options",
        WRITING,
        '({"options": dict(schedule.options)} if schedule.options else {})',
        "{}",
        OF_CHECKPOINTS,
    ),
    Fault(
        "the data's covariance not written",
        WRITING,
        "if denoiser.data_covariance is not None:",
        "if False:",
        OF_CHECKPOINTS,
    ),
    Fault(
        "heads left in training mode",
        READING,
        "covariance.head.to(device).eval().requires_grad_(False)",
        "covariance.head.to(device)",
        OF_CHECKPOINTS,
    ),
    Fault("non-finite heads read", WEIGHTS, "torch.isfinite(", "torch.isreal(", OF_CHECKPOINTS),
    Fault(
        "x0_range on disk ignored",
        READING,
        "x0_range=None if bounds is None else (bounds[0], bounds[1])",
        "x0_range=(-1.0, 1.0)",
        OF_CHECKPOINTS,
    ),
    # Scores.
    Fault(
        "MMD with the terms of i = i",
        DISTANCES,
        "left_out = len(a) if a is b else 0",
        "left_out = 0",
        OF_DISTANCES,
    ),
    Fault(
        "balls a neighbour too small",
        DISTANCES,
        "kthvalue(num_neighbours + 1)",
        "kthvalue(num_neighbours)",
        OF_DISTANCES,
    ),
    Fault(
        "centred by each its own mean",
        DISTANCES,
        "return a - mean, b - mean",
        "return a - mean, b - b.mean(0)",
        OF_DISTANCES,
    ),
    Fault(
        "standard errors of one image",
        SCORES,
        "values.std().item() / math.sqrt(len(values))",
        "values.std().item()",
        OF_SCORES,
    ),
    Fault(
        "scores of every batch on the first's noise",
        SCORES,
        "noisy_prediction(denoiser, x0, t, seed, first, condition=condition)",
        "noisy_prediction(denoiser, x0, t, seed, 0, condition=condition)",
        OF_SCORES,
    ),
    Fault(
        "scores' variances of the step before",
        SCORES,
        "if name not in shared or covariance.depends_on_s:",
        "if name not in shared:",
        OF_SCORES,
    ),
    Fault(
        "calibrated scores unbounded",
        SCORES,
        "bounded = version.bounded(X0_RANGE)",
        "bounded = version",
        OF_EVALUATIONS,
    ),
    Fault(
        "calibrations of the next step",
        SCORES,
        "calibrations[name].at(s, t)",
        "calibrations[name].at(None, t)",
        OF_SCORES,
    ),
    Fault(
        "evaluations lose their labels",
        EVALUATION,
        "labels=images.test_labels if checkpoint.denoiser.takes_labels else None,\n"
        "        settings",
        "labels=None,\n        settings",
        OF_EVALUATIONS,
    ),
    Fault(
        "evaluations fit to the wrong number of images",
        EVALUATION,
        "held_back(checkpoint, images, settings.fit_images)",
        "held_back(checkpoint, images, settings.num_images)",
        OF_EVALUATIONS,
    ),
    Fault(
        "fits of other steps taken",
        EVALUATION,
        "table is None or not table.covers(steps)",
        "table is None",
        OF_EVALUATIONS,
    ),
    Fault(
        "evaluations' samples by DDPM twice",
        EVALUATION,
        "partial(ddim, eta=0.0)",
        "partial(ddim, eta=1.0)",
        OF_EVALUATIONS,
    ),
    Fault(
        "the held-out figures of training images",
        EVALUATION,
        "floor = quality(real, extractor(images.test))",
        "floor = quality(real, extractor(images.train))",
        OF_EVALUATIONS,
    ),
    Fault(
        "samples of every batch alike",
        SAMPLES,
        "sample_offset=offset",
        "sample_offset=0",
        OF_SAMPLES,
    ),
    Fault(
        "labels restart in every batch of samples",
        SAMPLES,
        "numbers = torch.arange(offset, offset + count)",
        "numbers = torch.arange(count)",
        OF_SAMPLES,
    ),
    Fault(
        "samples clipped as images",
        SAMPLES,
        "x0_range=checkpoint.x0_range",
        "x0_range=(-1.0, 1.0)",
        OF_SAMPLES,
    ),
    Fault(
        "guidance lost",
        SAMPLES,
        "turns, null_conditions, guidance_scale)",
        "turns, null_conditions)",
        OF_SAMPLES,
    ),
    Fault(
        "the last noise's bound lost",
        SAMPLES,
        "max_last_noise=max_last_noise",
        "max_last_noise=None",
        OF_SAMPLES,
    ),
    Fault(
        "the mean distance for a bandwidth",
        SAMPLES,
        "torch.pdist(features[:count].double()).median()",
        "torch.pdist(features[:count].double()).mean()",
        OF_SAMPLES,
    ),
    Fault(
        "ODE scores' labels restart",
        BY_ODE,
        "condition=labelled(denoiser, labels, first, len(batch))",
        "condition=labelled(denoiser, labels, 0, len(batch))",
        OF_EVALUATIONS,
    ),
    Fault(
        "ODE scores on the first images' noise",
        BY_ODE,
        "sample_offset=first",
        "sample_offset=0",
        OF_EVALUATIONS,
    ),
]
