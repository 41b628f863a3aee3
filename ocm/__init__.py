"""Diffusion models with the optimal covariance (Optimal Covariance Matching, ICLR 2025).

A covariance states Var[x0 | x_t]; samplers and the likelihood derive the variance of every
reverse step from it:

    covariance = ocm.Hutchinson(denoiser, num_probes=8)     # nothing to train
    images = ocm.sample(denoiser, covariance, (16, 1, 8, 8), ocm.even_timesteps(1000, 10))
"""

from ocm.covariances import (
    Beta,
    BetaTilde,
    Covariance,
    Exact,
    Hutchinson,
    OptimalCovarianceMatching,
)
from ocm.denoiser import Denoiser, Prediction
from ocm.heads import CovarianceHead
from ocm.likelihood import BitsPerDim, bits_per_dim, quantise
from ocm.losses import denoising_loss, ocm_loss
from ocm.samplers import ddim, ddpm, sample
from ocm.schedules import Schedule, cosine, even_timesteps, from_betas, linear
from ocm.training import TrainingSettings, train_denoiser, train_head

__all__ = [
    "Beta",
    "BetaTilde",
    "BitsPerDim",
    "Covariance",
    "CovarianceHead",
    "Denoiser",
    "Exact",
    "Hutchinson",
    "OptimalCovarianceMatching",
    "Prediction",
    "Schedule",
    "TrainingSettings",
    "bits_per_dim",
    "cosine",
    "ddim",
    "ddpm",
    "denoising_loss",
    "even_timesteps",
    "from_betas",
    "linear",
    "ocm_loss",
    "quantise",
    "sample",
    "train_denoiser",
    "train_head",
]
