"""Diagonals of Jacobians and Hessians of PyTorch functions, without the matrix.

    diagonal = hessdiag.hutchinson(score_fn, x, M)    # unbiased, M products
    diagonal = hessdiag.exact(score_fn, x)            # D products

Kernels and the random-number contract are in :mod:`hessdiag.kernels`.
"""

from hessdiag.diagonal import exact, hutchinson

__all__ = ["exact", "hutchinson"]
__version__ = "0.1.0"
