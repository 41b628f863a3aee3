"""Images or videos as the latents of an autoencoder, and back.

A latent diffusion model is trained on z = (encode(x) - mean) scaling / std, so that z has a
variance near 1, by the autoencoder's configuration: its ``scaling_factor``, and for mean and std of
each channel ``latents_mean`` and ``latents_std``, or ``shift_factor`` and 1. These are the formulas
of diffusers' pipelines of Stable Diffusion, Flux, Wan, Qwen-Image, LTX and Mochi. Everything of
this package then works on z as on images, with ``x0_range=None`` (``clip_sample`` off in a
scheduler), since latents have no bounds::

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
        vae: An ``AutoencoderKL``, or one of videos, ``AutoencoderKLWan`` say.
        images: Shape (n, C, H, W), in [-1, 1]; those on the disk are read a batch at a time. Videos
            are of shape (n, C, F, H, W).
        seed: Seed of the encoder's noise, which follows the random-number contract: the latents
            of an image do not depend on the batch.
        sample_offset: Number of the first image.
        mean: Whether the latents are the encoder's means rather than draws around them.
        batch_size: Images at once.

    Returns:
        Shape (n, latent channels, H / f, W / f), on the device of ``images``.

    Raises:
        TypeError: If ``batch_size`` is no int.
        ValueError: If it is not positive, or the autoencoder's configuration does not say how its
            latents are scaled.
    """
    check_positive_int("batch_size", batch_size)
    latents = []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        encoded = vae.encode(_framed(vae, batch).to(device=vae.device, dtype=vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        # An AutoencoderDC has no distribution.
        z = encoded.latent if posterior is None else posterior.mean
        if not mean and posterior is not None:
            offset = sample_offset + first
            noise = normal(z.shape, seed, step=draws.ENCODER, sample_offset=offset, device=z.device)
            z = z + posterior.std * noise.to(z)
        scale, shift = _factors(vae, z)
        # A convolution may leave them channels last.
        z = _unframed(vae, batch, (z - shift) * scale)
        latents.append(z.to(batch.device).contiguous())
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
    parts = [decoded(vae, z).to(latents.device) for z in latents.split(batch_size)]
    return torch.cat(parts).contiguous()


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return what :func:`decode` does of one batch, on the autoencoder's device, differentiable."""
    z = _framed(vae, latents).to(device=vae.device, dtype=vae.dtype)
    scale, shift = _factors(vae, z)
    # Some of LTX's decoders are told how noisy their latents are: not at all.
    takes_time = vae.config.get("timestep_conditioning")
    time = {"temb": z.new_zeros(len(z))} if takes_time else {}
    return _unframed(vae, latents, vae.decode(z / scale + shift, **time).sample)


def _framed(vae: Any, images: Tensor) -> Tensor:
    """Return images as videos of one frame, for Qwen-Image's autoencoder."""
    return images[:, :, None] if _has_frames(vae, images) else images


def _unframed(vae: Any, like: Tensor, images: Tensor) -> Tensor:
    return images[:, :, 0] if _has_frames(vae, like) else images


def _has_frames(vae: Any, images: Tensor) -> bool:
    return images.dim() == 4 and type(vae).__name__ == "AutoencoderKLQwenImage"


def _factors(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return scaling / std and mean, which broadcast to z."""
    config, channels = vae.config, z.shape[1]
    # LTX's autoencoders have them as buffers.
    tables: list[Any] = [
        config[name] if name in config else getattr(vae, name, None)
        for name in ("latents_mean", "latents_std")
    ]
    scaling = config.get("scaling_factor")
    if tables == [None, None]:
        tables = [[config.get("shift_factor") or 0.0] * channels, [1.0] * channels]
    elif scaling is None:
        scaling = 1.0
    if scaling is None or any(table is None or len(table) != channels for table in tables):
        raise ValueError(
            "vae must have a scaling_factor in its configuration, or latents_mean and latents_std "
            f"with a number for each of {channels} channels, got {scaling}, {tables[0]} and "
            f"{tables[1]}"
        )
    mean, std = (
        torch.as_tensor(table, dtype=z.dtype, device=z.device).reshape(-1, *[1] * (z.dim() - 2))
        for table in tables
    )
    return scaling / std, mean
