"""The sizes of the experiment on Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ocm.training.settings import TrainingSettings

SEED = 0
# Of the samples that settings are chosen on.
TUNING_SEED = 1000
NUM_TIMESTEPS = 1000
# The path of each model, and what its network predicts.
MODELS = {"flow": "flow_prediction", "cosine": "v_prediction"}


@dataclass(frozen=True)
class Size:
    """Everything that differs between a full run and a smaller one.

    Attributes:
        name: What it is called.
        image_size: Side of the images in pixels, even: 2x2 of them are channels of one place.
        num_validation: The last training images, which nothing is trained on.
        width: Channels of the U-Net.
        denoiser: Its training.
        head: The training of OCM's head.
        classifier_steps: Optimiser steps of the classifier, of 64 images.
        num_features: Of the classifier.
        num_real: Images that samples are compared with.
        num_fit: Validation images that analytic variances are fitted to.
        tuning_samples: Samples for each setting that is tried.
        tuning_budget: Network evaluations of each.
        budgets: Network evaluations of the tables.
        num_samples: Samples for each cell of the tables.
        product_samples: The same where a covariance takes products.
        product_budgets: Network evaluations there, products apart.
        blocks: Blocks of samples, one of which is left out in turn for the standard error.
        batch_size: Samples drawn at a time.
        num_shown: Samples of a row of the picture.
        step_counts: Numbers of steps K of the likelihood.
        num_scored: Test images whose likelihood is bounded.
        num_calibration: Validation images that calibrations are fitted to.
        coloring_probes: Products of the coloring whose likelihood is bounded.
        side_by_side: Whether each model has a process of its own, of one thread.
    """

    name: str
    image_size: int
    num_validation: int
    width: int
    denoiser: TrainingSettings
    head: TrainingSettings
    classifier_steps: int
    num_features: int
    num_real: int
    num_fit: int
    tuning_samples: int
    tuning_budget: int
    budgets: tuple[int, ...]
    num_samples: int
    product_samples: int
    product_budgets: tuple[int, ...]
    blocks: int
    batch_size: int
    num_shown: int
    step_counts: tuple[int, ...]
    num_scored: int
    num_calibration: int
    coloring_probes: int
    side_by_side: bool


REDUCED = Size(
    name="reduced",
    image_size=16,
    num_validation=10_000,
    width=24,
    denoiser=TrainingSettings(
        num_steps=1500, learning_rate=2e-3, warmup_steps=100, checkpoint_every=100, seed=SEED
    ),
    head=TrainingSettings(
        num_steps=200,
        learning_rate=1e-2,
        ema_decay=0.98,
        checkpoint_every=50,
        seed=SEED + 1,
    ),
    classifier_steps=600,
    num_features=32,
    num_real=5000,
    num_fit=256,
    tuning_samples=300,
    tuning_budget=10,
    budgets=(10, 5, 20),
    num_samples=2000,
    product_samples=500,
    product_budgets=(10,),
    blocks=10,
    batch_size=250,
    num_shown=16,
    step_counts=(5, 10, 20),
    num_scored=64,
    num_calibration=32,
    coloring_probes=48,
    side_by_side=True,
)
# Every line runs, and the figures mean nothing.
QUICK = replace(
    REDUCED,
    name="quick",
    width=8,
    denoiser=replace(REDUCED.denoiser, num_steps=4, batch_size=8, warmup_steps=1),
    head=replace(REDUCED.head, num_steps=3, batch_size=8, warmup_steps=1),
    classifier_steps=5,
    num_features=4,
    num_real=40,
    num_fit=8,
    tuning_samples=12,
    tuning_budget=3,
    budgets=(3,),
    num_samples=12,
    product_samples=12,
    product_budgets=(3,),
    blocks=2,
    batch_size=12,
    num_shown=4,
    step_counts=(3,),
    num_scored=4,
    num_calibration=4,
    coloring_probes=12,
    side_by_side=False,
)
