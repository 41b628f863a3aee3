"""What the output of a covariance head means: a variance in units that suit the noise level.

With output o, a learned covariance states::

    Var[x0 | x_t] = c_t ratio(o),      c_t = sigma_t^2 / (alpha_t^2 + sigma_t^2 / data_std^2),

c_t the posterior variance of Gaussian data of standard deviation ``data_std``, and regresses the
ratio. ``data_std`` = infinity gives c_t = sigma^2 / alpha^2, the units of the papers, in which
an error of the head is multiplied by up to 2.5e4 towards t = N. A finite one is the
preconditioning of EDM (Karras et al., 2022) for second moments: the ratio is of order 1 at every
noise level. The ratio is 1 + o, or softplus for a variance that cannot be negative.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ocm.diffusion.schedules import (
    Schedule,
    full_precision,
    per_sample,
    scaled,
)

# softplus(o + this) is 1 at o = 0.
_SOFTPLUS_OF_ONE = math.log(math.e - 1.0)


@dataclass(frozen=True)
class Parameterisation:
    """Units and sign of a head's output.

    Attributes:
        data_std: Standard deviation of the data, or infinity for the papers' parameterisation.
        positive: Whether the ratio is softplus rather than linear.

    Raises:
        ValueError: If ``data_std`` is not positive.

    Example:
        >>> import ocm
        >>> preconditioned = ocm.Parameterisation(data_std=0.5)
        >>> schedule = ocm.linear()
        >>> scale = preconditioned.scale(schedule, 1000).item()
        >>> round(scale, 3), ocm.PAPER.scale(schedule, 1000) > 1e4
        (0.25, tensor(True))
    """

    data_std: float = math.inf
    positive: bool = False

    def __post_init__(self) -> None:
        if not self.data_std > 0:
            raise ValueError(f"data_std must be positive, got {self.data_std}")

    def scale(self, schedule: Schedule, t: float | Tensor, x: Tensor | None = None) -> Tensor:
        """Return c_t, float64; or like x, at least in float32, and broadcast to it.

        Raises:
            ValueError: If ``data_std`` is infinite and x_t holds no signal at one number t, where
                the papers' unit is infinite.
        """
        unit = torch.as_tensor(self._unit(schedule, t)[0], dtype=torch.float64)
        return unit if x is None else per_sample(unit, full_precision(x))

    def variance(
        self, schedule: Schedule, t: float | Tensor, x_t: Tensor, output: Tensor
    ) -> Tensor:
        """Return c_t ratio(o), at least in the type of x_t and in float32.

        Raises:
            ValueError: As :meth:`scale`.
        """
        return scaled(self._unit(schedule, t)[0], x_t, self.ratio(output))

    def gaussian_mean(self, schedule: Schedule, t: float | Tensor, x_t: Tensor) -> Tensor:
        """Return the posterior mean of centred Gaussian data, alpha c_t / sigma^2 x_t.

        For infinite ``data_std`` this is x_t / alpha.

        Raises:
            ValueError: As :meth:`scale`.
        """
        return scaled(self._unit(schedule, t)[1], x_t, x_t)

    def _unit(self, schedule: Schedule, t: float | Tensor) -> tuple[Any, Any]:
        """Return c_t and alpha c_t / sigma^2, numbers at one number t."""
        alpha: Any
        sigma: Any
        if isinstance(t, Tensor):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        else:
            alpha, sigma, *_ = schedule.level(t)
            if math.isinf(self.data_std) and not alpha > 0:
                raise ValueError(
                    f"data_std must be finite on a path without signal at t = {t}, got infinity: "
                    "the papers' unit sigma^2 / alpha^2 is infinite there"
                )
        size = sigma / self.data_std
        total = alpha * alpha + size * size
        return sigma * sigma / total, alpha / total

    def ratio(self, output: Tensor) -> Tensor:
        """Return 1 + o, or softplus(o + log(e - 1)), which is 1 at 0 too; at least in float32."""
        output = full_precision(output)
        return functional.softplus(output + _SOFTPLUS_OF_ONE) if self.positive else 1.0 + output

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, an infinite ``data_std`` as None."""
        return asdict(self) | {"data_std": None if math.isinf(self.data_std) else self.data_std}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Parameterisation:
        """Return the parameterisation that :meth:`to_json` wrote.

        Raises:
            ValueError: If it is none.
        """
        std, positive = record["data_std"], record["positive"]
        is_number = isinstance(std, (int, float)) and not isinstance(std, bool)
        if not (std is None or is_number) or not isinstance(positive, bool):
            raise ValueError(
                "data_std must be a number or None, and positive True or False, got "
                f"{std!r:.40} and {positive!r:.40}"
            )
        return Parameterisation(math.inf if std is None else float(std), positive)


#: The papers' :class:`ocm.Parameterisation`: ratio 1 + o in units of sigma^2 / alpha^2, which are
#: large near t = N, and infinite where x_t holds no signal. ``ocm.NPR(denoiser, head, ocm.PAPER)``
#: takes it.
PAPER = Parameterisation()

# Images in [-1, 1] have a standard deviation near 0.5 and latents one near 1; the order of
# magnitude is what matters.
#: The default :class:`ocm.Parameterisation`: a positive variance (softplus), in units that are at
#: most 1/4, the square of its ``data_std``, at every noise level. It suits images in [-1, 1] and
#: latents.
BOUNDED = Parameterisation(data_std=0.5, positive=True)
