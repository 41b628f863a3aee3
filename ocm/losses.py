"""What a denoiser and a covariance head are trained on.

Noise and probes follow the random-number contract, with ``sample_offset`` counting the samples
that training has seen.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from hessdiag import kernels
from hessdiag.kernels import normal, rademacher
from hessdiag.products import JacobianProducts
from ocm.denoiser import Denoiser, Prediction
from ocm.heads import CovarianceHead
from ocm.schedules import per_sample

# Counter of training's noise, apart from those of the samplers, which use 0 .. N.
_TRAINING_STEP = 2**32 - 1


def training_noise(x0: Tensor, seed: int, sample_offset: int) -> Tensor:
    """Return the noise of the training samples ``sample_offset`` onwards, of the shape of x0."""
    return normal(
        x0.shape, seed, step=_TRAINING_STEP, sample_offset=sample_offset, device=x0.device
    )


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, *, seed: int, sample_offset: int
) -> Tensor:
    """Return the mean of (noise - epsilon(x_t, t))^2 (Ho, Jain and Abbeel, 2020).

    Args:
        denoiser: The denoiser in training.
        x0: Images in [-1, 1], shape (B, C, H, W).
        t: Timesteps in 1 .. N, int64 of shape (B,).
        seed: Seed of the noise.
        sample_offset: Number of images that training has seen before these.
    """
    noise = training_noise(x0, seed, sample_offset)
    x_t = denoiser.schedule.diffuse(x0, t, noise)
    return functional.mse_loss(denoiser.epsilon(x_t, t), noise)


def ocm_loss(
    denoiser: Denoiser,
    head: CovarianceHead,
    x0: Tensor,
    t: Tensor,
    *,
    seed: int,
    sample_offset: int,
    num_probes: int = 1,
) -> Tensor:
    """Return the Optimal Covariance Matching loss (Ou et al., ICLR 2025).

    The head regresses the Hutchinson estimate of the dimensionless Hessian diagonal,

        mean (h(x_t, t) - (1/M) sum_m v_m * (beta_bar H v_m))^2,

    with beta_bar H = -sqrt(beta_bar) d epsilon / d x_t. Its gradient is unbiased for every number
    of probes M, since the minimiser is the conditional mean beta_bar diag(H). The target and the
    head's features come from the same pass through the frozen denoiser, and nothing is
    differentiated into it.

    Args:
        denoiser: The frozen denoiser.
        head: The head in training.
        x0: Images in [-1, 1], shape (B, C, H, W).
        t: Timesteps in 1 .. N, int64 of shape (B,).
        seed: Seed of the noise and the probes.
        sample_offset: Number of images that training has seen before these.
        num_probes: Probes M in each target.
    """
    x_t = denoiser.schedule.diffuse(x0, t, training_noise(x0, seed, sample_offset))
    predictions: list[Prediction] = []

    def epsilon(x: Tensor) -> Tensor:
        predictions.append(denoiser.predict(x, t))
        return predictions[-1].epsilon

    probes = rademacher(
        (num_probes, *x_t.shape), seed, sample_offset=sample_offset, device=x_t.device
    )
    # One plain evaluation, whose features the head reads.
    products = JacobianProducts(epsilon, x_t, "vjp", "loop")(probes)
    h = head(predictions[-1].features)
    return kernels.ocm_loss(
        h,
        products,
        seed,
        scale=-per_sample(denoiser.schedule.beta_bar.sqrt(), t, x_t).flatten(),
        sample_offset=sample_offset,
    )
