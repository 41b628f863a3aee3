"""The true score of a mixture as the backbone of a denoiser.

It takes points of shape (B, ...) with d features each, and fits :class:`ocm.Denoiser` by
:data:`POINTS`, as other networks of points do. Points are no images in [-1, 1]: sample with
``x0_range=None``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixtures.mixture import Components, Mixture, Posterior
from ocm.diffusion.backbones.architecture import Architecture
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.predictions import check_prediction_type
from ocm.diffusion.schedules import Schedule

# Hat functions that stand for the noise level.
NUM_LEVELS = 16


class MixtureBackbone(nn.Module):
    """The true mean of a mixture's denoising, as a network's prediction.

    Computed in float64 and returned in the type of x. As in a trained network the features
    determine the prediction: they are x_t and the mean of x0 in units of their standard deviations,
    the mean of the noise, the responsibilities of the components, and :data:`NUM_LEVELS` hat
    functions of the noise level.

    Args:
        mixture: The data.
        schedule: The noise schedule.
        prediction_type: What is returned: "epsilon", "sample" or "v_prediction".
    """

    def __init__(self, mixture: Mixture, schedule: Schedule, prediction_type: str) -> None:
        super().__init__()
        check_prediction_type(prediction_type)
        self.prediction_type = prediction_type
        self.out_features = mixture.num_features
        self.num_features = 3 * mixture.num_features + len(mixture.means) + NUM_LEVELS
        self.data_std = mixture.std
        components = Components.of(mixture)
        # What a trained network would have in its weights.
        self.means = nn.Parameter(components.means)
        self.register_buffer("values", components.values)
        self.register_buffer("vectors", components.vectors)
        self.register_buffer("log_weights", components.log_weights)
        self.register_buffer("log_alpha_bar", schedule.log_alpha_bar)
        self.features = nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the prediction, of the shape and type of x.

        Args:
            x: x_t, shape (B, ...).
            level: t - 1, int64 of shape (B,).
        """
        log_alpha_bar = self.get_buffer("log_alpha_bar")[level + 1]
        alpha_bar, beta_bar = log_alpha_bar.exp(), -torch.expm1(log_alpha_bar)
        components = Components(
            self.means,
            *(self.get_buffer(name) for name in ("values", "vectors", "log_weights")),
        )
        posterior = Posterior.at(components, x, alpha_bar, beta_bar)
        signal, sigma = alpha_bar.sqrt()[:, None], beta_bar.sqrt()[:, None]
        epsilon, mean = sigma * posterior.negative_score, posterior.mean
        scaled = standardised(x.double().flatten(1), alpha_bar, self.data_std)
        level_weights = hats(level + 1, len(self.get_buffer("log_alpha_bar")) - 1)
        known = [scaled, mean / self.data_std, epsilon, posterior.responsibilities]
        self.features(torch.cat([*known, level_weights], dim=1).to(x.dtype))
        output = {
            "epsilon": epsilon,
            "sample": mean,
            "v_prediction": signal * epsilon - sigma * mean,
        }[self.prediction_type]
        return output.to(x.dtype).reshape(x.shape)


def _call_points(backbone: Any, x_t: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
    if labels is not None:
        raise ValueError("labels must be None: the networks of points take no class labels")
    output: Tensor = backbone(x_t, level)
    return output


POINTS = Architecture("PointNetwork", "features", _call_points)


def mixture_denoiser(
    mixture: Mixture, schedule: Schedule, prediction_type: str = "epsilon"
) -> Denoiser:
    """Return the denoiser with the true score of a mixture, frozen.

    Args:
        mixture: The data.
        schedule: The noise schedule.
        prediction_type: What its backbone predicts.

    Example:
        >>> from ocm import Exact, linear
        >>> from mixtures.mixture import nine_gaussians
        >>> denoiser = mixture_denoiser(nine_gaussians(), linear())
        >>> x_t = torch.tensor([[1.0, 0.0]]).double()
        >>> Exact(denoiser).at(denoiser.predict(x_t, 300)).diagonal().round(decimals=3)
        tensor([[2.2350, 0.8620]], dtype=torch.float64)
    """
    backbone = MixtureBackbone(mixture, schedule, prediction_type)
    return Denoiser(backbone, schedule, prediction_type, architecture=POINTS).freeze()


def standardised(x: Tensor, alpha_bar: Tensor, data_std: float) -> Tensor:
    """Return x_t over its standard deviation, sqrt(alpha_bar data_std^2 + beta_bar)."""
    return x / (alpha_bar * data_std**2 + 1.0 - alpha_bar).sqrt()[:, None]


def hats(t: Tensor, num_timesteps: int) -> Tensor:
    """Return hat functions of sqrt(t / N) around evenly spaced knots, shape (B, knots)."""
    place = (t.double() / num_timesteps).sqrt()[:, None] * (NUM_LEVELS - 1)
    knots = torch.arange(NUM_LEVELS, device=t.device)
    return (1.0 - (place - knots).abs()).clamp(min=0.0)
