"""Faults of checkpoints, what is fitted for them, and scores."""

from __future__ import annotations

from faults.fault import in_file

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

FITTING = "ocm/checkpoints/fitting.py"
SCORES = "ocm/evaluation/scores.py"

FAULTS = [
    # Checkpoints and what they need.
    *in_file(
        "ocm/checkpoints/held_back.py",
        OF_HELD_BACK,
        (
            "calibrated on images that were trained on",
            "slice(len(images.train) - kept, len(images.train) - kept + count)",
            "slice(0, count)",
        ),
        ("calibrated with the labels of other images", "classes[chosen]", "classes[:count]"),
        (
            "more images than were asked for",
            "len(images.train) - kept + count",
            "len(images.train)",
        ),
    ),
    *in_file(
        FITTING,
        OF_CATALOGUE,
        (
            "analytic fits ignore the data's range",
            '"x0_range": checkpoint.x0_range}',
            '"x0_range": None}',
        ),
        (
            "fits without the first timestep",
            "sorted({1, *(t for _, t in steps)})",
            "sorted({t for _, t in steps})",
        ),
    ),
    *in_file(
        FITTING,
        OF_SCORES,
        (
            "calibrations by timestep where s counts",
            "steps if covariance.depends_on_s else timesteps",
            "timesteps",
        ),
    ),
    *in_file(
        FITTING, OF_EVALUATIONS, ("fits lose their labels", '"labels": labels', '"labels": None')
    ),
    *in_file(
        "ocm/checkpoints/catalogue.py",
        OF_CATALOGUE,
        (
            "calibrations lose the data's range",
            "Calibrated((covariance,), weights, checkpoint.x0_range)",
            "Calibrated((covariance,), weights)",
        ),
        (
            "colorings without their colors",
            '{"probes": hessdiag.Coloring(settings.num_probes)} if name == "coloring" else {}',
            "{}",
        ),
        (
            "probes' seed lost",
            "entry.make(denoiser, settings.num_probes, settings.seed, **design)",
            "entry.make(denoiser, settings.num_probes, **design)",
        ),
        (
            "Lanczos with the probes of others",
            "entry.make(denoiser, settings.lanczos_probes)",
            "entry.make(denoiser)",
        ),
    ),
    *in_file(
        "ocm/checkpoints/writing.py",
        OF_CHECKPOINTS,
        (
            "heads on disk in other units",
            '"parameterisation": covariance.parameterisation.to_json()',
            '"parameterisation": {"data_std": 0.5, "positive": True}',
        ),
        (
            "paths on disk without their options",
            '({"options": dict(schedule.options)} if schedule.options else {})',
            "{}",
        ),
        (
            "the data's covariance not written",
            "if denoiser.data_covariance is not None:",
            "if False:",
        ),
    ),
    *in_file(
        "ocm/checkpoints/reading.py",
        OF_CHECKPOINTS,
        (
            "heads left in training mode",
            "covariance.head.to(device).eval().requires_grad_(False)",
            "covariance.head.to(device)",
        ),
        (
            "x0_range on disk ignored",
            "x0_range=None if bounds is None else (bounds[0], bounds[1])",
            "x0_range=(-1.0, 1.0)",
        ),
    ),
    *in_file(
        "ocm/checkpoints/weights.py",
        OF_CHECKPOINTS,
        ("non-finite heads read", "torch.isfinite(", "torch.isreal("),
    ),
    # Scores.
    *in_file(
        "ocm/evaluation/distances.py",
        OF_DISTANCES,
        ("MMD with the terms of i = i", "left_out = len(a) if a is b else 0", "left_out = 0"),
        ("balls a neighbour too small", "kthvalue(num_neighbours + 1)", "kthvalue(num_neighbours)"),
        (
            "centred by each its own mean",
            "return a - mean, b - mean",
            "return a - mean, b - b.mean(0)",
        ),
    ),
    *in_file(
        SCORES,
        OF_SCORES,
        (
            "standard errors of one image",
            "values.std().item() / math.sqrt(len(values))",
            "values.std().item()",
        ),
        (
            "scores of every batch on the first's noise",
            "noisy_prediction(denoiser, x0, t, seed, first, condition=condition)",
            "noisy_prediction(denoiser, x0, t, seed, 0, condition=condition)",
        ),
        (
            "scores' variances of the step before",
            "if name not in shared or covariance.depends_on_s:",
            "if name not in shared:",
        ),
        (
            "calibrations of the next step",
            "calibrations[name].at(s, t)",
            "calibrations[name].at(None, t)",
        ),
    ),
    *in_file(
        SCORES,
        OF_EVALUATIONS,
        ("calibrated scores unbounded", "bounded = version.bounded(X0_RANGE)", "bounded = version"),
    ),
    *in_file(
        "ocm/evaluation/evaluation.py",
        OF_EVALUATIONS,
        (
            "evaluations lose their labels",
            "labels=images.test_labels if checkpoint.denoiser.takes_labels else None,\n"
            "        settings",
            "labels=None,\n        settings",
        ),
        (
            "evaluations fit to the wrong number of images",
            "held_back(checkpoint, images, settings.fit_images)",
            "held_back(checkpoint, images, settings.num_images)",
        ),
        ("fits of other steps taken", "table is None or not table.covers(steps)", "table is None"),
        ("evaluations' samples by DDPM twice", "partial(ddim, eta=0.0)", "partial(ddim, eta=1.0)"),
        (
            "the held-out figures of training images",
            "floor = quality(real, extractor(images.test))",
            "floor = quality(real, extractor(images.train))",
        ),
    ),
    *in_file(
        "ocm/evaluation/samples.py",
        OF_SAMPLES,
        ("samples of every batch alike", "sample_offset=offset", "sample_offset=0"),
        (
            "labels restart in every batch of samples",
            "numbers = torch.arange(offset, offset + count)",
            "numbers = torch.arange(count)",
        ),
        ("samples clipped as images", "x0_range=checkpoint.x0_range", "x0_range=(-1.0, 1.0)"),
        ("guidance lost", "turns, null_conditions, guidance_scale)", "turns, null_conditions)"),
        ("the last noise's bound lost", "max_last_noise=max_last_noise", "max_last_noise=None"),
        (
            "the mean distance for a bandwidth",
            "torch.pdist(features[:count].double()).median()",
            "torch.pdist(features[:count].double()).mean()",
        ),
    ),
    *in_file(
        "ocm/evaluation/by_ode.py",
        OF_EVALUATIONS,
        (
            "ODE scores' labels restart",
            "condition=labelled(denoiser, labels, first, len(batch))",
            "condition=labelled(denoiser, labels, 0, len(batch))",
        ),
        ("ODE scores on the first images' noise", "sample_offset=first", "sample_offset=0"),
    ),
]
