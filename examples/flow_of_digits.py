"""
A flow model in few steps
=========================

Does a covariance help a flow-matching model, which has no noise schedule to speak of? This script
trains a small flow on handwritten digits and draws samples in six steps, along its ODE and with new
noise at every step, without and with the covariance.
"""

import functools

import matplotlib.pyplot as plt

import ocm
from ocm.data import digits
from ocm.evaluation.distances import frechet_distance
from ocm.training.small_unet import small_unet

# %%
# A flow
# ------
# ``ocm.flow()`` is the straight path x_t = (1 - σ) x0 + σ n, and the network predicts the velocity
# n - x0. At σ = 1 no signal is left, and the covariance of x0 is that of the data.

images = digits()
flow = ocm.Denoiser(
    small_unet(images.shape, width=16),
    ocm.flow(),
    "flow_prediction",
    data_covariance=images.train.var(dim=0),
)
settings = ocm.TrainingSettings(num_steps=500, learning_rate=3e-3, warmup_steps=10)
ocm.train_denoiser(flow, images.train, settings, progress=False)

# %%
# A head
# ------
# The head learns the variance of each pixel from the terms of the likelihood bound. It reads the
# features of the frozen network, so it adds no pass through it.

head = ocm.MaximumLikelihood(flow, ocm.make_head(flow), levels=images.levels)
settings = ocm.TrainingSettings(num_steps=250, learning_rate=3e-3, warmup_steps=10)
ocm.train_head(head, images.train, settings, progress=False)

# %%
# Six steps
# ---------
# Each step goes from x_t to x_s by way of a mean of x0. ``ocm.ddim`` is Euler's step of the ODE.
# ``ocm.renoised`` replaces a share of the noise by new noise; with all of it, it is the
# ``stochastic_sampling`` of diffusers. Both forget that x0 varies around its mean. The covariance
# adds that variance.

covariances = {"without": ocm.BetaTilde(flow), "with": head}
samplers = {"ODE": ocm.ddim, "new noise": functools.partial(ocm.renoised, noise=1.0)}
steps = ocm.trailing_timesteps(flow.schedule, 6)
samples = {"held-out digits": images.test[:256]}
for process, sampler in samplers.items():
    for name, covariance in covariances.items():
        samples[f"{process}, {name}"] = ocm.sample(
            flow, covariance, (256, *images.shape), steps, sampler=sampler
        )

# %%
# How wide are they?
# ------------------
# A few steps without covariance give samples that vary too little. The Fréchet distance compares
# means and covariances of the pixels with those of the training images; lower is better.

variance = images.train.var(dim=0).mean()
for name, x in samples.items():
    width = float(x.var(dim=0).mean() / variance)
    distance = frechet_distance(images.train.flatten(1), x.flatten(1))
    print(f"{name:20} variance {width:.2f} of the data's, Fréchet distance {distance:.2f}")

# %%
# The picture
# -----------
# With the covariance the samples vary more, in both processes. Where all noise is new the distance
# falls; along the ODE it hardly changes.

figure, axes = plt.subplots(5, 10, figsize=(6, 3.9))
for row, (name, x) in zip(axes, samples.items(), strict=True):
    row[0].set_title(name, fontsize=10, loc="left", pad=3)
    for axis, image in zip(row, x, strict=False):
        axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, wspace=0.05, hspace=0.45)
figure.savefig("flow_of_digits.png", dpi=150)
print("the picture is flow_of_digits.png")
