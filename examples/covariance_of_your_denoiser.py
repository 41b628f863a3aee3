"""
A covariance for your denoiser, without training
================================================

You have a diffusers model, and want to know the variance of the clean image behind a noisy one. How
many products with the Jacobian does that take? This script compares estimates from 12 products with
the exact variance, and uses them to score images in ten steps.
"""

import warnings

import matplotlib.pyplot as plt
from diffusers import DDPMScheduler

import hessdiag
import ocm
from ocm.data import digits
from ocm.training.small_unet import small_unet

# %%
# A model
# -------
# Any model of diffusers will do, with the schedule of its scheduler. Here a small U-Net is trained
# on scikit-learn's digits for some seconds, so that nothing is downloaded.

images = digits()
unet = small_unet(images.shape, width=16)  # UNet2DModel.from_pretrained("path/to/your/model")
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
denoiser = ocm.Denoiser(
    unet, ocm.from_scheduler(scheduler), ocm.prediction_type_of(scheduler)
).freeze()
settings = ocm.TrainingSettings(num_steps=300, learning_rate=4e-3, warmup_steps=10)
ocm.train_denoiser(denoiser, images.train, settings, progress=False)

# %%
# Three covariances
# -----------------
# The covariance of x0 given x_t is a multiple of the Jacobian of the denoised image. ``Exact``
# takes one product for each pixel, 64 here and thousands for larger images. ``Hutchinson`` takes as
# many as you say, with any probes. Colored probes keep neighbouring pixels from disturbing each
# other.
#
# A network errs, and so does its Jacobian. Some variances come out negative, most of them at pixels
# that are black in nearly every digit. They are raised to a small floor, with a warning that is
# silenced here.

warnings.filterwarnings("ignore", message=".*not positive")
covariances = {
    "exact": ocm.Exact(denoiser),
    "12 colored probes": ocm.Hutchinson(denoiser, 12, probes=hessdiag.Coloring(12)),
    "12 random probes": ocm.Hutchinson(denoiser, 12),
}
maps = {
    name: ocm.uncertainty(denoiser, 300, covariance=covariance, image=images.test[:4])
    for name, covariance in covariances.items()
}
for name, found in maps.items():
    error = (found.std - maps["exact"].std).norm() / maps["exact"].std.norm()
    print(f"{name:18} relative error {error:.3f}")

# %%
# What it is for
# --------------
# Samplers, likelihoods and inverse problems take any covariance. This is a bound on the negative
# log-likelihood in ten steps, in bits/dim; lower is better. ``Beta`` is the variance of DDPM.
# ``Exact`` is left out: it has no floor, and a variance near zero costs the bound much.
# ``ocm.calibrate`` makes any covariance fit for likelihoods, by two numbers a timestep.

scored = {"β": ocm.Beta(denoiser), **covariances}
del scored["exact"]
for name, covariance in scored.items():
    bits = ocm.bits_per_dim(denoiser, covariance, images.test[:16], 10, levels=images.levels)
    print(f"{name:18} {bits.total.mean():.2f} bits/dim")

# %%
# The picture
# -----------

figure, axes = plt.subplots(4, 4, figsize=(5.5, 5.3), layout="constrained")
for row, k in zip(axes, range(4), strict=True):
    row[0].imshow(maps["exact"].x_t[k, 0], cmap="gray")
    for axis, found in zip(row[1:], maps.values(), strict=True):
        shown = axis.imshow(found.std[k, 0], cmap="inferno", vmin=0, vmax=0.5)
for axis, title in zip(axes[0], ("noisy image", *maps), strict=True):
    axis.set_title(title, fontsize=9)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes, location="bottom", shrink=0.7, label="standard deviation of x0")
figure.savefig("covariance_of_your_denoiser.png", dpi=150)
print("the picture is covariance_of_your_denoiser.png")
