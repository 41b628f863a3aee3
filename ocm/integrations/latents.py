"""Images as the latents of an ``AutoencoderKL``, and back.

A latent diffusion model is trained on z = (encode(x) - shift) scaling, with the autoencoder's
``scaling_factor`` and ``shift_factor`` (0 where it has none), so that z has a variance near 1.
Everything of this package then works on z as on images, with ``x0_range=None`` (``clip_sample``
off in a scheduler), since latents have no bounds:

    vae = ocm.integrations.latents.load_autoencoder("path/to/vae")
    z = ocm.integrations.latents.encode(vae, images)
    z = ocm.sample(denoiser, covariance, z.shape, steps=10, x0_range=None)
    images = ocm.integrations.latents.decode(vae, z)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels import normal
from ocm.checkpoints.weights import load_model
from ocm.diffusion import draws
from ocm.diffusion.checks import check_positive_int
from ocm.images import ArrowImages


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Return the ``AutoencoderKL`` of a folder, frozen, in eval mode and on ``device``.

    Nothing is downloaded.

    Raises:
        CheckpointError: A ValueError, if the folder holds none, or lacks weights of it.
    """
    from diffusers import AutoencoderKL

    vae = load_model(AutoencoderKL, path)
    return vae.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode(
    vae: Any,
    images: Tensor | ArrowImages,
    *,
    seed: int = 0,
    sample_offset: int = 0,
    mean: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """Return the scaled latents of images.

    Args:
        vae: An ``AutoencoderKL``.
        images: Shape (n, C, H, W), in [-1, 1]; those on the disk are read a batch at a time.
        seed: Seed of the encoder's noise, which follows the random-number contract: the latents
            of an image do not depend on the batch.
        sample_offset: Number of the first image.
        mean: Whether the latents are the encoder's means rather than draws around them.
        batch_size: Images at once.

    Returns:
        Shape (n, latent channels, H / f, W / f), on the device of ``images``.

    Raises:
        TypeError: If ``batch_size`` is no int.
        ValueError: If it is not positive, or the autoencoder normalises its latents by tables.
    """
    check_positive_int("batch_size", batch_size)
    scale, shift = _factors(vae)
    latents = []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        posterior = vae.encode(batch.to(device=vae.device, dtype=vae.dtype)).latent_dist
        z = posterior.mean
        if not mean:
            offset = sample_offset + first
            noise = normal(z.shape, seed, step=draws.ENCODER, sample_offset=offset, device=z.device)
            z = z + posterior.std * noise.to(z)
        # A convolution may leave them channels last.
        latents.append(((z - shift) * scale).to(batch.device).contiguous())
    return torch.cat(latents)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return the images of scaled latents, which lie near [-1, 1] and are not clipped.

    Args:
        vae: An ``AutoencoderKL``.
        latents: As :func:`encode` returns them.
        batch_size: Latents at once.

    Raises:
        TypeError: As :func:`encode`.
        ValueError: As :func:`encode`.
    """
    check_positive_int("batch_size", batch_size)
    scale, shift = _factors(vae)
    batches = (z.to(device=vae.device, dtype=vae.dtype) for z in latents.split(batch_size))
    images = [vae.decode(z / scale + shift).sample.to(latents.device) for z in batches]
    return torch.cat(images).contiguous()


def _factors(vae: Any) -> tuple[float, float]:
    """Return scaling and shift."""
    config = vae.config
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            "vae must scale its latents by scaling_factor and shift_factor alone, and its "
            "configuration has latents_mean and latents_std: normalise the latents yourself"
        )
    return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
