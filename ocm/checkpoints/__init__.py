"""Models on disk: a denoiser with what was learned and fitted about its covariance."""

from ocm.checkpoints.checkpoint import (
    Checkpoint,
    load,
    load_backbone,
    load_denoiser,
    save,
    save_tables,
)
from ocm.checkpoints.weights import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_backbone",
    "load_denoiser",
    "save",
    "save_tables",
]
