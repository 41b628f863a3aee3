"""Independent pixels, each with a covariance over its channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hessdiag
from ocm.covariances.base import Covariance
from ocm.covariances.operators import SpectralCovariance, channel_blocks
from ocm.diffusion import draws
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class ChannelBlocks(Covariance):
    """The C x C block of Cov[x0 | x_t] of every pixel, exact or from probes.

    The probes of different timesteps are different ones of the same seed.

    Attributes:
        denoiser: Whose output is differentiated, on samples (C, ...).
        max_probes: Most products, for ``hessdiag.Rademacher()``: whole multiples of C are taken.
        seed: Seed of the probes.
        probes: ``hessdiag.UnitVectors()`` for the exact blocks, or ``hessdiag.Rademacher()``.

    Raises:
        TypeError: By ``at``, if the probes are neither, or signs come without ``max_probes``.
        ValueError: By ``at``, if ``max_probes`` is given for the exact blocks, or is below C.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(2, 3, 2, 2), 500)
        >>> C = ocm.ChannelBlocks(denoiser).at(prediction)
        >>> C.diagonal().shape, C.noise(torch.ones(2, 3, 2, 2)).shape
        (torch.Size([2, 3, 2, 2]), torch.Size([2, 3, 2, 2]))
    """

    denoiser: Denoiser
    max_probes: int | None = None
    seed: int = 0
    probes: hessdiag.Rademacher | hessdiag.UnitVectors = hessdiag.UnitVectors()  # noqa: RUF009

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the blocks, by D products, or ``max_probes``."""
        prediction = prediction.by(self.denoiser)
        x_t = prediction.x_t
        vectors = (self.max_probes or 0) // x_t.shape[1]
        c, k, J = prediction.covariance_terms
        blocks = hessdiag.block_diagonal(
            J,
            probes=self.probes,
            max_probes=self.max_probes,
            seed=self.seed,
            sample_offset=prediction.sample_offset,
            probe_offset=draws.of_level(prediction.timestep) * vectors,
        ).blocks
        identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        return channel_blocks(c.flatten() * identity + k.flatten() * blocks, x_t.shape)
