"""Models on disk: a denoiser with what was learned and fitted about its covariance."""

from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.entries import CheckpointError
from ocm.checkpoints.reading import (
    is_pipeline,
    load,
    load_backbone,
    load_denoiser,
    pipeline_parts,
)
from ocm.checkpoints.writing import save, save_tables

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
