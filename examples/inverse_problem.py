"""Inpainting by DPS, PiGDM, TMPD and MMPS from the same covariances, and by azula's solvers.

The data are smooth random fields, whose denoiser is known in closed form, and so is the posterior
that the draws should follow; put your own ``ocm.Denoiser`` in its place. Each draw starts from
noise and takes ten steps. Where azula is installed (``pip install azula``), its solvers take the
same denoiser. ``python examples/inverse_problem.py``
"""

import itertools
import math

import torch
from torch import nn

import ocm

SIZE, NOISE_STD, DRAWS, LENGTH = 8, 0.1, 200, 1.0
TIMESTEPS = list(range(96, 961, 96))
schedule = ocm.linear()
places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
prior = 0.2 * torch.exp(-(torch.cdist(places, places) ** 2) / 8) + 1e-3 * torch.eye(SIZE**2)


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
    """Return the left half of images, as vectors."""
    return x[..., : SIZE // 2].flatten(1)


torch.manual_seed(0)
shape = (DRAWS, 1, SIZE, SIZE)
truth = (torch.randn(1, SIZE**2).double() @ torch.linalg.cholesky(prior).T).reshape(1, *shape[1:])
y = measure(truth)
y = (y + NOISE_STD * torch.randn(y.shape)).expand(DRAWS, -1)

# The posterior of x0 given y, in closed form.
A = measure(torch.eye(SIZE**2).double().reshape(-1, 1, SIZE, SIZE)).T
gain = prior @ A.T @ torch.linalg.inv(A @ prior @ A.T + NOISE_STD**2 * torch.eye(len(A)))
best, spread = y[0] @ gain.T, (prior - gain @ A @ prior).diagonal().sqrt()


def show(name: str, x: torch.Tensor) -> None:
    """Print how far mean and spread of draws are from the posterior's."""
    error = ((x.flatten(1).mean(0) - best) / spread).square().mean().sqrt()
    ratio = (x.flatten(1).std(0) / spread).square().mean().sqrt()
    print(f"{name:36} mean off by {error:5.2f} true spreads, spread {ratio:.2f} times the true one")


# C of x0_hat + C A^T u, and what weighs the misfit in u. A network's C would be ocm.Lanczos, with
# tolerance=None and max_iterations=1: its errors make the solution worse than one iteration.
C = ocm.Full(denoiser)
for name, options in {
    "DPS": {"weighting": LENGTH, "draw_x0": False},
    "PiGDM": {"weighting": ocm.Beta(denoiser), "draw_x0": False},
    "TMPD": {"weighting": "row_sums", "draw_x0": False},
    "MMPS": {"draw_x0": False},
    "MMPS, x0 drawn given x_t and y": {},
}.items():
    problem = {"noise_std": NOISE_STD, "shape": shape, "steps": TIMESTEPS, "x0_range": None}
    x = ocm.sample_given_measurement(
        denoiser, C, y, measure, dtype=torch.float64, **problem, **options
    )
    show(f"ocm    {name}", x)

try:
    import azula.denoise
    from azula import guidance, sample
    from azula.linalg.covariance import IsotropicCovariance
except ImportError:
    raise SystemExit("azula is not installed: its solvers are left out") from None


class ForAzula(azula.denoise.Denoiser):
    """The denoiser as azula calls one."""

    def schedule(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma."""
        return schedule.alpha(t.item()), schedule.sigma(t.item())

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> azula.denoise.DiracPosterior:
        """Return x0_hat, differentiable for x_t."""
        output = denoiser.output(x_t, int(t))
        return azula.denoise.DiracPosterior(denoiser.x0_hat(x_t, int(t), output))


def back(y: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-inverse of the measurement."""
    half = y.reshape(-1, 1, SIZE, SIZE // 2)
    return torch.cat([half, 0 * half], dim=-1)


plain, noise = ForAzula(), IsotropicCovariance(torch.tensor(NOISE_STD**2).double())
solvers = {
    # It divides by the norm of the whole batch.
    "DPS": guidance.DPSSampler(plain, y, measure, LENGTH * math.sqrt(DRAWS), silent=True),
    "PiGDM": guidance.PGDMSampler(plain, y, measure, back, eta=1.0, silent=True),
    "TMPD": sample.DDPMSampler(guidance.TMPDenoiser(plain, y, measure, NOISE_STD**2)),
    "MMPS, 1 iteration, its default": sample.DDPMSampler(
        guidance.MMPSDenoiser(plain, y, measure, noise)
    ),
    "MMPS, 32 iterations": sample.DDPMSampler(
        guidance.MMPSDenoiser(plain, y, measure, noise, solver="cg", iterations=32)
    ),
}
levels = torch.tensor([0, *TIMESTEPS]).flip(0)
for name, solver in solvers.items():
    x = torch.randn(shape, dtype=torch.float64)
    for t, s in itertools.pairwise(levels):
        x = solver.step(x, t, s)
    show(f"azula  {name}", x)
