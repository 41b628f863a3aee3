"""Inpainting with the covariance of x0: the half of an image that was measured fills in the other.

The data are smooth random fields, whose denoiser is known in closed form, and so is the posterior
that the draws should follow; put your own ``ocm.Denoiser`` in its place. Each step takes mean and
covariance of x0 given x, corrects the mean by the measurement y = A x0 + noise, and moves on (as
TMPD and DiffPIR do). ``python examples/inverse_problem.py``
"""

import itertools

import torch
from torch import nn

import ocm

SIZE, NOISE_STD = 8, 0.05
schedule = ocm.linear()
places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
prior = 0.2 * torch.exp(-(torch.cdist(places, places) ** 2) / 8) + 1e-4 * torch.eye(SIZE**2)


class GaussianDenoiser(nn.Module):
    """Predicts x0 for data from N(0, prior)."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()
        self.register_parameter("scale", nn.Parameter(torch.ones(())))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return sqrt(alpha_bar) prior (alpha_bar prior + beta_bar I)^-1 x_t."""
        alpha_bar, beta_bar = schedule.alpha_bar[t[0]], schedule.beta_bar[t[0]]
        gain = alpha_bar.sqrt() * torch.linalg.solve(
            alpha_bar * prior + beta_bar * torch.eye(SIZE**2), prior
        )
        return (self.last(x_t).flatten(1) @ gain.to(x_t)).reshape(x_t.shape)


architecture = ocm.Architecture("GaussianDenoiser", "last", lambda net, x, t, _: net(x, t + 1))
denoiser = ocm.Denoiser(GaussianDenoiser(), schedule, "sample", architecture).freeze()


def measure(x: torch.Tensor) -> torch.Tensor:
    """Return the left half of images."""
    return x[..., : SIZE // 2]


torch.manual_seed(0)
n, shape = 100, (100, 1, SIZE, SIZE)
truth = torch.randn(1, SIZE**2).double() @ torch.linalg.cholesky(prior).T
y = measure(truth.reshape(1, 1, SIZE, SIZE))
y = (y + NOISE_STD * torch.randn(y.shape).double()).expand(n, -1, -1, -1)

# The posterior of x0 given y, in closed form.
A = measure(torch.eye(SIZE**2).double().reshape(-1, 1, SIZE, SIZE)).flatten(1).T
gain = prior @ A.T @ torch.linalg.inv(A @ prior @ A.T + NOISE_STD**2 * torch.eye(len(A)))
best = (y[:1].flatten(1) @ gain.T).reshape(1, SIZE, SIZE)
spread = (prior - gain @ A @ prior).diagonal().sqrt().reshape(1, SIZE, SIZE)

sigmas = ocm.KDiffusionDenoiser(denoiser).get_sigmas(40).double().tolist()
for name, covariance in {
    "beta, DDPM's": ocm.Beta(denoiser),
    "diagonal": ocm.Exact(denoiser),
    "full": ocm.Full(denoiser),
}.items():
    x = sigmas[0] * torch.randn(shape).double()
    for sigma, smaller in itertools.pairwise(sigmas):
        posterior = ocm.x0_given(denoiser, covariance, x, sigma, x0_range=None)
        x0 = ocm.posterior_mean_given_measurement(
            posterior.mean, posterior.covariance, y, measure, noise_std=NOISE_STD
        )
        x = x0 + smaller / sigma * (x - x0)
    error = ((x.mean(dim=0) - best) / spread).square().mean().sqrt()
    ratio = (x.std(dim=0) / spread).square().mean().sqrt()
    print(f"{name:13} mean off by {error:.2f} true spreads, spread {ratio:.2f} times the true one")
