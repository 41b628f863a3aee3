"""How sure a model is of each pixel: the standard deviation of x0 given x_t, as a map.

For example::

    found = ocm.uncertainty(pipeline, 500, image=images)      # noised to t = 500
    found = ocm.uncertainty(pipeline, 500, x_t=latents)       # in the middle of sampling
    found.mean, found.std                                     # images in [-1, 1]

Latents are decoded. With D the decoder, the image of x0 ~ N(m, C) has about the covariance
J C J^T, J = dD/dz at m. Two ways lead to its diagonal, both by C^(1/2) z with standard normal z::

    draws      the variance of D(m + C^(1/2) z) over M draws, M passes through the decoder
    products   the mean of (J C^(1/2) z)^2 over M draws, M products in forward mode

Both have a relative standard error of sqrt(1 / (2 M)) in the standard deviation. Draws follow
decoders where they bend and saturate, and products only their tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import hessdiag
from hessdiag.kernels import normal
from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.exact import Exact
from ocm.covariances.hutchinson import Hutchinson, floored
from ocm.covariances.operators import PIXELS, PosteriorCovariance, SpectralCovariance, diagonal
from ocm.diffusion import draws
from ocm.diffusion.checks import check_finite, check_positive_int, check_range
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.from_diffusers import from_scheduler, prediction_type_of
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.predictions import PRECONDITIONED
from ocm.diffusion.schedules import full_precision
from ocm.integrations.latents import decode, decoded, encode
from ocm.sampling.samplers import X0_RANGE

Way = Literal["draws", "products"]
_NUM_PROBES = 48


@dataclass(frozen=True, eq=False)
class UncertaintyMap:
    """What a model says of x0 given x_t: its mean, and how sure it is of each dimension.

    Attributes:
        t: The noise level.
        x_t: The noisy images, shape (B, C, ...); those of a model of latents are decoded.
        mean: Mean of x0, of the same shape.
        std: Standard deviation of x0, in the units of ``mean``.
        x0: What was noised, where that is known; of latents the image that they decode to.
        raised: Share of the stated variances that were negative: those say nothing, and were raised
            to the floor of :func:`ocm.covariances.hutchinson.floored`.
        latent: The map of the latents that this one was decoded from, or None.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> found = ocm.uncertainty(denoiser, 500, image=torch.zeros(1, 1, 2, 2), x0_range=None)
        >>> found.std.square().round(decimals=3)    # beta_bar at t = 500
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """

    t: float
    x_t: Tensor
    mean: Tensor
    std: Tensor
    x0: Tensor | None = None
    raised: float = 0.0
    latent: UncertaintyMap | None = None


@torch.no_grad()
def uncertainty(
    model: Any,
    t: float,
    *,
    image: Tensor | None = None,
    x_t: Tensor | None = None,
    covariance: Covariance | None = None,
    condition: Condition | None = None,
    x0_range: tuple[float, float] | None = X0_RANGE,
    way: Way = "draws",
    num_draws: int = 64,
    seed: int = 0,
    sample_offset: int = 0,
) -> UncertaintyMap:
    """Return the standard deviation of x0 given x_t of each pixel, decoded if there is a decoder.

    Args:
        model: A denoiser; a covariance, which knows its denoiser; or a pipeline of diffusers, with
            a ``unet`` or ``transformer``, a ``scheduler`` and perhaps a ``vae``.
        t: The noise level in (0, N] of the denoiser's schedule, whole on a discrete one: diffusers'
            timestep of flow matching, and its timestep + 1 of betas.
        image: Clean images, shape (B, C, ...) in [-1, 1], or videos (B, C, F, H, W), of which x_t
            is made; for a denoiser of latents without its decoder, clean latents.
        x_t: Or x_t itself, alpha x0 + sigma n; latents of a latent model.
        covariance: What states Cov[x0 | x_t]. None is the head of an :func:`ocm.attach`-ed model,
            and else the coloring of 48 products, ``hessdiag.Coloring(48)``.
        condition: Labels, text embeddings and guidance (:meth:`ocm.Denoiser.condition`).
        x0_range: Where the data lie: the mean is clipped to it, and no variance is above what it
            allows. None for data without bounds; latents of a pipeline have none.
        way: How variances of latents are decoded, "draws" or "products", as above.
        num_draws: M of these.
        seed: Of all noise: that of x_t, the probes, and the draws.
        sample_offset: Number of the first sample.

    Raises:
        TypeError: If the model is none of these, or a tensor is not of floating point.
        ValueError: If not one of ``image`` and ``x_t`` is given, a value is not finite, an option
            is unknown, or the pipeline's scheduler keeps latents in another scale.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x_t, time: -x_t, ocm.flow(), "flow_prediction")
        >>> found = ocm.uncertainty(denoiser, 500, image=torch.zeros(1, 1, 8, 8))
        >>> found.std.shape, found.x0 is not None
        (torch.Size([1, 1, 8, 8]), True)
    """
    if (image is None) == (x_t is None):
        given = "neither" if image is None else "both"
        raise ValueError(f"image (clean, to be noised) or x_t (noisy) must be given, got {given}")
    check_finite("image" if x_t is None else "x_t", image if x_t is None else x_t)
    check_positive_int("num_draws", num_draws)
    check_range("x0_range", x0_range)
    if covariance is not None:
        check_covariance(covariance)
    if way not in get_args(Way) or num_draws == 1:
        raise ValueError(
            f"way must be one of {', '.join(get_args(Way))}, of at least 2 num_draws, got {way!r} "
            f"and {num_draws}"
        )
    denoiser, stating, vae = _parts(model, covariance)
    scheduler = getattr(model, "scheduler", None)
    is_scaled = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0
    if x_t is not None and is_scaled and denoiser.prediction_type not in PRECONDITIONED:
        raise ValueError(
            f"x_t must be on the path of the denoiser, alpha x0 + sigma n, and latents of "
            f"{type(scheduler).__name__} are x0 + sigma n: hand scheduler.scale_model_input(x_t, "
            "timestep) to an ocm.Denoiser of the pipeline's parts"
        )
    x0 = None if image is None else image.to(denoiser.device)
    if vae is not None:
        x0_range = None
        x0 = None if x0 is None else encode(vae, x0, mean=True)
    if x0 is not None:
        prediction = noisy_prediction(denoiser, x0, t, seed, sample_offset, condition=condition)
    else:
        assert x_t is not None
        prediction = denoiser.predict(
            x_t.to(denoiser.device), t, condition=condition, sample_offset=sample_offset
        )
    noisy = prediction.x_t
    # The covariance first: one of products keeps the evaluation that the mean is read from.
    stated = (stating or _by_products(denoiser, noisy, seed)).at(prediction)
    posterior, raised = _positive(stated, noisy.shape)
    posterior = posterior.bounded(x0_range)
    mean = prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)
    std = posterior.diagonal().clamp(min=0.0).sqrt().expand(noisy.shape)
    found = UncertaintyMap(t, noisy, mean, std, x0, raised)
    if vae is None:
        return found

    def normals(k: int) -> Tensor:
        places: dict[str, Any] = {"sample_offset": sample_offset, "device": mean.device}
        z = normal(noisy.shape, seed, step=draws.DECODED + k, **places)
        return posterior.noise(z.to(mean))

    spread = std_of_draws if way == "draws" else std_by_products

    def image_of(latents: Tensor) -> Tensor:
        return full_precision(decode(vae, latents))

    return UncertaintyMap(
        t,
        image_of(noisy),
        image_of(mean),
        spread(vae, mean, normals, num_draws),
        None if x0 is None else image_of(x0),
        raised,
        found,
    )


def _parts(model: Any, covariance: Covariance | None) -> tuple[Denoiser, Covariance | None, Any]:
    """Return the denoiser, the covariance if there is one, and the decoder of latents or None."""
    if isinstance(model, Denoiser):
        return model, covariance, None
    if hasattr(model, "at"):
        if covariance is not None:
            raise ValueError("model must be a denoiser beside a covariance, got a covariance too")
        return _denoiser_of(model), model, None
    backbone = getattr(model, "unet", None) or getattr(model, "transformer", None)
    scheduler = getattr(model, "scheduler", None)
    if backbone is None or scheduler is None or getattr(model, "transformer_2", None) is not None:
        raise TypeError(
            "model must be a denoiser, a covariance, or a pipeline with one unet or transformer "
            f"and a scheduler, got {type(model).__name__}; of any other make an ocm.Denoiser, and "
            "of ocm.attach(...) its covariance(scheduler)"
        )
    vae = getattr(model, "vae", None)
    other = next((name for name in ("vqvae", "movq") if getattr(model, name, None)), None)
    if other is not None:
        raise TypeError(
            f"model must decode by a vae, and {type(model).__name__} has a {other}: make an "
            "ocm.Denoiser of its parts, whose maps are those of latents"
        )
    if hasattr(backbone, "covariance"):  # ocm.attach
        headed = backbone.covariance(scheduler)
        return headed.denoiser, covariance or headed, vae
    denoiser = Denoiser(backbone, from_scheduler(scheduler), prediction_type_of(scheduler))
    return denoiser, covariance, vae


def _denoiser_of(covariance: Any) -> Denoiser:
    """Return the denoiser of a covariance, or of the first of those that were calibrated."""
    while hasattr(covariance, "covariances"):
        covariance = covariance.covariances[0]
    found: Denoiser = covariance.denoiser
    return found


def _by_products(denoiser: Denoiser, x_t: Tensor, seed: int) -> Covariance:
    """Return the covariance that stands for none: exact where that takes no more products."""
    sample_shape = x_t.shape[1:]
    if sample_shape.numel() <= _NUM_PROBES:
        return Exact(denoiser)
    is_image = len(sample_shape) > 1
    design = hessdiag.Coloring(_NUM_PROBES) if is_image else hessdiag.Rademacher()
    return Hutchinson(denoiser, _NUM_PROBES, seed, design, floor=None)


def _positive(stated: PosteriorCovariance, shape: torch.Size) -> tuple[PosteriorCovariance, float]:
    """Return the covariance without negative variances, and the share of them."""
    variance = stated.diagonal()
    raised = (variance < 0.0).float().mean().item()
    if isinstance(stated, SpectralCovariance) and stated.basis is PIXELS:
        return diagonal(floored(variance.expand(shape)), shape), raised
    return stated, raised


def std_of_draws(
    vae: Any, mean: Tensor, normals: Callable[[int], Tensor], num_draws: int
) -> Tensor:
    """Return the standard deviation of decoded draws; sums are of differences from the mean's."""
    centre = full_precision(decode(vae, mean))
    total, squares = torch.zeros_like(centre), torch.zeros_like(centre)
    for k in range(num_draws):
        difference = full_precision(decode(vae, mean + normals(k))) - centre
        total, squares = total + difference, squares + difference.square()
    variance = (squares - total.square() / num_draws) / (num_draws - 1)
    return variance.clamp(min=0.0).sqrt()


def std_by_products(
    vae: Any, mean: Tensor, normals: Callable[[int], Tensor], num_draws: int
) -> Tensor:
    """Return the root of the mean square of J C^(1/2) z."""
    decoder = partial(decoded, vae)
    J = hessdiag.Jacobian(decoder, mean, mode="jvp", batching="loop", rectangular=True)
    mean_square = full_precision(mean.new_zeros(()))
    for k in range(num_draws):
        product = full_precision(J.products(normals(k)[None])[0])
        mean_square = mean_square + product.square() / num_draws
    return mean_square.sqrt()
