"""
Fill in half of an image
========================

You measured the left half of an image. What is the right half, and how sure can you be? This script
draws answers by DPS, PiGDM, TMPD and MMPS, which differ only in the covariance and how they use it,
and compares them with the true posterior.
"""

import matplotlib.pyplot as plt
import torch

import ocm

plt.style.use("tableau-colorblind10")

# %%
# Images whose posterior is known
# -------------------------------
# The images are smooth Gaussian fields of 8 by 8 pixels. Their denoiser has a closed form, so what
# differs below is the method alone. Put your own ``ocm.Denoiser`` in its place.

SIZE, NOISE_STD, DRAWS = 8, 0.1, 200
places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
prior = 0.2 * torch.exp(-(torch.cdist(places, places) ** 2) / 8) + 1e-3 * torch.eye(SIZE**2)
schedule = ocm.linear()


def denoise(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return the mean of x0 given x_t, for data from N(0, prior)."""
    t = int(time[0]) + 1  # networks count timesteps from 0
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    gain = alpha * torch.linalg.solve(alpha**2 * prior + sigma**2 * torch.eye(SIZE**2), prior)
    return (x_t.flatten(1) @ gain.to(x_t)).reshape(x_t.shape)


denoiser = ocm.Denoiser(denoise, schedule, "sample")

# %%
# A measurement
# -------------
# ``measure`` may be any linear function. Here the posterior of x0 given the measurement has a
# closed form.


def measure(x: torch.Tensor) -> torch.Tensor:
    """Return the left half of images, as vectors."""
    return x[..., : SIZE // 2].flatten(1)


torch.manual_seed(0)
truth = torch.randn(1, SIZE**2).double() @ torch.linalg.cholesky(prior).T
truth = truth.reshape(1, 1, SIZE, SIZE)
y = measure(truth)
y = (y + NOISE_STD * torch.randn(y.shape)).expand(DRAWS, -1)

A = measure(torch.eye(SIZE**2).double().reshape(-1, 1, SIZE, SIZE)).T
gain = prior @ A.T @ torch.linalg.inv(A @ prior @ A.T + NOISE_STD**2 * torch.eye(len(A)))
best, spread = y[0] @ gain.T, (prior - gain @ A @ prior).diagonal().sqrt()

# %%
# Five ways to draw
# -----------------
# Each draw starts from noise and takes ten steps. ``covariance`` says how x0 varies given x_t, and
# ``weighting`` how the misfit to the measurement is weighed; without it the covariance weighs it
# too. The last method also draws x0 from its posterior given x_t and y, so the spread of the draws
# is right. For a network, whose Jacobian has errors, take ``ocm.Lanczos`` with ``tolerance=None``
# and ``max_iterations=1``.

methods = {
    "DPS": {"weighting": 1.0, "draw_x0": False},
    "PiGDM": {"weighting": ocm.Beta(denoiser), "draw_x0": False},
    "TMPD": {"weighting": "row_sums", "draw_x0": False},
    "MMPS": {"draw_x0": False},
    "MMPS, x0 drawn": {},
}
rows = {"truth": (truth.flatten(), 0 * spread), "true posterior": (best, spread)}
for name, options in methods.items():
    x = ocm.sample_given_measurement(
        denoiser,
        ocm.Full(denoiser),
        y,
        measure,
        noise_std=NOISE_STD,
        shape=(DRAWS, 1, SIZE, SIZE),
        steps=list(range(96, 961, 96)),
        x0_range=None,
        dtype=torch.float64,
        **options,
    ).flatten(1)
    rows[name] = x.mean(dim=0), x.std(dim=0)
    error = ((x.mean(dim=0) - best) / spread).square().mean().sqrt()
    ratio = (x.std(dim=0) / spread).square().mean().sqrt()
    print(f"{name:15} mean off by {error:.2f} true spreads, spread {ratio:.2f} times the true one")

# %%
# The picture
# -----------
# Mean and spread of the draws of each method. The left half was measured.

figure, axes = plt.subplots(2, 7, figsize=(8.4, 2.9), layout="constrained")
for column, (name, (mean, std)) in zip(axes.T, rows.items(), strict=True):
    means = column[0].imshow(mean.reshape(SIZE, SIZE), cmap="gray", vmin=-1, vmax=1)
    stds = column[1].imshow(std.reshape(SIZE, SIZE), cmap="inferno", vmin=0, vmax=0.5)
    column[0].set_title(name.replace(", ", ",\n").replace("true ", "true\n"), fontsize=10)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(means, ax=axes[0], label="mean")
figure.colorbar(stds, ax=axes[1], label="spread")
figure.savefig("inverse_problem.png", dpi=150)
print("the picture is inverse_problem.png")
