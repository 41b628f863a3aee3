"""The sizes of the comparison of heads: its data sets, paths and trainings."""

from __future__ import annotations

from dataclasses import dataclass

from ocm.training.settings import TrainingSettings

SEED = 0
NUM_TIMESTEPS = 1000
# What the network of each path predicts.
PATHS = {"linear": "epsilon", "cosine": "v_prediction", "flow": "flow_prediction"}


@dataclass(frozen=True)
class DataSize:
    """What differs between data sets.

    Attributes:
        image_size: Side of the images in pixels.
        folded: Whether 2x2 pixels become channels of one place, for a network of a quarter of the
            time.
        paths: A denoiser for each path, and what its network predicts.
        num_validation: The last training images, which nothing is trained on: settings are chosen
            and calibrations fitted there.
        width: Channels of the U-Net.
        denoiser: Its training.
    """

    image_size: int
    folded: bool
    paths: dict[str, str]
    num_validation: int
    width: int
    denoiser: TrainingSettings


@dataclass(frozen=True)
class SampleSize:
    """The sizes of the comparison of samples.

    Attributes:
        evaluations: Network evaluations E of the tables.
        all_at: The E at which every method is drawn, and settings are chosen.
        num_sets: Sets of samples, each of a seed of its own.
        num_samples: Samples of a set.
        kept_others: How many methods of others are drawn at other E, the best on validation images.
        kept_ours: The same of our processes, each with every head.
        tuning_samples: Samples for each setting that is tried, of another seed.
        num_real: Validation images, and test images, that samples are compared with.
        classifier_steps: Optimiser steps of the classifier, of 64 images.
        num_features: Of the classifier.
        num_components: Directions of the ImageNet features that distances are taken in.
        batch_size: Samples drawn at a time.
        num_shown: Samples of a row of the pictures.
    """

    evaluations: tuple[int, ...]
    all_at: int
    num_sets: int
    num_samples: int
    kept_others: int
    kept_ours: int
    tuning_samples: int
    num_real: int
    classifier_steps: int
    num_features: int
    num_components: int
    batch_size: int
    num_shown: int


SAMPLES = SampleSize(
    evaluations=(5, 10, 20),
    all_at=10,
    num_sets=3,
    num_samples=200,
    kept_others=3,
    kept_ours=2,
    tuning_samples=120,
    num_real=2000,
    classifier_steps=600,
    num_features=64,
    num_components=64,
    batch_size=100,
    num_shown=16,
)
# Every line runs, and the figures mean nothing.
QUICK_SAMPLES = SampleSize(
    evaluations=(2, 3),
    all_at=3,
    num_sets=2,
    num_samples=6,
    kept_others=1,
    kept_ours=1,
    tuning_samples=6,
    num_real=12,
    classifier_steps=3,
    num_features=4,
    num_components=4,
    batch_size=4,
    num_shown=3,
)


@dataclass(frozen=True)
class Size:
    """Everything that differs between a full run and a smaller one.

    Attributes:
        name: What it is called.
        data: By data set.
    """

    name: str
    data: dict[str, DataSize]


REDUCED = Size(
    name="reduced",
    data={
        "digits": DataSize(
            image_size=8,
            folded=False,
            paths={"cosine": "epsilon"},
            num_validation=150,
            width=32,
            denoiser=TrainingSettings(900, checkpoint_every=100, seed=SEED),
        ),
        "fashion_mnist": DataSize(
            image_size=28,
            folded=True,
            paths=PATHS,
            num_validation=10_000,
            width=32,
            denoiser=TrainingSettings(
                3000, learning_rate=2e-3, warmup_steps=100, checkpoint_every=250, seed=SEED
            ),
        ),
        "cifar10": DataSize(
            image_size=16,
            folded=True,
            paths=PATHS,
            num_validation=5_000,
            width=48,
            denoiser=TrainingSettings(
                4000,
                learning_rate=2e-3,
                warmup_steps=100,
                checkpoint_every=250,
                horizontal_flip=True,
                seed=SEED,
            ),
        ),
    },
)
