"""Models on disk: a denoiser with what was learned and fitted about its covariance."""

from ocm.checkpoints.checkpoint import (
    LEARNED,
    Checkpoint,
    CheckpointError,
    load,
    load_backbone,
    load_denoiser,
    save,
    save_tables,
)

__all__ = [
    "LEARNED",
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_backbone",
    "load_denoiser",
    "save",
    "save_tables",
]
