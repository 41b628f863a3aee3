"""Networks of points that are trained: a denoiser, and the heads of covariances on any denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mixtures.true_score import NUM_LEVELS, POINTS, hats, standardised
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule


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
        scaled = standardised(x.flatten(1), alpha_bar, self.data_std)
        level_weights = hats(level + 1, len(log_alpha_bars) - 1).to(x.dtype)
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
