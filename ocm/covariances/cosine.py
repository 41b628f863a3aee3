"""The covariance that is diagonal in the frequencies of the cosine transform.

After covariance-aware sampling (arXiv 2605.13910): natural images are nearly stationary, so their
covariance is nearly diagonal in frequency, and unlike a diagonal over pixels it correlates them.
"""

from __future__ import annotations

from dataclasses import dataclass

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, cosine_diagonal
from ocm.diffusion import draws
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class CosineDiagonal(Covariance):
    """The diagonal of F Cov[x0 | x_t] F^T, F the cosine transform of the last two axes.

    After arXiv 2605.13910.

    Attributes:
        denoiser: Whose output is differentiated.
        num_probes: M; one block of the design if that is larger.
        seed: Seed of the probes.
        probes: Their design, in the frequencies; ``hessdiag.UnitVectors()`` is exact, by D of them.

    Raises:
        TypeError: If ``num_probes`` is not an int.
        ValueError: If it is below 1; by ``at``, if x_t has no two axes of positions.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(2, 1, 4, 4), 500)
        >>> C = ocm.CosineDiagonal(denoiser, num_probes=4).at(prediction)
        >>> C.eigenvalues.shape, C.noise(torch.ones(2, 1, 4, 4)).shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2, 1, 4, 4]))
    """

    denoiser: Denoiser
    num_probes: int = 1
    seed: int = 0
    probes: hessdiag.ProbeDesign = hessdiag.Rademacher()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        check_positive_int("num_probes", self.num_probes)

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the estimate, by M products.

        Raises:
            ValueError: If x_t has no two axes of positions.
        """
        prediction = prediction.by(self.denoiser)
        x_t = prediction.x_t
        if x_t.dim() < 3:
            raise ValueError(f"x_t must have two axes of positions, got shape {tuple(x_t.shape)}")
        num_probes = max(self.num_probes, self.probes.block_size(tuple(x_t.shape[1:])))
        c, k, J = prediction.covariance_terms
        estimated = hessdiag.estimate(
            J.in_basis(hessdiag.dct()),
            max_probes=num_probes,
            probes=self.probes,
            seed=self.seed,
            sample_offset=prediction.sample_offset,
            probe_offset=draws.of_level(prediction.timestep) * num_probes,
        ).diagonal
        return cosine_diagonal(c + k * estimated, x_t.shape)
