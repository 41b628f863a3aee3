"""Networks of every path and prediction type for a mixture of Gaussians, from its closed forms.

Written a second time, from the papers of each family: a network knows the time it is told and what
it is shown, finds alpha, sigma and x_t from them, and puts out what its family predicts.
"""

import math

import torch
from torch import nn

import ocm

FEATURES = 8
SHAPE = (1, 2, 4)
DATA_STD = 0.5
N = 1000


def zero_snr():
    """A discrete variance-preserving path without signal at N."""
    alpha_bar = torch.linspace(0, math.pi / 2, N + 1, dtype=torch.float64).cos() ** 2
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    betas[-1] = 1.0
    return ocm.from_betas(betas)


PATHS = {
    "linear": ocm.linear,
    "zero_snr": zero_snr,
    "vp": ocm.vp,
    "flow": ocm.flow,
    "edm": ocm.edm,
    "trigflow": ocm.trigflow,
}
WITHOUT_SIGNAL = ("zero_snr", "flow", "trigflow")


def scales(path, time):
    """alpha and sigma of the time that a network is told."""
    if path in ("linear", "zero_snr"):
        betas = torch.linspace(1e-4, 0.02, N, dtype=torch.float64)
        if path == "linear":
            log_alpha_bar = (1 - betas).log().cumsum(0)[time.long()]
            return (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        angle = (time.double() + 1) / N * math.pi / 2
        alpha = torch.where(time == N - 1, 0.0, angle.cos())
        return alpha, angle.sin()
    time = time.double()
    if path == "vp":
        u = time / (N - 1)
        log_alpha = -0.25 * u**2 * (20 - 0.1) - 0.5 * u * 0.1
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    if path == "flow":
        return 1 - time / N, time / N
    if path == "edm":
        return torch.ones_like(time), (4 * time).exp()
    # cos(pi/2) is not 0 in floating point.
    alpha = torch.where(time > 1.57079632, 0.0, time.cos())
    return alpha, DATA_STD * time.sin()


def output_of(prediction_type, x, alpha, sigma, mean):
    """What the network of a family puts out where E[x0 | x] is ``mean``."""
    noise = (x - alpha * mean) / sigma
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return mean
    if prediction_type == "v_prediction":  # on the variance-preserving path beside it
        r = (alpha**2 + sigma**2).sqrt()
        return (alpha * noise - sigma * mean) / r
    if prediction_type == "flow_prediction":
        return noise - mean
    # EDM's, for x / alpha and sigma / alpha: D = c_skip x + c_out F
    total = sigma**2 + (DATA_STD * alpha) ** 2
    c_skip, c_out = DATA_STD**2 * alpha / total, sigma * DATA_STD / total.sqrt()
    sign = 1.0 if prediction_type == "edm" else -1.0
    return sign * (mean - c_skip * x) / c_out


class Mixture:
    """sum_k w_k N(mean_k, covariance_k)."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = weights, means, covariances

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def covariance(self):
        spread = self.means - self.mean
        between = torch.einsum("k,ki,kj->ij", self.weights, spread, spread)
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + between

    def posterior(self, x, alpha, sigma):
        """Mean (B, D) and covariance (B, D, D) of x0 given x = alpha x0 + sigma n, by Bayes."""
        identity = torch.eye(x.shape[1], dtype=x.dtype)
        logs, means, covariances = [], [], []
        for w, m, C in zip(self.weights, self.means, self.covariances, strict=True):
            marginal = alpha[:, None, None] ** 2 * C + sigma[:, None, None] ** 2 * identity
            away = x - alpha[:, None] * m
            solved = torch.linalg.solve(marginal, away)
            logs.append(w.log() - 0.5 * (marginal.logdet() + (away * solved).sum(1)))
            means.append(m + alpha[:, None] * (solved @ C))
            gain = alpha[:, None, None] * torch.linalg.solve(marginal, C.expand_as(marginal))
            covariances.append(C - alpha[:, None, None] * C @ gain)
        r = torch.stack(logs).softmax(0)
        means, covariances = torch.stack(means), torch.stack(covariances)
        mean = (r[..., None] * means).sum(0)
        spread = means - mean
        between = torch.einsum("kb,kbi,kbj->bij", r, spread, spread)
        return mean, (r[..., None, None] * covariances).sum(0) + between

    def log_prob(self, x):
        laws = torch.distributions.MultivariateNormal(self.means, self.covariances)
        return (laws.log_prob(x[:, None]) + self.weights.log()).logsumexp(1)


def gaussian(scale=0.5):
    """Correlated Gaussian data."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    covariance = scale**2 * (A @ A.T / FEATURES + 0.1 * torch.eye(FEATURES, dtype=torch.float64))
    mean = 0.3 * torch.randn(1, FEATURES, generator=generator, dtype=torch.float64)
    return Mixture(torch.ones(1, dtype=torch.float64), mean, covariance[None])


def mixture():
    """Three correlated Gaussians."""
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(3, FEATURES, FEATURES, generator=generator, dtype=torch.float64)
    identity = torch.eye(FEATURES, dtype=torch.float64)
    covariances = 0.04 * (A @ A.mT / FEATURES + 0.2 * identity)
    means = 0.4 * torch.randn(3, FEATURES, generator=generator, dtype=torch.float64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances)


DATA = {"gaussian": gaussian, "mixture": mixture}


class PathNetwork(nn.Module):
    """The network of one family for the data of a mixture."""

    def __init__(self, data, path, prediction_type):
        super().__init__()
        self.data, self.path, self.prediction_type = data, path, prediction_type
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, shown, time):
        alpha, sigma = scales(self.path, time)
        x = self.features(shown).flatten(1).double()
        if self.prediction_type in ("edm", "trigflow"):  # shown c_in x
            x = x * (sigma**2 + (DATA_STD * alpha) ** 2).sqrt()[:, None]
        mean, _ = self.data.posterior(x, alpha, sigma)
        columns = alpha[:, None], sigma[:, None]
        output = output_of(self.prediction_type, x, *columns, mean)
        return (self.weight * output).to(shown.dtype).reshape(shown.shape)


ARCHITECTURE = ocm.Architecture(
    "PathNetwork", "features", lambda network, x, time, labels: network(x, time)
)


def schedule_of(path, prediction_type):
    """The path, with the unit of preconditioned networks."""
    import dataclasses

    return dataclasses.replace(PATHS[path](), data_std=DATA_STD)


def path_denoiser(data, path, prediction_type):
    """The denoiser of the data on a path."""
    return ocm.Denoiser(
        PathNetwork(data, path, prediction_type),
        schedule_of(path, prediction_type),
        prediction_type,
        ARCHITECTURE,
        data.covariance,
    ).freeze()


def combinations():
    """Every path with every prediction type that it has."""
    from ocm.diffusion.predictions import PREDICTION_TYPES

    return [
        (path, kind)
        for path in PATHS
        for kind in PREDICTION_TYPES
        if not (kind == "epsilon" and path in WITHOUT_SIGNAL)
    ]
