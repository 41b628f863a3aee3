"""The diagonal of the covariance by probes, with nothing to train.

Near t = N the variance of a network that predicts the noise is a small difference, 1 + h, times a
large beta_bar / alpha_bar: the error of the network's Jacobian is amplified, and float32 has no
digits left once alpha_bar falls below 1e-6 or so. Samplers and the likelihood clip the variance to
what the data allow.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, diagonal
from ocm.diffusion import draws
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser, Prediction

# Share of estimates that are not positive from which on this is worth a warning.
_MANY = 0.1


@dataclass(frozen=True)
class Hutchinson(Covariance):
    """Var[x0 | x_t] from M probes v of the Jacobian: the mean of v * (C v), M products at every t.

    The probes of different timesteps are different ones of the same seed. The estimates are
    unbiased without a floor, but many of them may be negative: with few probes, and where the
    network's Jacobian errs, with any number. A variance of zero in their place is a certainty that
    no estimate can have, and costs the likelihood most. The floor of ``floored`` gives up that
    the estimates are unbiased, and changes nothing where all of them are positive.

    Attributes:
        denoiser: Whose output is differentiated.
        num_probes: The number M of probes, and products, at every t.
        seed: Seed of the probes.
        probes: The design; ``hessdiag.Coloring(M)`` colors images by a lattice. The number of
            probes is a multiple of its block.
        floor: "error" for that of ``floored``, or None for the unbiased estimates.

    Warns:
        UserWarning: Once, with a floor, where more than a tenth of the estimates are not positive
            at a timestep with more signal than noise, where a good network's are not. On a GPU
            only the first such timestep is looked at, so that sampling does not wait at each.

    Raises:
        TypeError: If ``num_probes`` is not an int.
        ValueError: If it is below 1, or there is no such floor; by ``at``, if it is no
            multiple of the design's block, or as :class:`ocm.Exact`.

    Example:
        >>> import torch, ocm, hessdiag
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> covariance = ocm.Hutchinson(denoiser, 8, probes=hessdiag.Coloring(8))
        >>> variance = covariance.at(denoiser.predict(torch.ones(2, 1, 4, 4), 500)).diagonal()
        >>> variance.shape, bool((variance - 0.5).abs().max() < 1e-6)
        (torch.Size([2, 1, 4, 4]), True)
    """

    denoiser: Denoiser
    num_probes: int
    seed: int = 0
    probes: hessdiag.ProbeDesign = hessdiag.Rademacher()  # noqa: RUF009, frozen
    floor: Literal["error"] | None = "error"
    # Holds an entry once nothing more is to be looked at.
    _looked: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive_int("num_probes", self.num_probes)
        if self.floor not in ("error", None):
            raise ValueError(f"floor must be 'error' or None, got {self.floor!r}")

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
        variance = c + k * estimated
        if self.floor is not None:
            self._look_at(variance, prediction)
            variance = floored(variance)
        return diagonal(variance, prediction.x_t.shape)

    def _look_at(self, variance: Tensor, prediction: Prediction) -> None:
        if self._looked:
            return
        # With more noise the error of any network's Jacobian exceeds the smaller variances.
        if prediction.denoiser.schedule.log_snr(prediction.timestep) < 0:
            return
        share = (variance <= 0.0).float().mean().item()
        if share > _MANY or variance.is_cuda:
            self._looked.append(True)
        if share > _MANY:
            is_colored = isinstance(self.probes, hessdiag.Coloring)
            other = "" if is_colored else "or a coloring, probes=hessdiag.Coloring(48), "
            warnings.warn(
                f"{share:.0%} of the variances that num_probes = {self.num_probes} estimate at "
                f"t = {prediction.timestep} are not positive, and were raised to the floor. More "
                f"probes {other}estimate them better; where the network itself errs, "
                "ocm.calibrate fits them to data",
                UserWarning,
                stacklevel=_caller(),
            )


def floored(variance: Tensor) -> Tensor:
    """Return max(V_i, m), m the mean of -V_j over the negative estimates of a sample; 0 without.

    No variance is negative, so that a negative estimate errs by its size at least: m is the least
    mean absolute error of those that are certainly wrong, whether by the probes or by the network.
    No other estimate is taken for more certain than that.

    Args:
        variance: Estimates, shape (B, ...).

    Example:
        >>> import torch
        >>> floored(torch.tensor([[-3.0, -1.0, 1.0, 6.0], [0.0, 1.0, 1.0, 1.0]]))
        tensor([[2., 2., 2., 6.],
                [0., 1., 1., 1.]])
    """
    negative = variance.clamp(max=0.0).flatten(1)
    error = -negative.sum(dim=1) / (negative < 0.0).sum(dim=1).clamp(min=1)
    return variance.maximum(error.reshape(-1, *[1] * (variance.dim() - 1)))


def _caller() -> int:
    """Return the stack level of the first caller outside of ocm and torch, for a warning."""
    level, frame, inner = 2, sys._getframe(2), ("ocm.", "torch.")
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(inner):
        level, frame = level + 1, frame.f_back
    return level
