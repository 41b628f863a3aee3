"""What a denoiser and a covariance head are trained on.

Noise and probes follow the random-number contract, with ``sample_offset`` counting the samples
that training has seen.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from hessdiag import kernels
from hessdiag.kernels import normal, rademacher
from hessdiag.products import jacobian_products
from ocm.denoiser import Denoiser, Prediction, per_sample
from ocm.heads import CovarianceHead
from ocm.schedules import Schedule


def noisy(
    schedule: Schedule, x0: Tensor, t: Tensor, seed: int, sample_offset: int
) -> tuple[Tensor, Tensor]:
    """Return x_t = sqrt(alpha_bar_t) x0 + sqrt(beta_bar_t) noise, and the noise."""
    noise = normal(x0.shape, seed, sample_offset=sample_offset, device=x0.device)
    x_t = per_sample(schedule.alpha_bar.sqrt(), t, x0) * x0
    return x_t + per_sample(schedule.beta_bar.sqrt(), t, x0) * noise, noise


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, *, seed: int, sample_offset: int
) -> Tensor:
    """Return the mean of (noise - epsilon(x_t, t))^2 (Ho, Jain and Abbeel, 2020)."""
    x_t, noise = noisy(denoiser.schedule, x0, t, seed, sample_offset)
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
    """
    x_t, _ = noisy(denoiser.schedule, x0, t, seed, sample_offset)
    predictions: list[Prediction] = []

    def epsilon(x: Tensor) -> Tensor:
        predictions.append(denoiser.predict(x, t))
        return predictions[-1].epsilon

    products = jacobian_products(epsilon, x_t, "vjp")
    probes = rademacher(
        (num_probes, *x_t.shape), seed, sample_offset=sample_offset, device=x_t.device
    )
    h = head(predictions[-1].features)
    return kernels.ocm_loss(
        h,
        products(probes),
        seed,
        scale=-per_sample(denoiser.schedule.beta_bar.sqrt(), t, x_t).flatten(),
        sample_offset=sample_offset,
    )
