"""Denoisers of Gaussians and of their mixtures that are told t itself, with their densities."""

import dataclasses
import math

import torch
from path_denoiser import DATA_STD, output_of

import ocm
from ocm.likelihoods.probability_flow import between_timesteps

# Paths whose x_N is N(0, I) times a number, but for 1e-6 or less: any data end there.
PATHS = {
    "vp": lambda: ocm.vp(beta_max=60.0),
    "linear": lambda: ocm.linear(beta_end=0.06),
    "flow": ocm.flow,
    "edm": lambda: ocm.edm(sigma_max=1e6),
    "trigflow": ocm.trigflow,
}


class Data:
    """sum_k w_k N(mean_k, covariance_k)."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = (
            torch.as_tensor(values, dtype=torch.float64) for values in (weights, means, covariances)
        )
        self.variances, self.vectors = torch.linalg.eigh(self.covariances)

    def mean(self, x, alpha, sigma):
        """E[x0 | x], by Bayes; x of shape (B, D), alpha and sigma of shape (B,)."""
        alpha, sigma = alpha[:, None], sigma[:, None]
        logs, means = [], []
        for w, m, v, Q in zip(self.weights, self.means, self.variances, self.vectors, strict=True):
            total = alpha**2 * v + sigma**2
            away = (x - alpha * m) @ Q
            logs.append(w.log() - 0.5 * (total.log() + away**2 / total).sum(1))
            means.append(m + (away * alpha * v / total) @ Q.T)
        return (torch.stack(logs).softmax(0)[..., None] * torch.stack(means)).sum(0)

    def log_prob(self, y, variance=0.0):
        """The log-density at y of data with normal noise of a variance."""
        identity = torch.eye(y.shape[1], dtype=torch.float64)
        laws = torch.distributions.MultivariateNormal(
            self.means, self.covariances + variance * identity
        )
        return (laws.log_prob(y[:, None]) + self.weights.log()).logsumexp(1)

    def pushed_forward(self, y, first, last):
        """The log-density of what a solution makes of N(0, I), for a single Gaussian.

        ``first`` and ``last`` are alpha and sigma of both ends: the solution takes one Gaussian of
        x to the other, a linear map.
        """
        (a, s), (A, S) = first, last
        m, v, Q = self.means[0], self.variances[0], self.vectors[0]
        stretch = ((A**2 * v + S**2) / (a**2 * v + s**2)).sqrt()
        r = math.hypot(A, S)
        z = (A * m @ Q + stretch * ((a * y - a * m) @ Q)) / r
        prior = torch.distributions.Normal(0.0, torch.ones((), dtype=torch.float64))
        return prior.log_prob(z).sum(1) + (stretch * a / r).log().sum()


def correlated():
    """A correlated Gaussian of three features, of a mean that is not zero."""
    covariance = [[0.5, 0.2, 0.0], [0.2, 1.2, 0.1], [0.0, 0.1, 0.05]]
    return Data([1.0], [[0.1, -0.3, 0.2]], [covariance])


def two_lumps():
    """A mixture of two correlated Gaussians in the plane."""
    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]]
    return Data([0.3, 0.7], [[-0.8, 0.5], [0.7, -0.4]], covariances)


def denoiser_of(data, schedule, prediction_type):
    """A denoiser of the data whose network is told t, between timesteps too."""
    schedule = dataclasses.replace(between_timesteps(schedule), time=lambda t: t, data_std=DATA_STD)

    def network(shown, time):
        alpha, sigma = schedule.scales(time.double())
        x = shown.flatten(1).double()
        if prediction_type in ("edm", "trigflow"):  # shown c_in x
            x = x * (sigma**2 + (DATA_STD * alpha) ** 2).sqrt()[:, None]
        columns = alpha[:, None], sigma[:, None]
        output = output_of(prediction_type, x, *columns, data.mean(x, alpha, sigma))
        return output.to(shown.dtype).reshape(shown.shape)

    return ocm.Denoiser(network, schedule, prediction_type)


def noise_variance(schedule, t):
    """(sigma / alpha)^2, of the noise in the density of y."""
    return math.exp(-schedule.log_snr(t).item())


def points(count, features, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, features, generator=generator, dtype=torch.float64)
