"""Diagonals of Jacobians and Hessians of PyTorch functions, without the matrix.

In short::

    diagonal = hessdiag.hutchinson(score_fn, x, M)              # unbiased, M products
    result = hessdiag.estimate(score_fn, x, max_probes=M)       # with standard errors
    diagonal = hessdiag.exact(score_fn, x)                      # D products
    J = hessdiag.Jacobian(score_fn, x, mode="jvp")              # the operator behind them all

Kernels and the random-number contract are in :mod:`hessdiag.kernels`.
"""

import torch

from hessdiag.bases import Basis, dct
from hessdiag.blocks import BlockDiagonalEstimate, block_diagonal
from hessdiag.compat import NotDifferentiableError
from hessdiag.estimate import DiagonalEstimate, estimate, hutchinson
from hessdiag.fixed import FixedProbes, fixed_probes
from hessdiag.gauss_newton import gauss_newton_diagonal
from hessdiag.hessians import hessian_diagonal
from hessdiag.inner_gradients import ConstantGradientError
from hessdiag.jacobian import Jacobian
from hessdiag.lanczos import lanczos
from hessdiag.matrices import exact, jacobian
from hessdiag.over_data import empirical_fisher_over_data, gauss_newton_over_data
from hessdiag.parameters import ParameterDiagonal, parameter_hessian_diagonal
from hessdiag.probes import (
    BalancedColoring,
    Coloring,
    Normal,
    ProbeDesign,
    Rademacher,
    UnitVectors,
)
from hessdiag.traces import TraceEstimate, trace
from hessdiag.trees import ravel
from hessdiag.xdiag import xdiag

__all__ = [
    "BalancedColoring",
    "Basis",
    "BlockDiagonalEstimate",
    "Coloring",
    "ConstantGradientError",
    "DiagonalEstimate",
    "FixedProbes",
    "Jacobian",
    "Normal",
    "NotDifferentiableError",
    "ParameterDiagonal",
    "ProbeDesign",
    "Rademacher",
    "TraceEstimate",
    "UnitVectors",
    "block_diagonal",
    "dct",
    "empirical_fisher_over_data",
    "estimate",
    "exact",
    "fixed_probes",
    "gauss_newton_diagonal",
    "gauss_newton_over_data",
    "hessian_diagonal",
    "hutchinson",
    "jacobian",
    "lanczos",
    "parameter_hessian_diagonal",
    "ravel",
    "trace",
    "xdiag",
]
__version__ = "0.2.0"

# So that torch.load reads saved results with weights_only=True, its default.
torch.serialization.add_safe_globals(
    [BlockDiagonalEstimate, DiagonalEstimate, ParameterDiagonal, TraceEstimate]
)
