"""
Where is a denoiser unsure?
===========================

Which pixels of a denoised image can you rely on, and can you rely on the map that says so? This
script draws the standard deviation of every pixel beside the true error, checks on held-out images
whether the two agree, and calibrates the map.
"""

import warnings

import matplotlib.pyplot as plt
from diffusers import DDPMPipeline, DDPMScheduler

import hessdiag
import ocm
from ocm.data import digits
from ocm.evaluation.maps import reliability
from ocm.training.small_unet import small_unet

plt.style.use("tableau-colorblind10")

# %%
# A pipeline
# ----------
# Any pipeline of diffusers will do. Here it holds a small U-Net that is trained on scikit-learn's
# digits for some seconds, so that nothing is downloaded.

images = digits()
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
pipeline = DDPMPipeline(small_unet(images.shape, width=16), scheduler)
denoiser = ocm.Denoiser(pipeline.unet, ocm.from_scheduler(scheduler), "v_prediction")
settings = ocm.TrainingSettings(num_steps=200, learning_rate=3e-3, warmup_steps=10)
ocm.train_denoiser(denoiser, images.train, settings, progress=False)

# %%
# A map
# -----
# ``ocm.uncertainty`` adds noise to images, up to timestep 400 here, and returns the mean and the
# standard deviation of each clean pixel given the noisy image. The variance comes from 48 colored
# products with the Jacobian, or from a trained head if the model has one.

T = 400
held_out = images.test[:48]
found = ocm.uncertainty(pipeline, T, image=held_out[:4])
columns = {
    "noisy": found.x_t,
    "mean": found.mean,
    "std": found.std,
    "|error|": (found.x0 - found.mean).abs(),
}
figure, axes = plt.subplots(4, 4, figsize=(5.2, 5.4), layout="constrained")
for column, (title, values) in zip(axes.T, columns.items(), strict=True):
    column[0].set_title(title)
    look = {"cmap": "gray"} if title in ("noisy", "mean") else {"cmap": "inferno", "vmin": 0}
    if title in ("std", "|error|"):
        look["vmax"] = 0.8
    for axis, image in zip(column, values, strict=True):
        shown = axis.imshow(image[0], **look)
        axis.set(xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[:, 2:], location="bottom", label="std of x0, and error")
figure.savefig("uncertainty_map.png", dpi=150)
print("the map is uncertainty_map.png")

# %%
# Can it be believed?
# -------------------
# ``reliability`` sorts the pixels of held-out images into bins by what the map says, and compares
# that with the errors. The mean of (error / std)² should be one. A map assumes that the denoiser
# gives the true mean, and a network does not quite. ``calibrate`` fits two numbers for each noise
# level, a factor and a constant, to some training images. Where an inexact network states a
# negative variance, a small floor takes its place; the warning about that is silenced here.

warnings.filterwarnings("ignore", message=".*not positive")
coloring = ocm.Hutchinson(denoiser, 48, probes=hessdiag.Coloring(48))
calibrated = ocm.calibrate(denoiser, coloring, images.train[:100], [T])
rows = {
    "plain": reliability(pipeline, held_out, [T], batch_size=48)[0],
    "calibrated": reliability(calibrated, held_out, [T], batch_size=48)[0],
}
figure, axis = plt.subplots(figsize=(4.2, 3.8), layout="constrained")
for (name, row), marker in zip(rows.items(), "os", strict=True):
    print(f"{name:10}  mean of (error / std)² is {row.standardised_error.mean:.2f}")
    axis.plot(row.predicted, row.observed, marker=marker, label=name)
axis.axline((0.1, 0.1), slope=1, color="black", linewidth=1, label="right")
axis.set(xlabel="stated standard deviation", ylabel="root mean square error")
axis.legend()
figure.savefig("uncertainty_calibration.png", dpi=150)
print("the comparison is uncertainty_calibration.png")
