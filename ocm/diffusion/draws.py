"""Whose random numbers are whose: the steps of the normal stream, in one ledger.

By the random-number contract (:mod:`hessdiag.kernels`) a normal number is a pure function of seed,
stream, sample, step and feature. All normal noise of ocm is of stream 2; who draws takes a step of
its own, so that numbers of one seed that should be independent are different ones. Probes are
numbered apart: those of timestep t start at ``probe_offset = of_level(t) * M``.

=====================  =====================================================================
0                      x_N, from which sampling starts
of_level(t)            the noise of a sampler's step from t; of x_t in scores, at t
X0 + of_level(t)       of x0 given x_t, where a sampler draws it
MEASUREMENT + the same of a measurement, beside it
DECODED + k            the k-th draw of x0 that a decoder of latents shows
FITTING + of_level(t)  of x_t, on which analytic variances and calibrations are fitted
DEQUANTISATION + k     the k-th draw within the bins of images
CHAINS                 which chain of few steps a training sample is of
CLASSES                which training samples are shown without their class
MIXTURE                points of a mixture of Gaussians
ENCODER                latents, around the means of an autoencoder
TRAINING               the noise of training
=====================  =====================================================================
"""

from __future__ import annotations

START = 0
_FRACTIONS = 1024
X0 = 2**29
MEASUREMENT = 2**30
DECODED = 2**30 + 2**29
FITTING = 2**31
DEQUANTISATION = 2**31 + 2**30
CHAINS = 2**32 - 5
CLASSES = 2**32 - 4
ENCODER = 2**32 - 3
MIXTURE = 2**32 - 2
TRAINING = 2**32 - 1


def of_level(t: float) -> int:
    """Return the number of timestep t: t itself where it is whole.

    Others are told apart by 1/1024 and follow all whole ones below 2^20.

    Example:
        >>> of_level(1000), of_level(1000.0), of_level(0.5)
        (1000, 1000, 1049088)
    """
    return int(t) if t == int(t) else 2**20 + int(t * _FRACTIONS)
