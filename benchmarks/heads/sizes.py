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
