"""Independent pixels, each with a covariance over its channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import hessdiag
from ocm.covariances.hutchinson import timestep
from ocm.covariances.operators import SpectralCovariance, channel_blocks
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class ChannelBlocks:
    """The C x C block of Cov[x0 | x_t] of every pixel, exact or from probes.

    Attributes:
        denoiser: Whose output is differentiated, on samples (C, ...).
        num_probes: Most products, a multiple of C (:func:`hessdiag.block_diagonal`); None for the
            exact blocks.
        seed: Seed of the probes.
    """

    denoiser: Denoiser
    num_probes: int | None = None
    seed: int = 0

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the blocks; they cost D + 1 passes, or ``num_probes`` + 1."""
        denoiser = self.denoiser.conditioned_as(prediction)
        x_t, t = prediction.x_t, timestep(prediction)
        c, k = denoiser.covariance_coefficients(t, x_t)
        J = hessdiag.block_diagonal(
            denoiser.output_at(t),
            x_t,
            max_probes=self.num_probes,
            seed=(self.seed + t) % 2**64,  # other probes at each timestep
            sample_offset=prediction.sample_offset,
        ).blocks.to(x_t)
        identity = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
        return channel_blocks(c.flatten() * identity + k.flatten() * J, x_t.shape)
