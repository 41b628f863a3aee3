"""
Train a head
============

How well does a trained head know the variance of x0 given x_t? On data whose posterior has a closed
form you can see. This script trains a denoiser and two heads on it, and compares them with the true
variance.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import ocm

plt.style.use("tableau-colorblind10")

# %%
# Data and denoiser
# -----------------
# The data are two Gaussians in the plane, at (-0.5, 0) and (0.5, 0). The denoiser is a small
# network of our own. So an ``Architecture`` says how to call it, and which layer the features enter
# that a head reads.

STD = 0.15


def points(count: int, seed: int) -> torch.Tensor:
    """Return points of the two Gaussians, shape (count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(2, (count,), generator=generator) - 0.5
    x = STD * torch.randn(count, 2, generator=generator)
    x[:, 0] += side
    return x


class Network(nn.Module):
    """Predicts v of x_t, given the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()
        )
        self.last = nn.Linear(64, 2)

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the prediction, shape (B, 2)."""
        return self.last(self.hidden(torch.cat([x_t, time[:, None] / 250 - 2], dim=1)))


torch.manual_seed(0)
x0 = points(20_000, seed=0)
architecture = ocm.Architecture("Network", "last", lambda net, x, time, labels: net(x, time))
denoiser = ocm.Denoiser(Network(), ocm.cosine(), "v_prediction", architecture)
settings = ocm.TrainingSettings(num_steps=2000, batch_size=512, learning_rate=5e-3)
ocm.train_denoiser(denoiser, x0, settings, progress=False)

# %%
# Two heads
# ---------
# A head is a small network on the features of the frozen denoiser. ``OptimalCovarianceMatching``
# regresses the diagonal of the denoiser's Jacobian, by one random product for each point. ``NPR``
# regresses the squared errors of the denoiser on the data. For the U-Nets and transformers of
# diffusers, ``ocm.make_head(denoiser)`` makes a head that fits.


def head() -> nn.Module:
    """Return a head that starts at zero."""
    last = nn.Linear(64, 2)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), last)


heads = {
    "optimal covariance matching": ocm.OptimalCovarianceMatching(denoiser, head()),
    "squared errors (NPR)": ocm.NPR(denoiser, head()),
}
settings = ocm.TrainingSettings(num_steps=1000, batch_size=512, learning_rate=3e-3)
for covariance in heads.values():
    ocm.train_head(covariance, x0, settings, progress=False)

# %%
# The true variance
# -----------------
# Given x_t, each Gaussian has a posterior mean and variance. Between the two it is unsure which one
# the point comes from, and that adds the variance of the two means.


def true_variance(x_t: torch.Tensor, t: int) -> torch.Tensor:
    """Return the variance of the first coordinate of x0 given that of x_t, shape (B,)."""
    alpha, sigma = float(denoiser.schedule.alpha(t)), float(denoiser.schedule.sigma(t))
    total = alpha**2 * STD**2 + sigma**2
    centres = torch.tensor([-0.5, 0.5])
    away = x_t[:, None] - alpha * centres
    share = (-(away**2) / (2 * total)).softmax(dim=1)
    mean = centres + alpha * STD**2 / total * away
    between = (share * mean**2).sum(dim=1) - (share * mean).sum(dim=1) ** 2
    return sigma**2 * STD**2 / total + between


# %%
# The picture
# -----------
# The variance of the first coordinate, along a line through both Gaussians. The exact diagonal of
# the network's Jacobian is what the first head learns, with the errors that the network has. The
# second head sees the data, and not the Jacobian.

line = torch.linspace(-1.2, 1.2, 121)
x_t = torch.stack([line, torch.zeros(121)], dim=1)
stated = {"exact diagonal of the Jacobian": ocm.Exact(denoiser), **heads}
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
for axis, t in zip(axes, (300, 600), strict=True):
    truth = true_variance(line, t)
    axis.plot(line, truth, color="black", linewidth=3, alpha=0.4, label="true variance")
    for (name, covariance), style in zip(stated.items(), (":", "-", "--"), strict=True):
        with torch.no_grad():
            variance = covariance.at(denoiser.predict(x_t, t)).diagonal()[:, 0]
        axis.plot(line, variance, style, label=name)
        error = float((variance - truth).abs().mean() / truth.mean())
        print(f"t = {t}, {name}: mean error {error:.1%} of the variance")
    axis.set(title=f"t = {t}", xlabel="first coordinate of x_t", ylim=(0, None))
axes[0].set_ylabel("variance of x0")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
figure.savefig("train_a_head.png", dpi=150)
print("the picture is train_a_head.png")
