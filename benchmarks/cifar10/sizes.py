"""The sizes of the CIFAR-10 experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ocm.covariances.names import CALIBRATED
from ocm.sampling.samplers import ddim, ddpm
from ocm.training.settings import TrainingSettings

SCHEDULES = ("linear", "cosine")
NUM_TIMESTEPS = 1000
SEED = 0
# Those of the papers, in their units.
HEADS = ("iddpm", "npr", "sn", "ocm")
PLAIN = ("beta", "beta_tilde", "analytic", *HEADS)
# What samples are drawn with: beta is DDPM's other variance, and far worse at few steps.
SAMPLED = PLAIN[1:]
CALIBRATED_HEADS = tuple(name + CALIBRATED for name in HEADS)
SAMPLERS = {"ddpm": ddpm, "ddim": partial(ddim, eta=0.0)}
# Of ``last_step_noise``, by schedule and sampler: the grey levels that the last
# noisy step may move a pixel by on average. Two for CIFAR-10, the linear schedule and DDPM, else
# one, as in the settings of Analytic-DPM and of OCM.
LAST_NOISE = {(schedule, sampler): 1.0 for schedule in SCHEDULES for sampler in SAMPLERS} | {
    ("linear", "ddpm"): 2.0
}
DATA = (
    "CIFAR-10, re-encoded as JPEG of quality 75, which smooths the pixels: the figures compare "
    "methods with one another, not with those that papers report on the original images."
)


@dataclass(frozen=True)
class Cells:
    """Samples of one sampler: every covariance at every number of steps.

    Attributes:
        sampler: "ddpm" or "ddim", without noise of its own.
        covariances: Names, calibrated ones among them.
        counts: Numbers of steps K with the number of samples each.
    """

    sampler: str
    covariances: tuple[str, ...]
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Size:
    """Everything that differs between a full run and a smaller one.

    Attributes:
        name: What it is called.
        image_size: Side of the images in pixels.
        widths: Channels of the U-Net's resolutions; one for that of :func:`small_unet`.
        attention_sizes: Heights at which it attends.
        num_images: Most images of each split, None for all.
        num_validation: The last training images, which nothing is trained on.
        denoiser: Its training.
        heads: The training of each head.
        head_kind: "simple" or "residual", the same for all.
        target_probes: Probes in each target of OCM.
        step_counts: Numbers of steps K of the likelihood.
        num_scored: Test images whose likelihood is bounded.
        group: Images scored at a time; the standard errors are over groups.
        num_fit: Validation images that analytic variances and calibrations are fitted to.
        fit_spacing: Factor from a timestep that calibrations are fitted at to the next; between
            them they are interpolated, but for I-DDPM's, which is one for every step.
        num_chosen_on: Validation images of the check of the choice.
        samples: What is drawn.
        num_features: Of the classifier.
        classifier_steps: Its optimiser steps, of 64 images.
        num_real: Training images that samples are compared with.
        budgets: Network evaluations of the comparison at equal numbers of them.
        budget_samples: Samples for each row there.
        cost_batch: Images of a step whose cost is measured.
        cost_rounds: Rounds of that measurement.
        batch_size: Samples drawn at a time.
        samples_in_bfloat16: Whether samples are drawn under autocast; all else is in float32.
        side_by_side: Whether on a CPU each schedule has a process of its own, of one thread.
    """

    name: str
    image_size: int
    widths: tuple[int, ...]
    attention_sizes: tuple[int, ...]
    num_images: int | None
    num_validation: int
    denoiser: TrainingSettings
    heads: TrainingSettings
    head_kind: str
    target_probes: int
    step_counts: tuple[int, ...]
    num_scored: int
    group: int
    num_fit: int
    fit_spacing: float
    num_chosen_on: int
    samples: tuple[Cells, ...]
    num_features: int
    classifier_steps: int
    num_real: int
    budgets: tuple[int, ...]
    budget_samples: int
    cost_batch: int
    cost_rounds: int
    batch_size: int
    samples_in_bfloat16: bool
    side_by_side: bool


# For one H200 in three commands of at most nine minutes. The U-Net takes 3.5 GFLOP a forward pass
# of an image, three times that in training. Assumed: at best 60 TFLOP/s in bfloat16 and 30 in
# float32 (with TF32 convolutions), which small networks seldom reach, and so a margin of 1.5. The
# denoiser is then 200 s at best and 300 s with the margin, the heads 60 s and 90 s. The evaluation
# takes 1.1 million forward passes a schedule, 70 s and 105 s, and some 500 fits of calibrations,
# which wait for the device at each iteration: about a minute. It never ran on a GPU so far.
FULL = Size(
    name="full",
    image_size=32,
    widths=(64, 128, 192),
    attention_sizes=(16,),
    num_images=None,
    num_validation=2000,
    denoiser=TrainingSettings(
        num_steps=4400,
        batch_size=256,
        learning_rate=5e-4,
        warmup_steps=200,
        ema_decay=0.998,
        mixed_precision="bf16",
        horizontal_flip=True,
        checkpoint_every=1100,
    ),
    # In float32: the targets hold products with the Jacobian, and small differences of them.
    heads=TrainingSettings(
        num_steps=800,
        batch_size=128,
        learning_rate=3e-3,
        warmup_steps=50,
        ema_decay=0.99,
        horizontal_flip=True,
        checkpoint_every=400,
        seed=SEED + 1,
    ),
    # Chosen for all heads by those of NPR and OCM (results/cpu/cifar10_tried.json): residual, in
    # the units of the papers, a high rate for few steps. Four probes a target gained nothing.
    head_kind="residual",
    target_probes=1,
    step_counts=(5, 10, 25, 50, 100, 200),
    num_scored=512,
    group=64,
    num_fit=128,
    fit_spacing=1.15,
    num_chosen_on=512,
    samples=(
        Cells(
            "ddpm",
            SAMPLED + CALIBRATED_HEADS,
            ((5, 256), (10, 256), (25, 256), (50, 256), (100, 128), (200, 128)),
        ),
        Cells("ddim", SAMPLED, ((5, 256), (10, 256), (25, 256), (50, 256))),
    ),
    num_features=64,
    classifier_steps=3000,
    num_real=2000,
    budgets=(5, 10, 20),
    budget_samples=256,
    cost_batch=128,
    cost_rounds=21,
    batch_size=256,
    samples_in_bfloat16=True,
    side_by_side=True,
)
# For two cores in 25 minutes, each schedule in a process of one thread.
REDUCED = replace(
    FULL,
    name="reduced",
    image_size=16,
    widths=(24,),
    attention_sizes=(),
    num_images=20_000,
    num_validation=1000,
    denoiser=TrainingSettings(
        num_steps=1100, ema_decay=0.99, horizontal_flip=True, checkpoint_every=200
    ),
    heads=replace(
        FULL.heads,
        num_steps=300,
        batch_size=64,
        learning_rate=1e-2,
        warmup_steps=30,
        ema_decay=0.98,
        checkpoint_every=100,
    ),
    num_scored=128,
    group=8,
    num_fit=32,
    num_chosen_on=64,
    samples=(
        Cells("ddpm", SAMPLED + CALIBRATED_HEADS, ((5, 128), (10, 128), (25, 128))),
        Cells("ddim", SAMPLED, ((5, 128), (10, 128))),
    ),
    num_features=32,
    classifier_steps=800,
    num_real=1000,
    budgets=(5, 10, 20),
    budget_samples=128,
    cost_batch=8,
    cost_rounds=11,
    batch_size=64,
    samples_in_bfloat16=False,
)
# Every line runs, and the figures mean nothing.
QUICK = replace(
    REDUCED,
    name="quick",
    widths=(8,),
    num_images=80,
    num_validation=16,
    denoiser=replace(REDUCED.denoiser, num_steps=6, batch_size=8, warmup_steps=2),
    heads=replace(REDUCED.heads, num_steps=3, batch_size=8, warmup_steps=1),
    step_counts=(3, 10),
    num_scored=8,
    group=4,
    num_fit=6,
    fit_spacing=10.0,
    num_chosen_on=4,
    samples=(
        Cells("ddpm", ("beta_tilde", "analytic", "ocm", "ocm_calibrated"), ((3, 8),)),
        Cells("ddim", ("beta_tilde", "ocm"), ((3, 8),)),
    ),
    num_features=8,
    classifier_steps=5,
    num_real=40,
    budgets=(5,),
    budget_samples=8,
    cost_batch=2,
    cost_rounds=1,
    batch_size=8,
    samples_in_bfloat16=True,
    side_by_side=False,
)
SIZES = {size.name: size for size in (FULL, REDUCED, QUICK)}
