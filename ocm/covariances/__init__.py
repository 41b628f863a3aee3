"""Covariances of x0 given x_t: each states Cov[x0 | x_t], and samplers derive their steps from it.

=================================  ==============================================  ===============
covariance                         states                                          products a step
=================================  ==============================================  ===============
:class:`Beta`, :class:`BetaTilde`  the two variances of DDPM                       0
:class:`Analytic`                  one number for each timestep                    0
:class:`ImprovedDDPM`              a head, trained by the variational bound        0
:class:`VarianceChannels`          what a backbone learned beside its prediction   0
:class:`NPR`, :class:`SN`          heads that regress errors and noise             0
:class:`OptimalCovarianceMatching` a head that regresses the Hessian's diagonal    0
:class:`MaximumLikelihood`         a head, trained by the bound of few-step chains 0
:class:`FrequencyLikelihood`       the same, diagonal in cosines of colours        0
:class:`Hutchinson`                the diagonal from M probes of any design        M
:class:`Exact`                     the diagonal                                    D
:class:`ChannelBlocks`             a matrix over channels for each pixel           D, or fewer
:class:`CosineDiagonal`            diagonal in frequency                           M
:class:`Lanczos`                   the full covariance's noise from k products     k
:class:`Full`                      the full covariance                             D
:class:`Calibrated`                any of these, rescaled and shifted on data      as that one
=================================  ==============================================  ===============

A step evaluates the network once for the prediction. A product costs a backward pass through that
evaluation, or in forward mode an evaluation more. The variance of the reverse step from t to s,
with DDPM's coefficients, is::

    sigma^2 = beta_tilde(s, t) + (alpha_bar_s beta(s, t)^2 / beta_bar_t^2) Var[x0 | x_t].

A new covariance is a small frozen dataclass with the method ``at``, in a file of its own; one that
learns has a ``loss`` too, and stands in ``learned``. Its name stands in ``names.py``; it is shown
here and in :mod:`ocm`.
"""

from ocm.covariances.analytic import Analytic, fit_analytic, fit_analytic_from_data
from ocm.covariances.base import Covariance
from ocm.covariances.calibrated import Calibrated, calibrate
from ocm.covariances.channels import ChannelBlocks
from ocm.covariances.cosine import CosineDiagonal
from ocm.covariances.exact import Exact, Full
from ocm.covariances.fixed import Beta, BetaTilde
from ocm.covariances.hutchinson import Hutchinson
from ocm.covariances.lanczos import Lanczos, LanczosCovariance
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.frequencies import FrequencyLikelihood
from ocm.covariances.learned.improved_ddpm import ImprovedDDPM, VarianceChannels
from ocm.covariances.learned.maximum_likelihood import MaximumLikelihood
from ocm.covariances.learned.npr import NPR
from ocm.covariances.learned.optimal import OptimalCovarianceMatching
from ocm.covariances.learned.sn import SN

__all__ = [
    "NPR",
    "SN",
    "Analytic",
    "Beta",
    "BetaTilde",
    "Calibrated",
    "ChannelBlocks",
    "CosineDiagonal",
    "Covariance",
    "Exact",
    "FrequencyLikelihood",
    "Full",
    "Hutchinson",
    "ImprovedDDPM",
    "Lanczos",
    "LanczosCovariance",
    "LearnedCovariance",
    "MaximumLikelihood",
    "OptimalCovarianceMatching",
    "VarianceChannels",
    "calibrate",
    "fit_analytic",
    "fit_analytic_from_data",
]
