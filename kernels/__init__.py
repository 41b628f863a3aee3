"""Triton kernels, each with a plain PyTorch reference beside it, and the random-number contract.

CPU tensors take the reference, CUDA tensors the Triton kernel; the numbers are the same.
"""

from hessdiag.kernels.attention_jvp import attention_jvp
from hessdiag.kernels.gaussian_step import StepCoefficients, gaussian_step
from hessdiag.kernels.normal import normal, normal_probes
from hessdiag.kernels.ocm_loss import ocm_loss
from hessdiag.kernels.philox import seed_tensor
from hessdiag.kernels.probe_moments import Moments, probe_moments
from hessdiag.kernels.rademacher import rademacher

__all__ = [
    "Moments",
    "StepCoefficients",
    "attention_jvp",
    "gaussian_step",
    "normal",
    "normal_probes",
    "ocm_loss",
    "probe_moments",
    "rademacher",
    "seed_tensor",
]
