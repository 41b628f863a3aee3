"""Paths from data to noise, x_t = alpha_t x0 + sigma_t n, by a real number t from 0 to N.

t = 0 is data (alpha = 1, sigma = 0) and N noise. Everything that is said about x0 given x_t rests
on the signal-to-noise ratio SNR = alpha^2 / sigma^2, whatever the path: with::

    alpha_bar = alpha^2 / (alpha^2 + sigma^2),      beta_bar = 1 - alpha_bar

x_t / sqrt(alpha^2 + sigma^2) is the x_t of a variance-preserving process. For s < t::

    beta(s, t)       = sigma_t^2 (1 - SNR_t / SNR_s)      variance of q(x_t | x_s)
    beta_tilde(s, t) = sigma_s^2 (1 - SNR_t / SNR_s)      variance of q(x_s | x_t, x_0).

=============================================  =====================  =============  ============
path                                           alpha_t                sigma_t        network's t
=============================================  =====================  =============  ============
:func:`linear`, :func:`cosine`,                sqrt(alpha_bar_t)      sqrt(beta_bar) t - 1
:func:`from_betas`: whole t alone
:func:`vp`, its continuous form                the same               the same       u (N - 1)
:func:`flow`, u = t / N                        1 - u                  u              u N
:func:`edm`, variance exploding                1                      rho-spaced     log(sigma) / 4
:func:`trigflow`, angle a = pi/2 t / N         cos a                  std sin a      a
=============================================  =====================  =============  ============

Any other is a :class:`Schedule` of two functions. Numbers are float64; 1 - SNR_t / SNR_s is taken
through logarithms, and SNR = 0 at t = N is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.tables import OnDevices

MOST_TIMESTEPS = 1_000_000


class Level(NamedTuple):
    """What a schedule says of one timestep, in numbers; ``time`` is the network's, nan at t = 0."""

    alpha: float
    sigma: float
    log_snr: float
    beta_bar: float
    time: float


