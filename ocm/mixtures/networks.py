"""Networks of points: the true score of a mixture, one to be trained, and heads on either.

They take points of shape (B, ...) with d features each, and fit :class:`ocm.Denoiser` by
:data:`POINTS`. Points are no images in [-1, 1]: sample with ``x0_range=None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ocm.diffusion.architectures import Architecture
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule, check_prediction_type
from ocm.mixtures.mixture import Components, Mixture, Posterior

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
        scaled = _scaled(x.double().flatten(1), alpha_bar, self.data_std)
        level_weights = _levels(level + 1, len(self.get_buffer("log_alpha_bar")) - 1)
        known = [scaled, mean / self.data_std, epsilon, posterior.responsibilities]
        self.features(torch.cat([*known, level_weights], dim=1).to(x.dtype))
        output = {
            "epsilon": epsilon,
            "sample": mean,
            "v_prediction": signal * epsilon - sigma * mean,
        }[self.prediction_type]
        return output.to(x.dtype).reshape(x.shape)


class PointNetwork(nn.Module):
    """A small network of the interface of :class:`MixtureBackbone`, to be trained.

    Args:
        out_features: d.
        schedule: The noise schedule.
        data_std: Standard deviation of the data, in whose units the network sees x_t.
        width: Channels of the hidden layers.
        depth: Number of hidden layers.
    """

    def __init__(
        self,
        out_features: int,
        schedule: Schedule,
        data_std: float,
        width: int = 128,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.out_features, self.num_features = out_features, width + NUM_LEVELS
        self.data_std = data_std
        self.register_buffer("log_alpha_bar", schedule.log_alpha_bar)
        self.hidden = _hidden_layers(out_features + NUM_LEVELS, width, depth)
        self.features = nn.Identity()
        self.out = _LevelwiseLinear(width, out_features)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the prediction, of the shape and type of x; the arguments are the backbone's."""
        log_alpha_bars = self.get_buffer("log_alpha_bar")
        alpha_bar = log_alpha_bars[level + 1].exp().to(x.dtype)
        scaled = _scaled(x.flatten(1), alpha_bar, self.data_std)
        level_weights = _levels(level + 1, len(log_alpha_bars) - 1).to(x.dtype)
        hidden = self.hidden(torch.cat([scaled, level_weights], dim=1))
        output: Tensor = self.out(self.features(torch.cat([hidden, level_weights], dim=1)))
        return output.reshape(x.shape)


