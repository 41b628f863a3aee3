"""The diagonal of the covariance by probes, with nothing to train.

Near t = N the variance of a network that predicts the noise is a small difference, 1 + h, times a
large beta_bar / alpha_bar: the error of the network's Jacobian is amplified, and float32 has no
digits left once alpha_bar falls below 1e-6 or so. Samplers and the likelihood clip the variance to
what the data allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, diagonal
from ocm.diffusion import draws
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class Hutchinson(Covariance):
    """Var[x0 | x_t] from M probes of the Jacobian: unbiased, may be negative.

    The probes of different timesteps are different ones of the same seed.

    Attributes:
        denoiser: Whose output is differentiated.
        num_probes: M.
        seed: Seed of the probes.
        probes: The design; ``hessdiag.Coloring(M)`` colors images by a lattice. The number of
            probes is a multiple of its block.

    Raises:
        TypeError: If ``num_probes`` is not an int.
        ValueError: If it is below 1.
    """

    denoiser: Denoiser
    num_probes: int
    seed: int = 0
    probes: hessdiag.ProbeDesign = hessdiag.Rademacher()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        check_positive_int("num_probes", self.num_probes)

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the estimate, by M products."""
        prediction = prediction.by(self.denoiser)
        c, k, J = prediction.covariance_terms
        estimated = hessdiag.estimate(
            J,
            max_probes=self.num_probes,
            probes=self.probes,
            seed=self.seed,
            sample_offset=prediction.sample_offset,
            probe_offset=draws.of_level(prediction.timestep) * self.num_probes,
        ).diagonal
        return diagonal(c + k * estimated.to(prediction.x_t), prediction.x_t.shape)