@dataclass(frozen=True, eq=False)
class Schedule:
    """A path x_t = alpha_t x0 + sigma_t n.

    Attributes:
        name: What ``SCHEDULES`` calls it.
        num_timesteps: The last timestep N, of noise.
        scales: From t, float64 of any shape in [0, N], to alpha and sigma of that shape. SNR falls
            strictly, from alpha = 1 and sigma = 0.
        time: From t to what the network is told, of the same shape.
        is_continuous: Whether t is any number in (0, N], or only a whole one.
        data_std: Standard deviation of the data that a preconditioned network was made for.
        options: Arguments of ``SCHEDULES[name]``, beside N, that make it again.

    Raises:
        ValueError: By its methods, if a number t lies outside [0, N].

    Example:
        >>> import ocm
        >>> cubic = ocm.Schedule("cubic", 1000, lambda t: (1 - (t / 1000) ** 3, t / 1000))
        >>> cubic.alpha(500), cubic.sigma(500)
        (tensor(0.8750, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    name: str
    num_timesteps: int
    scales: Callable[[Tensor], tuple[Tensor, Tensor]]
    time: Callable[[Tensor], Tensor] = lambda t: t
    is_continuous: bool = True
    data_std: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def alpha(self, t: float | Tensor) -> Tensor:
        """Return the scale of the data at t, float64 of the shape of t."""
        return self.scales(t.double())[0] if isinstance(t, Tensor) else _float64(self.level(t)[0])

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return the scale of the noise at t, float64 of the shape of t."""
        return self.scales(t.double())[1] if isinstance(t, Tensor) else _float64(self.level(t)[1])

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Return log SNR at t, float64: infinite at 0, and -inf where there is no signal."""
        if not isinstance(t, Tensor):
            return _float64(self.level(t).log_snr)
        alpha, sigma = self.scales(t.double())
        return 2.0 * (alpha.log() - sigma.log())

    def level(self, t: float) -> Level:
        """Return the numbers of a timestep, which are computed once."""
        return self._levels(t)

    @cached_property
    def _levels(self) -> Callable[[float], Level]:
        @lru_cache(maxsize=4096)
        def level(t: float) -> Level:
            if not 0 <= t <= self.num_timesteps:
                raise ValueError(f"t must lie in [0, {self.num_timesteps}], got {t}")
            place = _float64(t)
            log_snr = self.log_snr(place)
            time = self.time(place) if t > 0 else torch.tensor(math.nan)
            parts = *self.scales(place), log_snr, torch.sigmoid(-log_snr), time
            return Level(*(part.item() for part in parts))

        return level

    def beta(self, s: float, t: float) -> float:
        """Return the variance beta(s, t) of q(x_t | x_s), for 0 <= s < t <= N."""
        return self.lost(s, t) * self.level(t).sigma ** 2

    def beta_tilde(self, s: float, t: float) -> float:
        """Return the variance beta_tilde(s, t) of q(x_s | x_t, x_0), for 0 <= s < t <= N."""
        return self.lost(s, t) * self.level(s).sigma ** 2

    def lost(self, s: float, t: float) -> float:
        """Return 1 - SNR_t / SNR_s, the share of the SNR that is lost from s to t.

        Raises:
            ValueError: Unless 0 <= s < t <= N.

        Example:
            >>> import ocm
            >>> ocm.flow().lost(0, 500)
            1.0
        """
        if not 0 <= s < t <= self.num_timesteps:
            raise ValueError(
                f"timesteps must satisfy 0 <= s < t <= {self.num_timesteps}, got s = {s}, t = {t}"
            )
        # Next to each other log SNR may rise by its rounding.
        return max(0.0, -math.expm1(self.level(t).log_snr - self.level(s).log_snr))

    @cached_property
    def _of_whole(self) -> Tensor:
        """Log SNR of t = 0 .. N."""
        return self.log_snr(torch.arange(self.num_timesteps + 1))

    @property
    def log_alpha_bar(self) -> Tensor:
        """Logarithms of alpha_bar_0 .. alpha_bar_N, float64; the first is 0."""
        return functional.logsigmoid(self._of_whole)

    @property
    def alpha_bar(self) -> Tensor:
        """alpha_bar_0 .. alpha_bar_N, float64."""
        return torch.sigmoid(self._of_whole)

    @property
    def beta_bar(self) -> Tensor:
        """beta_bar_0 .. beta_bar_N, float64."""
        return torch.sigmoid(-self._of_whole)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratios of t = 0 .. N, float64; the first is inf."""
        return self._of_whole.exp()

    @cached_property
    def sigmas_on_devices(self) -> OnDevices:
        """sigma_t / alpha_t for t = 1 .. N, float64; infinite where there is no signal."""
        return OnDevices(self.snr[1:].rsqrt())

    @property
    def prior_std(self) -> float:
        """Standard deviation sqrt(alpha_N^2 + sigma_N^2) of the x_N from which sampling starts."""
        return math.hypot(*self.level(self.num_timesteps)[:2])

    def has_signal(self, t: float) -> bool:
        """Return whether x_t holds anything of x0: alpha_t > 0."""
        return self.level(t).alpha > 0

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """Return the t of a continuous path where log SNR is this, float64.

        Below and above what the path reaches it is N and 0.

        Example:
            >>> import torch, ocm
            >>> ocm.flow().timestep_of(torch.tensor([0.0]))    # as much noise as data
            tensor([500.], dtype=torch.float64)
        """
        return self.timestep_where(lambda t: -self.log_snr(t), -log_snr)

    def timestep_where(self, rising: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """Return the t of a continuous path where a function that rises with t takes a value.

        Float64 of the shape of ``value``, by bisection to the last bit; 0 and N beyond its range.
        """
        low = torch.zeros_like(value, dtype=torch.float64)
        high = torch.full_like(low, self.num_timesteps)
        for _ in range(64):
            middle = (low + high) / 2
            is_below = rising(middle) < value
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return high

    def diffuse(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """Return x_t = alpha_t x0 + sigma_t noise.

        Args:
            x0: Shape (B, ...).
            t: One timestep, or a tensor of shape (B,).
            noise: Shape of ``x0``.
        """
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * noise

    def check(self, t: float | Tensor, *, between: bool = False) -> None:
        """Raise unless t are timesteps of noise: in (0, N], and whole on a discrete path.

        Tensors on a GPU are not looked at, since they would have to be waited for.

        Args:
            t: The timesteps.
            between: Whether they may lie between those of a discrete path.

        Raises:
            TypeError: If t is neither a number nor a tensor, or not whole.
            ValueError: If it lies elsewhere.
        """
        if isinstance(t, Tensor):
            if t.device.type != "cpu":
                return
            is_whole = not t.is_floating_point() or bool((t == t.round()).all())
            lowest, highest = (t.min().item(), t.max().item()) if t.numel() else (1, 1)
        elif isinstance(t, (int, float)):
            is_whole, lowest, highest = t % 1 == 0, t, t  # not where t is NaN or infinite
        else:
            raise TypeError(f"t must be a number or a tensor, got {type(t).__name__}")
        if not (self.is_continuous or is_whole or between):
            raise TypeError(
                f"t must be whole on the discrete schedule {self.name!r}, got {lowest} .. {highest}"
            )
        if not (0 < lowest and highest <= self.num_timesteps):
            first = "(0," if self.is_continuous else "1 .."
            raise ValueError(
                f"t must lie in {first} {self.num_timesteps}{']' * self.is_continuous}, got "
                f"{lowest} .. {highest}"
            )


def from_betas(betas: Sequence[float] | Tensor, name: str = "betas") -> Schedule:
    """Return the schedule of beta_1 .. beta_N, for example those of a diffusers scheduler.

    alpha_bar_t is the product of 1 - beta_1 .. 1 - beta_t, alpha its root, and sigma that of
    beta_bar; the network is told t - 1, as in diffusers.

    Args:
        betas: beta_1 .. beta_N in (0, 1). The last may be 1: then x_N holds no signal ("zero
            terminal SNR").
        name: What errors call the schedule.

    Raises:
        ValueError: If a beta lies outside (0, 1), they leave no signal before the last timestep, or
            there are more than a million.

    Example:
        >>> import ocm
        >>> ocm.from_betas([0.1, 0.2]).alpha_bar
        tensor([1.0000, 0.9000, 0.7200], dtype=torch.float64)
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    fits = betas.dim() == 1 and 0 < len(betas) <= MOST_TIMESTEPS and bool((betas > 0).all())
    if not (fits and bool((betas[:-1] < 1).all()) and bool(betas[-1] <= 1)):
        raise ValueError(
            f"betas must be 1 to {MOST_TIMESTEPS} numbers in (0, 1), the last at most 1, got "
            f"shape {tuple(betas.shape)} and values {betas[:3].tolist()} ... {betas[-1:].tolist()}"
        )
    zero = torch.zeros(1, dtype=torch.float64)
    log_alpha_bar = torch.cat([zero, torch.log1p(-betas).cumsum(0)])
    lost = log_alpha_bar[:-1] / 2 < math.log(torch.finfo(torch.float64).tiny)
    if bool(lost.any()):
        raise ValueError(
            f"betas must leave signal before the last timestep {len(betas)}, got alpha = 0 from "
            f"t = {int(lost.int().argmax())} on"
        )
    tables = OnDevices((log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt())

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        # By take, since an index of no dimension would be read back from a GPU.
        alpha, sigma = (table.take(t.long()) for table in tables.at(t.device))
        return alpha, sigma

    return Schedule(name, len(betas), scales, lambda t: t - 1, is_continuous=False)


def linear(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Return the linear schedule of Ho, Jain and Abbeel (2020), a discrete one.

    Args:
        num_timesteps: N, in 2 .. 1000000.
        beta_start: beta_1, in (0, 1).
        beta_end: beta_N, in (0, 1]; betas between them are evenly spaced.

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000, or as :func:`from_betas`.

    Example:
        >>> import ocm
        >>> ocm.linear().beta_bar[-1].item() > 0.9999
        True
    """
    check_num_timesteps(num_timesteps)
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return from_betas(betas, "linear")


def cosine(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """Return the cosine schedule of Nichol and Dhariwal (2021).

    alpha_bar_t is proportional to cos^2(pi/2 (t/N + offset) / (1 + offset)), with every beta at
    most ``max_beta``.

    Args:
        num_timesteps: N, in 2 .. 1000000.
        offset: Keeps the first betas from being too small.
        max_beta: In (0, 1]; with 1, x_N holds no signal.

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000, or as :func:`from_betas`.

    Example:
        >>> import ocm
        >>> round(ocm.cosine().alpha_bar[500].item(), 3)
        0.494
    """
    check_num_timesteps(num_timesteps)
    progress = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    curve = torch.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - curve[1:] / curve[:-1]).clamp(max=max_beta), "cosine")


def vp(num_timesteps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Return the continuous variance-preserving path of Song et al. (2021).

    log alpha_bar = -beta_min u - (beta_max - beta_min) u^2 / 2 with u = t / N; the network is told
    u (N - 1), as it is there.

    Args:
        num_timesteps: N, in 2 .. 1000000; t is any number in (0, N].
        beta_min: The rate of noising at u = 0, above 0.
        beta_max: The rate at u = 1, at least ``beta_min``.

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000, or the rates are not positive, finite
            and in order.

    Example:
        >>> import ocm
        >>> round(ocm.vp().alpha_bar[1000].log().item(), 2)
        -10.05
    """
    check_num_timesteps(num_timesteps)
    _check_positive(beta_min=beta_min, beta_max=beta_max)
    if beta_min > beta_max:
        raise ValueError(f"beta_max must be at least beta_min, got {beta_max} and {beta_min}")

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        u = t / num_timesteps
        log_alpha_bar = -u * (beta_min + (beta_max - beta_min) * u / 2)
        return (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()

    return Schedule(
        "vp",
        num_timesteps,
        scales,
        lambda t: t / num_timesteps * (num_timesteps - 1),
        options={"beta_min": beta_min, "beta_max": beta_max},
    )


def flow(num_timesteps: int = 1000) -> Schedule:
    """Return the straight path of flow matching (Lipman et al., 2023; Liu et al., 2023).

    x_t = (1 - sigma) x0 + sigma n with sigma = t / N; the network is told N sigma, which is the
    timestep of diffusers. A shift changes the timesteps that are visited, not the path
    (:func:`ocm.shifted`).

    Args:
        num_timesteps: N, in 2 .. 1000000; t is any number in (0, N].

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000.

    Example:
        >>> import torch, ocm
        >>> ocm.flow().sigma(torch.tensor([0.0, 250.5, 1000.0]))
        tensor([0.0000, 0.2505, 1.0000], dtype=torch.float64)
    """
    check_num_timesteps(num_timesteps)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        return (num_timesteps - t) / num_timesteps, t / num_timesteps

    return Schedule("flow", num_timesteps, scales)


def edm(
    num_timesteps: int = 1000,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    data_std: float = 0.5,
) -> Schedule:
    """Return the variance-exploding path of EDM (Karras et al., 2022), x_t = x0 + sigma n.

    sigma^(1/rho) runs evenly from ``sigma_min`` at t = 1 to ``sigma_max`` at N, and sigma itself
    from 0 to ``sigma_min`` between t = 0 and 1. The network is told log(sigma) / 4.

    Args:
        num_timesteps: N, in 2 .. 1000000; t is any number in (0, N].
        sigma_min: Noise at t = 1, in the unit of the data, above 0.
        sigma_max: Noise at N, above ``sigma_min``.
        rho: The larger, the more timesteps have little noise.
        data_std: Standard deviation of the data that the network was preconditioned for.

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000, another number is not positive and
            finite, or ``sigma_max`` is not above ``sigma_min``.

    Example:
        >>> import torch, ocm
        >>> ocm.edm().sigma(torch.tensor([0.5, 1.0, 1000.0]))
        tensor([1.0000e-03, 2.0000e-03, 8.0000e+01], dtype=torch.float64)
    """
    check_num_timesteps(num_timesteps)
    _check_positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, data_std=data_std)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_max must be above sigma_min, got {sigma_max} and {sigma_min}")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        place = ((t - 1) / (num_timesteps - 1)).clamp(min=0)
        sigma = (low + place * (high - low)) ** rho
        return torch.ones_like(t), torch.where(t < 1, t * sigma_min, sigma)

    return Schedule(
        "edm",
        num_timesteps,
        scales,
        lambda t: scales(t)[1].log() / 4,
        data_std=data_std,
        options={
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "rho": rho,
            "data_std": data_std,
        },
    )


def trigflow(num_timesteps: int = 1000, data_std: float = 0.5) -> Schedule:
    """Return the path of TrigFlow (Lu and Song, 2025), x_t = cos(a) x0 + data_std sin(a) n.

    The angle is a = pi/2 t / N, which is what the network is told. x_N is noise alone.

    Args:
        num_timesteps: N, in 2 .. 1000000; t is any number in (0, N].
        data_std: Standard deviation of the data, above 0.

    Raises:
        TypeError: If ``num_timesteps`` is not an int.
        ValueError: If it lies outside 2 .. 1000000, or ``data_std`` is not positive.

    Example:
        >>> import ocm
        >>> ocm.trigflow().alpha(1000), ocm.trigflow().sigma(1000)
        (tensor(0., dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    check_num_timesteps(num_timesteps)
    _check_positive(data_std=data_std)

    def angle(t: Tensor) -> Tensor:
        return t / num_timesteps * (math.pi / 2)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        # As a sine from the noisy end, which is exactly 0 there.
        return angle(num_timesteps - t).sin(), data_std * angle(t).sin()

    return Schedule(
        "trigflow", num_timesteps, scales, angle, data_std=data_std, options={"data_std": data_std}
    )


def check_num_timesteps(num_timesteps: int) -> None:
    """Raise unless N is an int in [2, 1000000], so that tables of all timesteps stay small.

    Raises:
        TypeError: If it is no int.
        ValueError: If it lies outside.
    """
    check_positive_int("num_timesteps", num_timesteps)
    if not 2 <= num_timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_timesteps must be in [2, {MOST_TIMESTEPS}], got {num_timesteps}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "vp": vp,
    "flow": flow,
    "edm": edm,
    "trigflow": trigflow,
}


def _float64(number: float) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64, device="cpu")


def per_sample(values: float | Tensor, x: Tensor) -> Tensor:
    """Return numbers in the dtype and on the device of x, broadcast against its features.

    Args:
        values: One number, also as a tensor on the CPU; or one for each sample, of shape (B,).
        x: Shape (B, ...).

    Returns:
        Shape (1, 1, ...) for one number, (B, 1, ...) for several.

    Example:
        >>> per_sample(torch.tensor([3.0, 1.0]), torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    features = [1] * (x.dim() - 1)
    if not isinstance(values, Tensor) or values.dim() == 0:
        # Filled on the device, where a copy from the host could not be part of a CUDA graph.
        return x.new_full([1, *features], float(values))
    return values.to(x).reshape(-1, *features)


@lru_cache(maxsize=4096)
def rounded(number: float, dtype: torch.dtype) -> float:
    """Return a number as ``dtype`` holds it, a factor of tensors of that type.

    An operator takes a number with its arguments, where :func:`per_sample` fills a tensor first.

    Example:
        >>> rounded(1.001, torch.bfloat16), rounded(2.0**-150, torch.float32)
        (1.0, 0.0)
    """
    return torch.tensor(number, dtype=dtype, device="cpu").item()


def scaled(factor: float | Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Return factor * values, in the types of x and of the values, and at least in float32.

    Args:
        factor: A number, or a tensor of shape (B,).
        x: Shape (B, ...).
        values: Shape (B, ...).

    Example:
        >>> scaled(0.5, torch.zeros(1, dtype=torch.float64), torch.ones(1))
        tensor([0.5000], dtype=torch.float64)
    """
    if isinstance(factor, Tensor):
        return per_sample(factor, full_precision(x)) * values
    dtype = at_least_float32(x.dtype)
    return rounded(factor, dtype) * values.to(torch.promote_types(values.dtype, dtype))


def full_precision(values: Tensor) -> Tensor:
    """Return numbers of half precision in float32; float64 stays what it is.

    Example:
        >>> full_precision(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return values.to(at_least_float32(values.dtype))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the type of :func:`full_precision`."""
    return torch.promote_types(dtype, torch.float32)
