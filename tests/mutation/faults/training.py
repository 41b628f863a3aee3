"""Faults of the training of denoisers and heads."""

from __future__ import annotations

from faults.fault import Fault

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
    Fault(
        "heads without label dropout",
        OBJECTIVES,
        'none["labels"] = torch.tensor([denoiser.null_label])',
        "pass",
        OF_CONDITIONS,
    ),
    Fault(
        "denoisers without label dropout",
        OBJECTIVES,
        "conditions=_partly_null(rows, nulls, settings.seed, sample_offset)",
        "conditions=rows",
        OF_CONDITIONS,
    ),
    Fault(
        "who goes without a class by the place in the batch",
        OBJECTIVES,
        "chosen(len(values), seed, sample_offset, values.device)",
        "chosen(len(values), seed, 0, values.device)",
        OF_CONDITIONS,
    ),
    Fault(
        "heads' noise of place in the batch",
        OBJECTIVES,
        "seed=settings.seed,\n            sample_offset=sample_offset,\n            condition=",
        "seed=settings.seed,\n            sample_offset=0,\n            condition=",
        OF_LOSSES,
    ),
    Fault(
        "the denoiser's noise of place in the batch",
        OBJECTIVES,
        "seed=settings.seed,\n            sample_offset=sample_offset,\n            conditions=",
        "seed=settings.seed,\n            sample_offset=0,\n            conditions=",
        OF_LOSSES,
    ),
    Fault(
        "targets of unit data", OBJECTIVES, "x0, noise, schedule.data_std)", "x0, noise)", OF_LOSSES
    ),
    Fault(
        "processes share the random numbers of dropout",
        LOOP,
        'derived_seed(settings.seed, "module", step, processes.rank)',
        'derived_seed(settings.seed, "module", step)',
        OF_PROCESSES,
    ),
    Fault(
        "every step the random numbers of the first",
        LOOP,
        'derived_seed(settings.seed, "module", step, processes.rank)',
        'derived_seed(settings.seed, "module", processes.rank)',
        OF_PROCESSES,
    ),
    Fault(
        "accumulated gradients summed",
        LOOP,
        "scale(value / parts).backward()",
        "scale(value).backward()",
        OF_STEPS,
    ),
    Fault(
        "the average not taken at the end",
        LOOP,
        "training.average.copy_to(training.parameters)",
        "pass",
        OF_STEPS,
    ),
    Fault(
        "the average's warm-up starts anew",
        LOOP,
        "training.average.optimization_step = len(losses)",
        "pass",
        OF_GOING_ON,
    ),
    Fault("gradients unclipped", LOOP, "training.settings.max_gradient_norm", "1e9", OF_STEPS),
    Fault(
        "the last step's state not written",
        LOOP,
        " or step + 1 == settings.num_steps",
        "",
        OF_STEPS,
    ),
    Fault(
        "states a step late",
        LOOP,
        "(step + 1) % settings.checkpoint_every",
        "step % settings.checkpoint_every",
        OF_STEPS,
    ),
    Fault(
        "the caller's random numbers moved",
        LOOP,
        "torch.random.fork_rng(devices=[place] if",
        "torch.random.fork_rng(enabled=False, devices=[place] if",
        OF_STEPS,
    ),
    Fault(
        "timesteps not spread",
        BATCHES,
        "torch.rand(1, generator=generator)) / size",
        "torch.rand(size, generator=generator)) / size",
        OF_BATCHES,
    ),
    Fault(
        "the exponent of timesteps ignored",
        BATCHES,
        "place = place**settings.timestep_exponent",
        "pass",
        OF_BATCHES,
    ),
    Fault(
        "images flipped as one",
        BATCHES,
        "flips = torch.rand(size, generator=generator)",
        "flips = torch.rand(1, generator=generator).expand(size)",
        OF_BATCHES,
    ),
    Fault(
        "flips of other images",
        BATCHES,
        "flips = batch.flips[own]",
        "flips = batch.flips[:size]",
        OF_BATCHES,
    ),
    Fault(
        "conditions of other images",
        BATCHES,
        "rows_at(rows, picked)",
        "rows_at(rows, batch.indices[:size])",
        OF_BATCHES,
    ),
    Fault(
        "samples counted by micro-batches",
        BATCHES,
        "step * settings.batch_size + first)",
        "step * settings.batch_size)",
        OF_BATCHES,
    ),
    Fault(
        "a loader from the first micro-batch",
        BATCHES,
        "range(step * parts, self.settings.num_steps * parts)",
        "range(0, self.settings.num_steps * parts)",
        OF_GOING_ON,
    ),
    Fault(
        "trained on what is held back",
        WORKFLOW,
        "images.first(len(images.train) - kept)",
        "images.first(len(images.train))",
        OF_CHECKPOINTS,
    ),
    Fault(
        "labels lost for heads",
        WORKFLOW,
        "labels=shown.train_labels if base.denoiser.takes_labels else None",
        "labels=None",
        OF_CHECKPOINTS,
    ),
    Fault(
        "calibrations of old heads kept", WORKFLOW, "if name not in head_losses}", "}", OF_WORKFLOWS
    ),
    Fault(
        "a head that another starts from is changed",
        WORKFLOW,
        "head=copy.deepcopy(start.head)",
        "head=start.head",
        OF_WORKFLOWS,
    ),
    Fault(
        "heads' weights of seed 0",
        WORKFLOW,
        "make_head(base.denoiser, heads.kind, seed=heads.seed)",
        "make_head(base.denoiser, heads.kind)",
        OF_WORKFLOWS,
    ),
    Fault(
        "start_from's x0_range ignored",
        WORKFLOW,
        "base.learned[heads.start_from], **of_bound",
        "base.learned[heads.start_from]",
        OF_WORKFLOWS,
    ),
]
