"""
Samples in five steps
=====================

Why do samples get worse when a diffusion model takes only a few steps, and what does a covariance
change? This script samples points in the plane in five steps, with no covariance, with its
diagonal, and with all of it.
"""

import matplotlib.pyplot as plt
import torch

import ocm
from ocm.evaluation.distances import maximum_mean_discrepancy

# %%
# Data whose denoiser is known
# ----------------------------
# The data are two Gaussians, long, thin and aslant. For a mixture of Gaussians the denoiser has a
# closed form, so every error below comes from the small number of steps.

means = torch.tensor([[-0.6, 0.6], [0.6, -0.6]])
spread = torch.tensor([[0.5, 0.08], [0.5, -0.08]])  # x0 = mean + spread z
within = spread @ spread.T
schedule = ocm.cosine()


def denoise(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return the mean of x0 given x_t, shape (B, 2)."""
    t = int(time[0]) + 1  # networks count timesteps from 0
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    inverse = torch.linalg.inv(alpha**2 * within + sigma**2 * torch.eye(2))
    away = x_t[:, None] - alpha * means  # axes: sample, Gaussian, coordinate
    share = (-0.5 * (away @ inverse * away).sum(dim=2)).softmax(dim=1)
    mean_of_each = means + alpha * away @ inverse @ within
    return (share[..., None] * mean_of_each).sum(dim=1)


denoiser = ocm.Denoiser(denoise, schedule, "sample")

# %%
# Five steps, three covariances
# -----------------------------
# A reverse step draws x_s from a Gaussian. Its variance has two parts: the noise that the step
# adds, and the covariance of x0 given x_t, since the denoiser gives the mean of x0 only.
# ``BetaTilde`` leaves the second part out. ``Exact`` states its diagonal and ``Full`` all of it.
# Both take one product with the Jacobian for each dimension, two here. For images take
# ``Hutchinson``, ``Lanczos`` or a trained head.
#
# With ``noise_at_end=True`` the last step draws x0 too, in place of its mean.

stated = {
    "no covariance": ocm.BetaTilde(denoiser),
    "diagonal": ocm.Exact(denoiser),
    "full covariance": ocm.Full(denoiser),
}
torch.manual_seed(0)
data = means[torch.randint(2, (1000,))] + torch.randn(1000, 2) @ spread.T
points = {"data": data}
for name, covariance in stated.items():
    points[name] = ocm.sample(
        denoiser, covariance, (1000, 2), steps=5, x0_range=None, noise_at_end=True
    )
    distance = maximum_mean_discrepancy(data, points[name], bandwidth=0.3)
    print(f"{name:16} squared maximum mean discrepancy {distance:.4f}")

# %%
# The picture
# -----------
# Without the covariance the samples lie too close to the means. The diagonal gives each coordinate
# a variance, but no correlation, so thin clusters become wide. The full covariance keeps their
# shape.

figure, axes = plt.subplots(2, 2, figsize=(5, 5), sharex=True, sharey=True, layout="constrained")
for axis, (name, x) in zip(axes.flat, points.items(), strict=True):
    axis.plot(*x.T, ".", markersize=2, alpha=0.5, color="black" if name == "data" else "#006BA4")
    axis.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
figure.savefig("few_steps.png", dpi=150)
print("the picture is few_steps.png")
