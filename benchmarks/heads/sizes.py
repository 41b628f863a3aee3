"""The sizes of the comparison of heads: its data sets, paths and trainings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ocm.training.settings import TrainingSettings

SEED = 0
NUM_TIMESTEPS = 1000
# What the network of each path predicts.
PATHS = {"linear": "epsilon", "cosine": "v_prediction", "flow": "flow_prediction"}


@dataclass(frozen=True)
class Head:
    """A head that is compared.

    Attributes:
        name: A learned covariance of :data:`ocm.covariances.names.NAMES`.
        papers: Whether its output is in the papers' units, and not in the default ones.
    """

    name: str
    papers: bool = False

    @property
    def key(self) -> str:
        """What it is called in a record."""
        return self.name + "_papers" * self.papers


HEADS = (
    *(Head(name) for name in ("iddpm", "npr", "sn", "ocm", "ml")),
    *(Head(name, papers=True) for name in ("npr", "ocm")),
)


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
        head_steps: Steps of every head.
        num_scored: Test images whose likelihood is bounded.
        papers_seeds: Seeds of the heads in the papers' units.
    """

    image_size: int
    folded: bool
    paths: dict[str, str]
    num_validation: int
    width: int
    denoiser: TrainingSettings
    head_steps: int
    num_scored: int = 128
    papers_seeds: tuple[int, ...] = (0,)


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
    num_samples=400,
    kept_others=3,
    kept_ours=2,
    tuning_samples=200,
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
        head: The training of every head; steps and seeds differ.
        head_kind: "simple" or "residual".
        seeds: Of the heads: weights, noise and order of the images.
        frequency_seeds: Those of the head in frequencies.
        first_seed_alone: Paths with heads of the first seed alone.
        frequencies_of: Paths of the head in frequencies, by data set.
        sampled: Data sets whose samples are compared.
        step_counts: Numbers of steps K of the likelihood.
        num_calibration: Validation images that calibrations are fitted to.
        calibration_levels: Timesteps where they are fitted.
        samples: Sizes of the comparison of samples.
        side_by_side: Whether two denoisers have a process each, of one thread.
    """

    name: str
    data: dict[str, DataSize]
    head: TrainingSettings
    head_kind: str
    seeds: tuple[int, ...]
    frequency_seeds: tuple[int, ...]
    first_seed_alone: tuple[str, ...]
    frequencies_of: dict[str, tuple[str, ...]]
    sampled: tuple[str, ...]
    step_counts: tuple[int, ...]
    num_calibration: int
    calibration_levels: tuple[int, ...]
    samples: SampleSize
    side_by_side: bool = True


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
            head_steps=1000,
            papers_seeds=(0, 1, 2),
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
            head_steps=400,
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
            head_steps=400,
        ),
    },
    head=TrainingSettings(
        400, learning_rate=3e-3, ema_decay=0.98, max_gradient_norm=1e9, checkpoint_every=100
    ),
    head_kind="residual",
    seeds=(0, 1, 2),
    frequency_seeds=(0,),
    first_seed_alone=("linear",),
    frequencies_of={
        "digits": ("cosine",),
        "fashion_mnist": ("linear", "cosine", "flow"),
        "cifar10": ("linear", "cosine", "flow"),
    },
    sampled=("digits", "fashion_mnist", "cifar10"),
    step_counts=(5, 8, 10, 15, 25, 50, 100),
    num_calibration=150,
    calibration_levels=(
        *(1, 11, 21, 42, 80, 125, 200, 250, 334, 445),
        *(500, 600, 700, 750, 850, 900, 950, 1000),
    ),
    samples=SAMPLES,
)
# Every line runs, and the figures mean nothing.
QUICK = replace(
    REDUCED,
    name="quick",
    data={
        name: replace(
            data,
            paths=dict(list(data.paths.items())[-1:]),
            num_validation=16,
            width=8,
            denoiser=replace(data.denoiser, num_steps=3, batch_size=8, warmup_steps=1),
            head_steps=2,
            num_scored=4,
        )
        for name, data in REDUCED.data.items()
    },
    head=replace(REDUCED.head, batch_size=8, warmup_steps=1),
    seeds=(0, 1),
    frequency_seeds=(0,),
    first_seed_alone=(),
    frequencies_of={"digits": ("cosine",)},
    sampled=("digits",),
    step_counts=(3, 5),
    num_calibration=8,
    calibration_levels=(1, 500, 1000),
    samples=QUICK_SAMPLES,
    side_by_side=False,
)
