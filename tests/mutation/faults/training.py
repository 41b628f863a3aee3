"""Faults of the training of denoisers and heads."""

from __future__ import annotations

from faults.fault import in_file

OF_CONDITIONS = (
    "tests/ocm/training/test_objectives.py",
    "-k",
    "condition_of_any_kind or conditions_and_without",
)
OF_LOSSES = ("tests/ocm/training/test_objectives.py", "-k", "knows_the_data or noise_of_its_own")
OF_STEPS = (
    "tests/ocm/training/test_loop.py",
    "-k",
    "adamw or random_numbers_of_the_caller or accumulated or finished_training or bar_says",
)
OF_PROCESSES = ("tests/ocm/training/test_loop.py", "-k", "two_processes_train or every_process")
OF_GOING_ON = ("tests/ocm/training/test_objectives.py", "-k", "same_bits")
OF_BATCHES = ("tests/ocm/training/test_batches.py", "-k", "not end_with and not worker")
OF_CHECKPOINTS = ("tests/ocm/checkpoints/test_held_back.py",)
OF_WORKFLOWS = ("tests/ocm/training/test_workflow.py",)

OBJECTIVES = "ocm/training/objectives.py"
LOOP = "ocm/training/loop.py"
BATCHES = "ocm/training/batches.py"
WORKFLOW = "ocm/training/workflow.py"

FAULTS = [
    *in_file(
        OBJECTIVES,
        OF_CONDITIONS,
        (
            "heads without label dropout",
            'none["labels"] = torch.tensor([denoiser.null_label])',
            "pass",
        ),
        (
            "denoisers without label dropout",
            "conditions=_partly_null(rows, nulls, settings.seed, sample_offset)",
            "conditions=rows",
        ),
        (
            "who goes without a class by the place in the batch",
            "chosen(len(values), seed, sample_offset, values.device)",
            "chosen(len(values), seed, 0, values.device)",
        ),
    ),
    *in_file(
        OBJECTIVES,
        OF_LOSSES,
        (
            "heads' noise of place in the batch",
            "seed=settings.seed,\n            sample_offset=sample_offset,\n            condition=",
            "seed=settings.seed,\n            sample_offset=0,\n            condition=",
        ),
        (
            "the denoiser's noise of place in the batch",
            "seed=settings.seed,\n            sample_offset=sample_offset,\n            "
            "conditions=",
            "seed=settings.seed,\n            sample_offset=0,\n            conditions=",
        ),
        ("targets of unit data", "x0, noise, schedule.data_std)", "x0, noise)"),
    ),
    *in_file(
        LOOP,
        OF_PROCESSES,
        (
            "processes share the random numbers of dropout",
            'derived_seed(settings.seed, "module", step, processes.rank)',
            'derived_seed(settings.seed, "module", step)',
        ),
        (
            "every step the random numbers of the first",
            'derived_seed(settings.seed, "module", step, processes.rank)',
            'derived_seed(settings.seed, "module", processes.rank)',
        ),
    ),
    *in_file(
        LOOP,
        OF_STEPS,
        (
            "accumulated gradients summed",
            "scale(value / parts).backward()",
            "scale(value).backward()",
        ),
        (
            "the average not taken at the end",
            "training.average.copy_to(training.parameters)",
            "pass",
        ),
        ("gradients unclipped", "training.settings.max_gradient_norm", "1e9"),
        ("the last step's state not written", " or step + 1 == settings.num_steps", ""),
        (
            "states a step late",
            "(step + 1) % settings.checkpoint_every",
            "step % settings.checkpoint_every",
        ),
        (
            "the caller's random numbers moved",
            "torch.random.fork_rng(devices=[place] if",
            "torch.random.fork_rng(enabled=False, devices=[place] if",
        ),
    ),
    *in_file(
        LOOP,
        OF_GOING_ON,
        (
            "the average's warm-up starts anew",
            "training.average.optimization_step = len(losses)",
            "pass",
        ),
    ),
    *in_file(
        BATCHES,
        OF_BATCHES,
        (
            "timesteps not spread",
            "torch.rand(1, generator=generator)) / size",
            "torch.rand(size, generator=generator)) / size",
        ),
        ("the exponent of timesteps ignored", "place = place**settings.timestep_exponent", "pass"),
        (
            "images flipped as one",
            "flips = torch.rand(size, generator=generator)",
            "flips = torch.rand(1, generator=generator).expand(size)",
        ),
        ("flips of other images", "flips = batch.flips[own]", "flips = batch.flips[:size]"),
        (
            "conditions of other images",
            "rows_at(rows, picked)",
            "rows_at(rows, batch.indices[:size])",
        ),
        (
            "samples counted by micro-batches",
            "step * settings.batch_size + first)",
            "step * settings.batch_size)",
        ),
    ),
    *in_file(
        BATCHES,
        OF_GOING_ON,
        (
            "a loader from the first micro-batch",
            "range(step * parts, self.settings.num_steps * parts)",
            "range(0, self.settings.num_steps * parts)",
        ),
    ),
    *in_file(
        WORKFLOW,
        OF_CHECKPOINTS,
        (
            "trained on what is held back",
            "images.first(len(images.train) - kept)",
            "images.first(len(images.train))",
        ),
        (
            "labels lost for heads",
            "labels=shown.train_labels if base.denoiser.takes_labels else None",
            "labels=None",
        ),
    ),
    *in_file(
        WORKFLOW,
        OF_WORKFLOWS,
        ("calibrations of old heads kept", "if name not in head_losses}", "}"),
        (
            "a head that another starts from is changed",
            "head=copy.deepcopy(start.head)",
            "head=start.head",
        ),
        (
            "heads' weights of seed 0",
            "make_head(base.denoiser, heads.kind, seed=heads.seed)",
            "make_head(base.denoiser, heads.kind)",
        ),
        (
            "start_from's x0_range ignored",
            "base.learned[heads.start_from], **of_bound",
            "base.learned[heads.start_from]",
        ),
        (
            "a state of a start from another head goes on",
            'f" from {heads.start_from}" if',
            '"" if',
        ),
    ),
]
