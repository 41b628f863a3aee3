"""Steps of second order: x0_hat is extrapolated from the step before, as far as Cov[x0 | x_t] says.

With x0_hat_p of the step before, from p to t, the step from t to s is::

    D   = x0_hat + W (x0_hat - x0_hat_p)
    x_s = a x_t + b D + lambda z,

a, b and lambda those of :func:`ocm.ddim`. A step of first order has W = 0, and draws the variance
b^2 Cov as noise. DPM-Solver++ (2M) (Lu et al., 2022; eta = 0) and its SDE variant (eta = 1) have
W = w0, half the ratio of this step in log SNR to the one before, and no such noise. Here the
extrapolation adds the variance b^2 Cov to x_s. For Gaussian data this is a condition on W: where
Cov has the eigenvalue v let k = SNR_t v, q = SNR_p / SNR_t and::

    past   = q / (q + (1 - k) (1 - q))                       Var x0_hat_p / Var x0_hat
    common = sqrt(past (1 - eta^2 (1 - k) (1 - q)))          Cov(x0_hat_p, x0_hat) / Var x0_hat

if the step before drew lambda alone. W is the positive root of::

    b (1 - k) = 2 W (a alpha_t + b k) (1 - common) + W^2 b k (1 - 2 common + past),

whose left side is b^2 Cov and whose right side is what W adds. For eta = 0 this solves the ODE of
Gaussian data exactly. In short steps W is w0 for every k; in long ones it is larger where there is
much noise (k near 0) and smaller where there is little (k near 1). Where Cov = 0, x0 is known and
any W is right: it is w0 there, and the sampler is DPM-Solver++.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor

from hessdiag.kernels import normal
from ocm.covariances.operators import PosteriorCovariance, spectral
from ocm.diffusion import draws
from ocm.diffusion.denoiser import Prediction
from ocm.diffusion.schedules import full_precision
from ocm.sampling.samplers import ReverseStep, ddim, reverse_step

# k = 1 is a limit: no posterior of Gaussian data is wider than the noise.
_LARGEST_K = 1.0 - 1e-6


@dataclass(frozen=True)
class SecondOrder:
    """The sampler of second order with one evaluation of the network a step, for `ocm.sample`.

    The first step and the last one, to s = 0, are those of :func:`ocm.ddim`.

    Attributes:
        eta: Of the noise lambda^2 = eta^2 beta_tilde(s, t): 0 none, 1 that of the reverse SDE.

    Raises:
        ValueError: Unless eta lies in [0, 1].
        TypeError: In `ocm.sample`, if the covariance has no eigenvalues (Lanczos).

    Example:
        >>> import ocm
        >>> denoiser = ocm.Denoiser(lambda x, t: x, ocm.flow(), "flow_prediction")
        >>> sampler = ocm.SecondOrder(eta=0.3)
        >>> ocm.sample(denoiser, ocm.Beta(denoiser), (2, 1, 4, 4), 5, sampler=sampler).shape
        torch.Size([2, 1, 4, 4])
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def __call__(self, *_: object) -> NoReturn:
        """Raise where a step by x_t alone is asked for."""
        raise TypeError(
            "sampler must look at x_t alone here, as ocm.ddpm, ocm.ddim and ocm.renoised do; "
            f"{self} looks at the step before, and is for ocm.sample"
        )

    def start(self) -> _Run:
        """Return what takes the steps of a run in order."""
        return _Run(self.eta)


@dataclass
class _Run:
    """The steps of a batch, with the x0_hat and the timestep of the last one."""

    eta: float
    last: tuple[Tensor, float] | None = None

    def __call__(
        self,
        prediction: Prediction,
        covariance: PosteriorCovariance | None,
        *,
        seed: int | Tensor,
        x0_range: tuple[float, float] | None,
        max_noise_std: float | None,
    ) -> Tensor:
        """Return x_s, s the prediction's."""
        denoiser, t, s = prediction.denoiser, prediction.timestep, prediction.s
        assert s is not None  # the step is known
        step = ddim(denoiser.schedule, s, t, eta=self.eta)
        x_t = full_precision(prediction.x_t)
        x0_hat = denoiser.x0_hat(x_t, t, full_precision(prediction.output))
        if x0_range is not None:
            x0_hat = x0_hat.clamp(*x0_range)
        before, self.last = self.last, (x0_hat, t)
        if before is None or s == 0 or covariance is None:
            return reverse_step(
                prediction, covariance, step,
                seed=seed, x0_range=x0_range, max_noise_std=max_noise_std,
            )  # fmt: skip
        x0_hat_p, p = before
        L_s, L_t, L_p = (denoiser.schedule.log_snr(place) for place in (s, t, p))
        C = spectral(covariance.bounded(x0_range))
        W = weight(
            C.eigenvalues.double() * L_t.exp().item(),
            step,
            alpha_t=denoiser.schedule.level(t).alpha,
            q=(L_p - L_t).exp().item(),
            w0=((L_s - L_t) / (L_t - L_p)).item() / 2,
            eta=self.eta,
        )
        a, b, noise_variance = step
        D = x0_hat + replace(C, eigenvalues=W.to(x_t)).multiply(x0_hat - x0_hat_p)
        std = min(math.sqrt(noise_variance), math.inf if max_noise_std is None else max_noise_std)
        offset = prediction.sample_offset
        z = normal(x_t.shape, seed, step=draws.of_level(t), sample_offset=offset, device=x_t.device)
        return (a * x_t + b * D + std * z.to(x_t)).to(prediction.x_t)


def weight(
    k: Tensor, step: ReverseStep, *, alpha_t: float, q: float, w0: float, eta: float
) -> Tensor:
    """Return W of each eigenvector.

    Args:
        k: SNR_t times the eigenvalues of Cov[x0 | x_t], float64.
        step: That of :func:`ocm.ddim`.
        alpha_t: Scale of the data at t.
        q: SNR_p / SNR_t.
        w0: W of DPM-Solver++.
        eta: Of the noise.

    Example:
        >>> import torch
        >>> k = torch.tensor([0.0, 0.1, 0.9])
        >>> weight(k, ReverseStep(0.5, 0.5, 0.0), alpha_t=1.0, q=0.25, w0=0.5, eta=0.0)
        tensor([0.5000, 0.8368, 0.2127])
    """
    a, b, _ = step
    k = k.clamp(0.0, _LARGEST_K)
    left = 1 - k
    past = q / (q + left * (1 - q))
    common = (past * (1 - eta**2 * left * (1 - q))).sqrt() if eta > 0 else past.sqrt()
    # The equation is missing = 2 W first + W^2 second.
    missing, noise = b * left, b * k
    first, second = (a * alpha_t + noise) * (1 - common), noise * (1 - 2 * common + past)
    W = missing / (first + (first.square() + missing * second).sqrt())
    return W.masked_fill(k <= 0, w0)
