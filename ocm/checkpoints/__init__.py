"""Models on disk: a denoiser with what was learned and fitted about its covariance."""

from ocm.checkpoints.checkpoint import (
    Checkpoint,
    is_pipeline,
    load,
    load_backbone,
    load_denoiser,
    pipeline_parts,
    save,
    save_tables,
)
from ocm.checkpoints.weights import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "is_pipeline",
    "load",
    "load_backbone",
    "load_denoiser",
    "pipeline_parts",
    "save",
    "save_tables",
]
