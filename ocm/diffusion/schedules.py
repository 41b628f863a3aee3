"""Noise schedules of the forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, beta_bar_t I).

Timesteps run from 0 (data) to N (noise). alpha_bar_t is the cumulative product of 1 - beta and
beta_bar_t = 1 - alpha_bar_t; for s < t

    alpha(s, t)      = alpha_bar_t / alpha_bar_s
    beta(s, t)       = 1 - alpha(s, t)                        variance of q(x_t | x_s)
    beta_tilde(s, t) = beta(s, t) beta_bar_s / beta_bar_t     variance of q(x_s | x_t, x_0).

Tables are float64; differences of numbers near 1 are taken through their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving noise schedule.

    Attributes:
        name: What ``SCHEDULES`` calls it.
        log_alpha_bar: Logarithms of alpha_bar_0 .. alpha_bar_N, float64; the first is 0.

    Example:
        >>> schedule = linear()
        >>> schedule.num_timesteps
        1000
        >>> round(schedule.beta(0, 1), 6)
        0.0001
    """

    name: str
    log_alpha_bar: Tensor

    @property
    def num_timesteps(self) -> int:
        """N, the number of noise levels."""
        return len(self.log_alpha_bar) - 1

    @property
    def alpha_bar(self) -> Tensor:
        """alpha_bar_0 .. alpha_bar_N, float64."""
        return self.log_alpha_bar.exp()

    @property
    def beta_bar(self) -> Tensor:
        """beta_bar_0 .. beta_bar_N, float64."""
        return -torch.expm1(self.log_alpha_bar)

    def alpha(self, s: int, t: int) -> float:
        """Return the squared scale alpha(s, t) of x_s in x_t, for 0 <= s < t <= N."""
        return math.exp(self._log_alpha(s, t))

    def beta(self, s: int, t: int) -> float:
        """Return the variance beta(s, t) of q(x_t | x_s), for 0 <= s < t <= N."""
        return -math.expm1(self._log_alpha(s, t))

    def beta_tilde(self, s: int, t: int) -> float:
        """Return the variance beta_tilde(s, t) of q(x_s | x_t, x_0), for 0 <= s < t <= N."""
        return self.beta(s, t) * self.beta_bar[s].item() / self.beta_bar[t].item()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratios alpha_bar / beta_bar of t = 0 .. N, float64; the first is inf."""
        return self.alpha_bar / self.beta_bar

    def x0_from(self, prediction_type: str) -> tuple[Tensor, Tensor]:
        """Return tables p and q of the posterior mean x0_hat = p_t x_t + q_t output, t = 0 .. N.

        Args:
            prediction_type: What the network's output predicts, by diffusers' names: "epsilon",
                the noise; "sample", x0; or "v_prediction", v = sqrt(alpha_bar) noise -
                sqrt(beta_bar) x0 (Salimans and Ho, 2022).

        Raises:
            ValueError: If there is no such type.

        Example:
            >>> p, q = linear().x0_from("sample")
            >>> p[500].item(), q[500].item()
            (0.0, 1.0)
        """
        check_prediction_type(prediction_type)
        alpha, sigma = self.alpha_bar.sqrt(), self.beta_bar.sqrt()
        if prediction_type == "epsilon":
            return 1.0 / alpha, -sigma / alpha
        if prediction_type == "v_prediction":
            return alpha, -sigma
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def diffuse(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(alpha_bar_t) x0 + sqrt(beta_bar_t) noise.

        Args:
            x0: Shape (B, ...).
            t: One timestep in 0 .. N, or an int64 tensor of shape (B,).
            noise: Shape of ``x0``.
        """
        signal = per_sample(self.alpha_bar.sqrt(), t, x0) * x0
        return signal + per_sample(self.beta_bar.sqrt(), t, x0) * noise

    def _log_alpha(self, s: int, t: int) -> float:
        if not 0 <= s < t <= self.num_timesteps:
            raise ValueError(
                f"timesteps must satisfy 0 <= s < t <= {self.num_timesteps}, got s = {s}, t = {t}"
            )
        return (self.log_alpha_bar[t] - self.log_alpha_bar[s]).item()


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def check_prediction_type(prediction_type: str) -> None:
    """Raise unless ``prediction_type`` is one of :data:`PREDICTION_TYPES`.

    Raises:
        ValueError: If it is not.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )


def from_betas(betas: Sequence[float] | Tensor, name: str = "betas") -> Schedule:
    """Return the schedule of beta_1 .. beta_N, for example those of a diffusers scheduler.

    Raises:
        ValueError: If a beta lies outside (0, 1).

    Example:
        >>> from_betas([0.1, 0.2]).alpha_bar
        tensor([1.0000, 0.9000, 0.7200], dtype=torch.float64)
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.dim() != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(
            "betas must be a non-empty sequence of numbers in (0, 1), got shape "
            f"{tuple(betas.shape)} and values {betas[:3].tolist()} ... {betas[-1:].tolist()}"
        )
    log_alpha = torch.log1p(-betas)
    return Schedule(name, torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha.cumsum(0)]))


