"""
A head inside a diffusers pipeline
==================================

You sample with a diffusers pipeline. How do you add a covariance without leaving it? This script
attaches a head to the model of a ``DDPMPipeline``, trains it, samples in ten steps, and saves a
pipeline that ``from_pretrained`` reads.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import ocm
from ocm.data import digits
from ocm.training.small_unet import small_unet

# %%
# A pipeline
# ----------
# Here it holds a small U-Net that is trained on scikit-learn's digits for some seconds, so that
# nothing is downloaded. Yours comes from ``DDPMPipeline.from_pretrained("path/to/your/pipeline")``.

images = digits()
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
plain = DDPMPipeline(small_unet(images.shape, width=16), scheduler)
settings = ocm.TrainingSettings(num_steps=250, learning_rate=3e-3, warmup_steps=10)
denoiser = ocm.Denoiser(plain.unet, ocm.from_scheduler(scheduler), "v_prediction")
ocm.train_denoiser(denoiser, images.train, settings, progress=False)

# %%
# Attach a head and train it
# --------------------------
# ``attach`` returns a model with one output more for each channel, from the same pass through the
# network. ``covariance`` is what is trained: your images in [-1, 1], and 10,000 steps or more for a
# real model. ``scheduler`` returns a scheduler of the same kind that reads the new outputs.

model = ocm.attach(plain.unet)
ocm.train_head(model.covariance(scheduler), images.train, settings, progress=False)
with_head = DDPMPipeline(model, model.scheduler(scheduler))

# %%
# Sample in few steps
# -------------------
# The pipeline is called as before.

pictures = {}
for name, pipeline in {"DDPM's variance": plain, "the head's variance": with_head}.items():
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures[name] = pipeline(10, generator, num_inference_steps=10, output_type="np").images

# %%
# Save and load
# -------------

with tempfile.TemporaryDirectory() as directory:
    with_head.save_pretrained(directory)
    loaded = DDPMPipeline.from_pretrained(directory)
print(f"loaded again: {type(loaded.unet).__name__} with {type(loaded.scheduler).__name__}")

# %%
# The picture
# -----------

figure, axes = plt.subplots(2, 10, figsize=(6, 1.7))
for row, (name, samples) in zip(axes, pictures.items(), strict=True):
    row[0].set_title(f"{name}, 10 steps", fontsize=10, loc="left", pad=3)
    for axis, image in zip(row, samples, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.86, wspace=0.05, hspace=0.4)
figure.savefig("attach_to_a_pipeline.png", dpi=150)
print("the picture is attach_to_a_pipeline.png")
