"""Mixtures of Gaussians, whose score and posterior are known: ground truth for covariances.

For x0 of component i with weight w_i, x0 ~ N(mu_i, Sigma_i), and M_i = alpha_bar Sigma_i +
beta_bar I, Bayes' rule gives

    q(x_t)          = sum_i w_i N(sqrt(alpha_bar) mu_i, M_i),
    E[x0 | x_t, i]  = mu_i + sqrt(alpha_bar) Sigma_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i) =: m_i,
    Cov[x0 | x_t, i] = beta_bar Sigma_i M_i^-1 =: S_i,

and with the responsibilities r_i = q(i | x_t) and m = sum_i r_i m_i

    E[x0 | x_t] = m,    Cov[x0 | x_t] = sum_i r_i (S_i + (m_i - m)(m_i - m)^T),
    score       = -sum_i r_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i).

No term is a small difference of large ones, so all digits are there at every noise level.

The backbones here take points of shape (B, ...) with d features each, and fit :class:`ocm.Denoiser`
by :data:`POINTS`. Points are no images in [-1, 1]: sample with ``x0_range=None``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checks import check_positive_int
from hessdiag.kernels import normal
from ocm.architectures import Architecture
from ocm.denoiser import Denoiser
from ocm.schedules import Schedule, check_prediction_type

# Counter of the data's random numbers, apart from those of samplers (0 .. N) and of training.
_DATA_STEP = 2**32 - 2
# Hat functions that stand for the noise level.
NUM_LEVELS = 16


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of n Gaussians in d dimensions, float64.

    Attributes:
        means: mu_i, shape (n, d).
        covariances: Sigma_i, positive definite, shape (n, d, d).
        weights: w_i, positive with sum 1, shape (n,).

    Raises:
        ValueError: If the shapes do not fit, a covariance is not symmetric and positive definite,
            or the weights are not positive with sum 1.

    Example:
        >>> mixture = nine_gaussians()
        >>> x_t = torch.tensor([[0.0, 1.5]]).double()
        >>> from ocm.schedules import linear
        >>> mixture.posterior_covariance(x_t, 200, linear()).shape
        torch.Size([1, 2, 2])
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name in ("means", "covariances", "weights"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).double())
        n, d = self.means.shape if self.means.dim() == 2 else (0, 0)
        if self.covariances.shape != (n, d, d) or self.weights.shape != (n,) or n * d == 0:
            raise ValueError(
                "means, covariances and weights must have shapes (n, d), (n, d, d) and (n,), got "
                f"{tuple(self.means.shape)}, {tuple(self.covariances.shape)} and "
                f"{tuple(self.weights.shape)}"
            )
        total = self.weights.sum().item()
        if not (bool((self.weights > 0).all()) and math.isclose(total, 1.0, rel_tol=1e-9)):
            raise ValueError(
                f"weights must be positive with sum 1, got sum {total} and least "
                f"{self.weights.min().item()}"
            )
        symmetric = torch.allclose(self.covariances, self.covariances.mT, rtol=1e-9, atol=1e-12)
        if not symmetric or not bool((torch.linalg.eigvalsh(self.covariances) > 0).all()):
            raise ValueError("covariances must be symmetric and positive definite")

    @property
    def num_features(self) -> int:
        """Number of features d of a sample."""
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """E[x0], shape (d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Cov[x0], shape (d, d)."""
        centred = self.means - self.mean
        within = torch.einsum("i,ijk->jk", self.weights, self.covariances)
        return within + (self.weights[:, None] * centred).mT @ centred

    @property
    def std(self) -> float:
        """Square root of the mean variance, for :class:`ocm.Parameterisation`."""
        return math.sqrt(self.covariance.diagonal().mean().item())

    def sample(self, count: int, seed: int = 0, *, sample_offset: int = 0) -> Tensor:
        """Draw x0 by the random-number contract: sample i is the same in any batch.

        Args:
            count: Number of samples.
            seed: Seed.
            sample_offset: Number of the first sample.

        Returns:
            Shape (count, d), float32.

        Example:
            >>> whole = nine_gaussians().sample(6, seed=1)
            >>> torch.equal(nine_gaussians().sample(2, seed=1, sample_offset=4), whole[4:])
            True
        """
        z = normal(
            (count, self.num_features + 1), seed, step=_DATA_STEP, sample_offset=sample_offset
        ).double()
        # The distribution function of a normal number is uniform, and picks the component.
        uniform = torch.special.ndtr(z[:, 0])
        i = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=len(self.weights) - 1)
        factor = torch.linalg.cholesky(self.covariances)
        points: Tensor = self.means[i] + (factor[i] @ z[:, 1:, None])[..., 0]
        return points.float()

    def log_density(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return log q(x_t), shape (B,), float64; t = 0 is the data's own.

        Args:
            x_t: Shape (B, ...) with d features a sample.
            t: One timestep in 0 .. N, or an int64 tensor of shape (B,).
            schedule: The noise schedule.
        """
        log_density: Tensor = _Posterior.of(self, x_t, t, schedule).log_joint.logsumexp(dim=1)
        return log_density

    def score(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return the gradient of log q(x_t), float64 of the shape of x_t."""
        return -_Posterior.of(self, x_t, t, schedule).negative_score.reshape(x_t.shape)

    def posterior_mean(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return E[x0 | x_t], float64 of the shape of x_t."""
        return _Posterior.of(self, x_t, t, schedule).mean.reshape(x_t.shape)

    def posterior_covariance(self, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> Tensor:
        """Return Cov[x0 | x_t], float64 of shape (B, d, d)."""
        posterior = _Posterior.of(self, x_t, t, schedule)
        r, vectors = posterior.responsibilities, posterior.components.vectors
        # S_i = U diag(beta_bar lambda / (alpha_bar lambda + beta_bar)) U^T
        values = posterior.beta_bar[:, None, None] * posterior.components.values
        weighted = r[..., None] * values / posterior.marginal
        within = torch.einsum("njk,bnk,nlk->bjl", vectors, weighted, vectors)
        apart = posterior.component_means - posterior.mean[:, None]
        return within + torch.einsum("bn,bnj,bnk->bjk", r, apart, apart)


@dataclass(frozen=True, eq=False)
class _Components:
    """A mixture with Sigma_i = U_i diag(lambda_i) U_i^T; on a device."""

    means: Tensor
    values: Tensor
    vectors: Tensor
    log_weights: Tensor

    @staticmethod
    def of(mixture: Mixture) -> _Components:
        values, vectors = torch.linalg.eigh(mixture.covariances)
        return _Components(mixture.means, values, vectors, mixture.weights.log())


@dataclass(frozen=True, eq=False)
class _Posterior:
    """What x_t says of each component, float64.

    Attributes:
        components: The mixture.
        alpha_bar: Shape (B,) or (1,).
        beta_bar: As ``alpha_bar``.
        rotated: U_i^T (x_t - sqrt(alpha_bar) mu_i), shape (B, n, d).
        marginal: Eigenvalues of M_i, shape (B or 1, n, d).
    """

    components: _Components
    alpha_bar: Tensor
    beta_bar: Tensor
    rotated: Tensor
    marginal: Tensor

    @staticmethod
    def of(mixture: Mixture, x_t: Tensor, t: int | Tensor, schedule: Schedule) -> _Posterior:
        levels = torch.as_tensor(t).reshape(-1).cpu()
        tables = schedule.alpha_bar[levels], schedule.beta_bar[levels]
        return _Posterior.at(_Components.of(mixture), x_t, *tables)

    @staticmethod
    def at(components: _Components, x_t: Tensor, alpha_bar: Tensor, beta_bar: Tensor) -> _Posterior:
        d = components.means.shape[1]
        x = x_t.double().flatten(1)
        if x.shape[1] != d:
            raise ValueError(f"x_t must have {d} features a sample, got {tuple(x_t.shape)}")
        apart = x[:, None] - alpha_bar.sqrt()[:, None, None] * components.means
        rotated = torch.einsum("njk,bnj->bnk", components.vectors, apart)
        marginal = alpha_bar[:, None, None] * components.values + beta_bar[:, None, None]
        return _Posterior(components, alpha_bar, beta_bar, rotated, marginal)

    @cached_property
    def log_joint(self) -> Tensor:
        """Log of w_i N(x_t; sqrt(alpha_bar) mu_i, M_i), shape (B, n)."""
        exponents = self.rotated.square() / self.marginal + (2.0 * math.pi * self.marginal).log()
        return self.components.log_weights - 0.5 * exponents.sum(dim=2)

    @cached_property
    def responsibilities(self) -> Tensor:
        """Each r_i, shape (B, n)."""
        return self.log_joint.softmax(dim=1)

    @cached_property
    def negative_score(self) -> Tensor:
        """Sum of r_i M_i^-1 (x_t - sqrt(alpha_bar) mu_i), shape (B, d)."""
        solved = self.responsibilities[..., None] * self.rotated / self.marginal
        return torch.einsum("njk,bnk->bj", self.components.vectors, solved)

    @cached_property
    def component_means(self) -> Tensor:
        """Each m_i, shape (B, n, d)."""
        gain = self.alpha_bar.sqrt()[:, None, None] * self.components.values / self.marginal
        moved = torch.einsum("njk,bnk->bnj", self.components.vectors, gain * self.rotated)
        return self.components.means + moved

    @cached_property
    def mean(self) -> Tensor:
        """The mean m, shape (B, d)."""
        return (self.responsibilities[..., None] * self.component_means).sum(dim=1)


def nine_gaussians() -> Mixture:
    """Return the nine Gaussians of the paper's slides: means {-3, 0, 3}^2, standard deviation 0.1.

    A product density: its posterior covariance is diagonal.

    Example:
        >>> nine_gaussians().covariance.round(decimals=2)
        tensor([[6.0100, 0.0000],
                [0.0000, 6.0100]], dtype=torch.float64)
    """
    places = torch.tensor([-3.0, 0.0, 3.0]).double()
    covariances = 0.01 * torch.eye(2).double().expand(9, 2, 2)
    return Mixture(torch.cartesian_prod(places, places), covariances, torch.ones(9).double() / 9.0)


def correlated_mixture() -> Mixture:
    """Return three long, rotated Gaussians whose posterior covariance is far from diagonal.

    Example:
        >>> mixture = correlated_mixture()
        >>> from ocm.schedules import linear
        >>> x_t = linear().alpha_bar[200].sqrt() * mixture.means
        >>> C = mixture.posterior_covariance(x_t, 200, linear())
        >>> correlation = C[:, 0, 1] / (C[:, 0, 0] * C[:, 1, 1]).sqrt()
        >>> bool((correlation.abs() > 0.5).all())
        True
    """
    angles = torch.tensor([math.pi / 4, -math.pi / 5, math.pi / 3]).double()
    along = torch.stack([angles.cos(), angles.sin()], dim=1)
    across = torch.stack([-angles.sin(), angles.cos()], dim=1)
    spread = [std**2 * v[:, :, None] * v[:, None] for std, v in ((1.0, along), (0.2, across))]
    means = torch.tensor([[-2.0, -1.0], [1.5, 1.5], [2.0, -2.0]])
    return Mixture(means, spread[0] + spread[1], torch.tensor([0.4, 0.35, 0.25]).double())


class MixtureBackbone(nn.Module):
    """The true mean of a mixture's denoising, as a network's prediction.

    Computed in float64 and returned in the type of x. As in a trained network the features
    determine the prediction: they are x_t and the mean of x0 in units of their standard deviations,
    the mean of the noise, and :data:`NUM_LEVELS` hat functions of the noise level.

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
        self.num_features = 3 * mixture.num_features + NUM_LEVELS
        self.data_std = mixture.std
        components = _Components.of(mixture)
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
        components = _Components(
            self.means,
            *(self.get_buffer(name) for name in ("values", "vectors", "log_weights")),
        )
        posterior = _Posterior.at(components, x, alpha_bar, beta_bar)
        signal, sigma = alpha_bar.sqrt()[:, None], beta_bar.sqrt()[:, None]
        epsilon, mean = sigma * posterior.negative_score, posterior.mean
        scaled = _scaled(x.double().flatten(1), alpha_bar, self.data_std)
        level_weights = _levels(level + 1, len(self.get_buffer("log_alpha_bar")) - 1)
        features = torch.cat([scaled, mean / self.data_std, epsilon, level_weights], dim=1)
        self.features(features.to(x.dtype))
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
        self, in_features: int, out_features: int, width: int = 128, depth: int = 3
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


def _point_head(backbone: Any) -> nn.Module:
    return PointHead(backbone.num_features, backbone.out_features)


POINTS = Architecture("PointNetwork", "features", _call_points, {"simple": _point_head})


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