def from_scheduler(scheduler: Any) -> Schedule:
    """Return the schedule of a diffusers scheduler, or of its configuration.

    Args:
        scheduler: An object with ``config``, or the configuration itself (a mapping), of any
            scheduler whose betas are those of a ``DDPMScheduler``: ``beta_schedule``,
            ``beta_start``, ``beta_end``, ``trained_betas``, ``num_train_timesteps``.

    Raises:
        ValueError: If the betas are none of a variance-preserving process with signal left at N
            (``rescale_betas_zero_snr``), or the configuration makes none.

    Example:
        >>> from_scheduler({"num_train_timesteps": 10, "beta_schedule": "linear"}).num_timesteps
        10
    """
    from diffusers import DDPMScheduler

    config = dict(getattr(scheduler, "config", scheduler))
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    config = {name: config[name] for name in kept if name in config} | {
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False)
    }
    try:
        betas = DDPMScheduler(**config).betas
    # NotImplementedError is diffusers' word for a beta_schedule that it does not know.
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"scheduler has no betas of a DDPMScheduler: {error}") from error
    return from_betas(betas)


def linear(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Return the linear schedule of Ho, Jain and Abbeel (2020).

    Example:
        >>> linear().beta_bar[-1].item() > 0.9999
        True
    """
    _check_num_timesteps(num_timesteps)
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return from_betas(betas, "linear")


def cosine(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """Return the cosine schedule of Nichol and Dhariwal (2021).

    alpha_bar_t is proportional to cos^2(pi/2 (t/N + offset) / (1 + offset)), with every beta at
    most ``max_beta``.

    Example:
        >>> round(cosine().alpha_bar[500].item(), 3)
        0.494
    """
    _check_num_timesteps(num_timesteps)
    progress = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - curve[1:] / curve[:-1]).clamp(max=max_beta), "cosine")


def _check_num_timesteps(num_timesteps: int) -> None:
    check_positive_int("num_timesteps", num_timesteps)
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": linear, "cosine": cosine}


def per_sample(table: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
    """Return ``table[t]`` in the dtype and on the device of x, broadcast against its features.

    Returns:
        Shape (1, 1, ...) for an int, (B, 1, ...) for a tensor of shape (B,).

    Example:
        >>> per_sample(torch.arange(4.0), torch.tensor([3, 1]), torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    features = [1] * (x.dim() - 1)
    if isinstance(t, int):
        return x.new_full([1, *features], table[t].item())
    return table.to(t.device)[t].to(x).reshape(-1, *features)


def full_precision(values: Tensor) -> Tensor:
    """Return numbers of half precision in float32; float64 stays what it is.

    Example:
        >>> full_precision(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
