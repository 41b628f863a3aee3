"""Diffusion models with the optimal covariance (Optimal Covariance Matching, ICLR 2025).

A covariance states Cov[x0 | x_t]; samplers and the likelihood derive every reverse step from it::

    coloring = hessdiag.Coloring(12)
    covariance = ocm.Hutchinson(denoiser, num_probes=12, probes=coloring)    # nothing to train
    images = ocm.sample(denoiser, covariance, (16, 1, 8, 8), steps=10)
"""

import importlib
from typing import TYPE_CHECKING, Any

from ocm.covariances import (
    NPR,
    SN,
    Analytic,
    Beta,
    BetaTilde,
    Calibrated,
    ChannelBlocks,
    CosineDiagonal,
    Covariance,
    Exact,
    FrequencyLikelihood,
    Full,
    Hutchinson,
    ImprovedDDPM,
    Lanczos,
    LearnedCovariance,
    MaximumLikelihood,
    OptimalCovarianceMatching,
    VarianceChannels,
    calibrate,
    fit_analytic,
    fit_analytic_from_data,
)
from ocm.covariances.learned.frequencies import FrequencyHead
from ocm.covariances.learned.heads import CovarianceHead, ResidualHead, TokenHead, make_head
from ocm.covariances.learned.parameterisation import BOUNDED, PAPER, Parameterisation
from ocm.covariances.operators import PosteriorCovariance, SpectralCovariance
from ocm.diffusion.backbones.architecture import Architecture
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of
from ocm.diffusion.schedules import Schedule, cosine, edm, flow, from_betas, linear, trigflow, vp
from ocm.diffusion.timesteps import (
    dynamic_shift,
    even_timesteps,
    leading_timesteps,
    optimal_timesteps,
    quadratic_timesteps,
    shifted,
    timesteps_at,
    trailing_timesteps,
)
from ocm.integrations.k_diffusion import KDiffusionDenoiser
from ocm.integrations.uncertainty import UncertaintyMap, uncertainty
from ocm.likelihoods.budget import likelihood_settings
from ocm.likelihoods.log_likelihood import log_likelihood
from ocm.likelihoods.settings import LikelihoodSettings, LogLikelihood
from ocm.sampling.any_sigma import x0_given
from ocm.sampling.inverse import posterior_mean_given_measurement, sample_given_measurement
from ocm.sampling.likelihood import BitsPerDim, bits_per_dim, quantise
from ocm.sampling.samplers import capture, ddim, ddpm, renoised, sample
from ocm.sampling.transitions import (
    Trajectory,
    Transition,
    sample_trajectory,
    trajectory_log_prob,
    transition,
)
from ocm.training.objectives import denoising_loss, train_denoiser, train_head
from ocm.training.settings import TrainingSettings

if TYPE_CHECKING:
    from ocm.integrations.attached import CovarianceModel, attach
    from ocm.integrations.flow_scheduler import OCMFlowScheduler
    from ocm.integrations.pipelines import OCMDiTPipeline
    from ocm.integrations.scheduler import OCMDDIMScheduler, OCMScheduler
    from ocm.sampling.extrapolation import SecondOrder

__all__ = [
    "BOUNDED",
    "NPR",
    "PAPER",
    "SN",
    "Analytic",
    "Architecture",
    "Beta",
    "BetaTilde",
    "BitsPerDim",
    "Calibrated",
    "ChannelBlocks",
    "CosineDiagonal",
    "Covariance",
    "CovarianceHead",
    "CovarianceModel",
    "Denoiser",
    "Exact",
    "FrequencyHead",
    "FrequencyLikelihood",
    "Full",
    "Hutchinson",
    "ImprovedDDPM",
    "KDiffusionDenoiser",
    "Lanczos",
    "LearnedCovariance",
    "LikelihoodSettings",
    "LogLikelihood",
    "MaximumLikelihood",
    "OCMDDIMScheduler",
    "OCMDiTPipeline",
    "OCMFlowScheduler",
    "OCMScheduler",
    "OptimalCovarianceMatching",
    "Parameterisation",
    "PosteriorCovariance",
    "Prediction",
    "ResidualHead",
    "Schedule",
    "SecondOrder",
    "SpectralCovariance",
    "TokenHead",
    "TrainingSettings",
    "Trajectory",
    "Transition",
    "UncertaintyMap",
    "VarianceChannels",
    "attach",
    "bits_per_dim",
    "calibrate",
    "capture",
    "cosine",
    "ddim",
    "ddpm",
    "denoising_loss",
    "dynamic_shift",
    "edm",
    "even_timesteps",
    "fit_analytic",
    "fit_analytic_from_data",
    "flow",
    "from_betas",
    "from_scheduler",
    "leading_timesteps",
    "likelihood_settings",
    "linear",
    "log_likelihood",
    "make_head",
    "optimal_timesteps",
    "posterior_mean_given_measurement",
    "prediction_type_of",
    "quadratic_timesteps",
    "quantise",
    "renoised",
    "sample",
    "sample_given_measurement",
    "sample_trajectory",
    "shifted",
    "timesteps_at",
    "trailing_timesteps",
    "train_denoiser",
    "train_head",
    "trajectory_log_prob",
    "transition",
    "trigflow",
    "uncertainty",
    "vp",
    "x0_given",
]

# Imported when asked for: most are classes of diffusers, which `import ocm` does not import. The
# mixins are what a pipeline asks the module of a saved component for: how its class is loaded.
_LAZY = {
    "CovarianceModel": "ocm.integrations.attached",
    "ModelMixin": "diffusers.models.modeling_utils",
    "OCMDDIMScheduler": "ocm.integrations.scheduler",
    "OCMFlowScheduler": "ocm.integrations.flow_scheduler",
    "OCMDiTPipeline": "ocm.integrations.pipelines",
    "OCMScheduler": "ocm.integrations.scheduler",
    "SecondOrder": "ocm.sampling.extrapolation",
    "SchedulerMixin": "diffusers.schedulers.scheduling_utils",
    "attach": "ocm.integrations.attached",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ocm' has no attribute {name!r}")
