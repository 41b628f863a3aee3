"""What the output of a covariance head means: a variance in units that suit the noise level.

With output o, a learned covariance states

    Var[x0 | x_t] = c_t ratio(o),      c_t = beta_bar_t / (alpha_bar_t + beta_bar_t / data_std^2),

c_t the posterior variance of Gaussian data of standard deviation ``data_std``, and regresses the
ratio. ``data_std`` = infinity gives c_t = beta_bar / alpha_bar, the units of the papers, in which
an error of the head is multiplied by up to 2.5e4 towards t = N. A finite one is the
preconditioning of EDM (Karras et al., 2022) for second moments: the ratio is of order 1 at every
noise level. The ratio is 1 + o, or softplus for a variance that cannot be negative.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from ocm.diffusion.schedules import Schedule, full_precision, per_sample

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
        >>> from ocm.diffusion.schedules import linear
        >>> preconditioned = Parameterisation(data_std=0.5)
        >>> round(preconditioned.scale(linear(), 1000).item(), 3), PAPER.scale(linear(), 1000) > 1e4
        (0.25, tensor(True))
    """

    data_std: float = math.inf
    positive: bool = False

    def __post_init__(self) -> None:
        if not self.data_std > 0:
            raise ValueError(f"data_std must be positive, got {self.data_std}")

    def scale(self, schedule: Schedule, t: int | Tensor, x: Tensor | None = None) -> Tensor:
        """Return c_t, float64; or like x, at least in float32, and broadcast to it."""
        table = schedule.beta_bar / (schedule.alpha_bar + schedule.beta_bar / self.data_std**2)
        return table[t] if x is None else per_sample(table, t, full_precision(x))

    def amplification(self, schedule: Schedule, t: int | Tensor) -> Tensor:
        """Return (beta_bar / alpha_bar) / c_t, by which errors of epsilon^2 are multiplied."""
        return 1.0 + schedule.beta_bar[t] / (schedule.alpha_bar[t] * self.data_std**2)

    def gaussian_mean(self, schedule: Schedule, t: int | Tensor, x_t: Tensor) -> Tensor:
        """Return the posterior mean of centred Gaussian data, sqrt(alpha_bar) c_t / beta_bar x_t.

        For infinite ``data_std`` this is x_t / sqrt(alpha_bar).
        """
        table = schedule.alpha_bar.sqrt() / (
            schedule.alpha_bar + schedule.beta_bar / self.data_std**2
        )
        return per_sample(table, t, full_precision(x_t)) * x_t

    def ratio(self, output: Tensor) -> Tensor:
        """Return 1 + o, or softplus(o + log(e - 1)), which is 1 at 0 too; at least in float32."""
        output = full_precision(output)
        return functional.softplus(output + _SOFTPLUS_OF_ONE) if self.positive else 1.0 + output

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, an infinite ``data_std`` as None."""
        return asdict(self) | {"data_std": None if math.isinf(self.data_std) else self.data_std}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Parameterisation:
        """Return the parameterisation that :meth:`to_json` wrote."""
        std = record["data_std"]
        return Parameterisation(math.inf if std is None else float(std), bool(record["positive"]))


PAPER = Parameterisation()
