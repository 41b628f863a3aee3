"""Triton kernels, each with a plain PyTorch reference beside it, and the random-number contract.

CPU tensors take the reference, CUDA tensors the Triton kernel; the numbers are the same.
"""

from hessdiag.kernels.gaussian_step import StepCoefficients, gaussian_step
from hessdiag.kernels.normal import normal
from hessdiag.kernels.rademacher import rademacher

__all__ = ["StepCoefficients", "gaussian_step", "normal", "rademacher"]
