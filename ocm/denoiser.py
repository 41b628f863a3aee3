"""A diffusion backbone with its schedule: what it predicts about x0 given x_t.

The score is -epsilon / sqrt(beta_bar) and the posterior mean of x0 is

    x0_hat = (x_t - sqrt(beta_bar_t) epsilon) / sqrt(alpha_bar_t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ocm.schedules import Schedule, per_sample

if TYPE_CHECKING:
    from diffusers import UNet2DModel


class Prediction(NamedTuple):
    """What one pass through the backbone gives.

    Attributes:
        epsilon: The predicted noise, of the shape of x_t.
        features: The input of the backbone's last output layer, shape (B, channels, ...).
    """

    epsilon: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A diffusers ``UNet2DModel`` that predicts the noise, and the schedule it was trained with.

    The backbone is used as it is: put it in eval mode and freeze it with :meth:`freeze` before
    sampling, scoring or training a head.

    Attributes:
        unet: Called as ``unet(x_t, t - 1).sample``: diffusers counts noise levels from 0.
        schedule: The noise schedule.
        feature_layer: Name of the submodule whose input are the features that a head reads: the
            normalisation before the backbone's last layer.
    """

    unet: UNet2DModel
    schedule: Schedule
    feature_layer: str = "conv_norm_out"

    def __post_init__(self) -> None:
        channels = self.unet.config.in_channels, self.unet.config.out_channels
        if channels[0] != channels[1]:
            raise ValueError(
                "unet must predict the noise of every input channel and nothing else, got "
                f"in_channels = {channels[0]}, out_channels = {channels[1]}"
            )
        try:
            self.unet.get_submodule(self.feature_layer)
        except AttributeError:
            raise ValueError(
                f"feature_layer must name a submodule of unet, got {self.feature_layer!r}"
            ) from None

    def freeze(self) -> Denoiser:
        """Put the backbone in eval mode, switch off its gradients, and return the denoiser."""
        self.unet.eval().requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the backbone's parameters."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    def epsilon(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Return the predicted noise.

        Args:
            x_t: Shape (B, C, H, W).
            t: One timestep in 1 .. N, or an int64 tensor of shape (B,).

        Raises:
            ValueError: If a timestep lies outside 1 .. N (not checked for a tensor on a GPU,
                which would have to be waited for).
        """
        if not isinstance(t, (int, Tensor)):
            raise TypeError(f"t must be an int or an int64 tensor, got {type(t).__name__}")
        if isinstance(t, int):
            self._check_timesteps(t, t)
            # Filled on the device, where a copy from the host could not be part of a CUDA graph.
            t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        elif t.device.type == "cpu":
            self._check_timesteps(int(t.min()), int(t.max()))
        output: Tensor = self.unet(x_t, t - 1).sample
        return output

    def _check_timesteps(self, lowest: int, highest: int) -> None:
        if not 1 <= lowest <= highest <= self.schedule.num_timesteps:
            raise ValueError(
                f"t must lie in 1 .. {self.schedule.num_timesteps}, got {lowest} .. {highest}"
            )

    def predict(self, x_t: Tensor, t: int | Tensor) -> Prediction:
        """Return the predicted noise and the features of one pass through the backbone."""
        captured: list[Tensor] = []

        def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])

        layer = self.unet.get_submodule(self.feature_layer)
        hook = layer.register_forward_pre_hook(capture)
        try:
            epsilon = self.epsilon(x_t, t)
        finally:
            hook.remove()
        return Prediction(epsilon, captured[0].detach())

    def x0_hat(self, x_t: Tensor, t: int, epsilon: Tensor) -> Tensor:
        """Return the mean of x0 given x_t, which is not clipped."""
        p, q = self.schedule.x0_from_epsilon(t)
        return p * x_t + q * epsilon

    def scaled_score(self, t: int) -> Callable[[Tensor], Tensor]:
        """Return the function x_t -> beta_bar score = -sqrt(beta_bar_t) epsilon(x_t, t).

        The diagonal of its Jacobian is the dimensionless h = beta_bar diag H, at least -1 for a
        true score.
        """

        def function(x_t: Tensor) -> Tensor:
            return -per_sample(self.schedule.beta_bar.sqrt(), t, x_t) * self.epsilon(x_t, t)

        return function