class PointHead(nn.Module):
    """A covariance head for points: hidden layers with SiLU, and an output that starts at zero.

    The last layer has weights of its own for each of :data:`NUM_LEVELS` noise levels, and
    interpolates: as Adam scales the gradient of each weight by itself, a level of large residuals
    does not slow down another one of small residuals.

    Args:
        in_features: Features of the backbone, the last of them the levels.
        out_features: d.
        width: Channels of the hidden layers.
        depth: Number of hidden layers.

    Example:
        >>> PointHead(22, 2)(torch.randn(5, 22)).abs().max().item()
        0.0
    """

    def __init__(
        self, in_features: int, out_features: int, width: int = 64, depth: int = 2
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "width": width,
            "depth": depth,
        }
        self.hidden = _hidden_layers(in_features, width, depth)
        self.out = _LevelwiseLinear(width, out_features)
        nn.init.zeros_(self.out.linear.weight)
        nn.init.zeros_(self.out.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return o, shape (B, d), from features of shape (B, in_features)."""
        hidden = self.hidden(features)
        o: Tensor = self.out(torch.cat([hidden, features[:, -NUM_LEVELS:]], dim=1))
        return o


class _LevelwiseLinear(nn.Module):
    """A linear layer for each noise level, interpolated by the last :data:`NUM_LEVELS` inputs."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features * NUM_LEVELS)

    def forward(self, entered: Tensor) -> Tensor:
        hidden, level_weights = entered[:, :-NUM_LEVELS], entered[:, -NUM_LEVELS:]
        outputs = self.linear(hidden).reshape(len(entered), -1, NUM_LEVELS)
        interpolated: Tensor = (outputs @ level_weights[..., None])[..., 0]
        return interpolated


def _call_points(backbone: Any, x_t: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
    if labels is not None:
        raise ValueError("labels must be None: the networks of points take no class labels")
    output: Tensor = backbone(x_t, level)
    return output


POINTS = Architecture("PointNetwork", "features", _call_points)


def point_head(denoiser: Denoiser, *, seed: int = 0) -> PointHead:
    """Return an untrained head that fits a denoiser of points, on its device.

    Args:
        denoiser: Whose features the head reads.
        seed: Seed of the weights that do not start at zero; the global generator stays as it was.
    """
    backbone = denoiser.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PointHead(backbone.num_features, backbone.out_features).to(denoiser.device)


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
        >>> from ocm.mixtures import nine_gaussians
        >>> denoiser = mixture_denoiser(nine_gaussians(), linear())
        >>> x_t = torch.tensor([[1.0, 0.0]]).double()
        >>> Exact(denoiser).at(denoiser.predict(x_t, 300)).diagonal().round(decimals=3)
        tensor([[2.2350, 0.8620]], dtype=torch.float64)
    """
    backbone = MixtureBackbone(mixture, schedule, prediction_type)
    return Denoiser(backbone, schedule, prediction_type, architecture=POINTS).freeze()


def point_denoiser(
    num_features: int,
    schedule: Schedule,
    data_std: float,
    prediction_type: str = "epsilon",
    *,
    width: int = 128,
    depth: int = 3,
    seed: int = 0,
) -> Denoiser:
    """Return an untrained denoiser of points, for :func:`ocm.train_denoiser`.

    Args:
        num_features: d.
        schedule: The noise schedule.
        data_std: Standard deviation of the data (:attr:`Mixture.std`).
        prediction_type: What it learns to predict.
        width: Channels of the hidden layers.
        depth: Number of hidden layers.
        seed: Seed of the weights; the global generator stays as it was.

    Raises:
        TypeError: If a number of features or layers is not an int.
        ValueError: If it is below 1, or the standard deviation is not positive.

    Example:
        >>> from ocm import linear
        >>> point_denoiser(2, linear(), 2.0).predict(torch.randn(5, 2), 10).features.shape
        torch.Size([5, 144])
    """
    for name, number in (("num_features", num_features), ("width", width), ("depth", depth)):
        check_positive_int(name, number)
    if not data_std > 0:
        raise ValueError(f"data_std must be positive, got {data_std}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PointNetwork(num_features, schedule, data_std, width, depth)
    return Denoiser(network, schedule, prediction_type, architecture=POINTS)


def _hidden_layers(in_features: int, width: int, depth: int) -> nn.Sequential:
    sizes: Sequence[int] = [in_features, *[width] * depth]
    layers: list[nn.Module] = []
    for first, second in pairwise(sizes):
        layers += [nn.Linear(first, second), nn.SiLU()]
    return nn.Sequential(*layers)


def _scaled(x: Tensor, alpha_bar: Tensor, data_std: float) -> Tensor:
    """Return x_t over its standard deviation, sqrt(alpha_bar data_std^2 + beta_bar)."""
    return x / (alpha_bar * data_std**2 + 1.0 - alpha_bar).sqrt()[:, None]


def _levels(t: Tensor, num_timesteps: int) -> Tensor:
    """Return hat functions of sqrt(t / N) around evenly spaced knots, shape (B, knots)."""
    place = (t.double() / num_timesteps).sqrt()[:, None] * (NUM_LEVELS - 1)
    knots = torch.arange(NUM_LEVELS, device=t.device)
    return (1.0 - (place - knots).abs()).clamp(min=0.0)
