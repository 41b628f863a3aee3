"""A denoiser as k-diffusion's samplers call it.

For example::

    model = ocm.KDiffusionDenoiser(denoiser)
    images = k_diffusion.sampling.sample_heun(model, x, model.get_sigmas(20))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ocm.diffusion.checks import check_positive_int, check_range
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser
from ocm.sampling.any_sigma import mean_of_x0, sigmas


@dataclass(frozen=True, eq=False)
class KDiffusionDenoiser:
    """A denoiser as k-diffusion's samplers call it: ``model(x, sigma)`` returns x0_hat.

    Attributes:
        denoiser: The denoiser.
        x0_range: Where x0_hat is clipped to; None as k-diffusion has it.

    Raises:
        TypeError: If the range is no pair.
        ValueError: If it is not in order; by a call, if sigma lies outside the schedule.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> model = ocm.KDiffusionDenoiser(denoiser)
        >>> model(torch.ones(1, 1, 2, 2), sigma=1.0)    # x / (1 + sigma^2)
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
        >>> model.get_sigmas(3).shape
        torch.Size([4])
    """

    denoiser: Denoiser
    x0_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_range("x0_range", self.x0_range)

    @property
    def sigma_min(self) -> float:
        """The smallest sigma of the schedule."""
        return self._sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        """The largest that is finite, with which sampling starts, from x = sigma_max n."""
        return self._sigmas[-1].item()

    @property
    def _sigmas(self) -> Tensor:
        levels = sigmas(self.denoiser.schedule)
        return levels[levels.isfinite()]

    def get_sigmas(self, n: int) -> Tensor:
        """Return n decreasing sigmas, evenly spaced in t and interpolated in log sigma, and 0.

        Raises:
            TypeError: If n is no int.
            ValueError: If it is not positive.
        """
        check_positive_int("n", n)
        logs = self._sigmas.log()
        places = torch.linspace(len(logs) - 1, 0, n, dtype=torch.float64)
        low, high = logs[places.floor().long()], logs[places.ceil().long()]
        interpolated = torch.lerp(low, high, places.frac()).exp()
        return torch.cat([interpolated, interpolated.new_zeros(1)]).to(self.denoiser.device).float()

    def __call__(
        self, x: Tensor, sigma: float | Tensor, *, condition: Condition | None = None
    ) -> Tensor:
        """Return x0_hat given x = x0 + sigma n, differentiable in x.

        Args:
            x: Shape (B, ...).
            sigma: A number, or a tensor of shape (B,).
            condition: Class labels and guidance (:meth:`ocm.Denoiser.condition`): k-diffusion's
                samplers take ``extra_args={"condition": condition}``.

        Raises:
            ValueError: As :func:`ocm.x0_given`.
        """
        mean = mean_of_x0(self.denoiser, x, sigma, condition=condition)
        return mean if self.x0_range is None else mean.clamp(*self.x0_range)
