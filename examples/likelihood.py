"""
How likely are these images?
============================

How likely does a flow model find an image, and how exact is that number? This script scores digits
and the same digits upside down by the ODE of the flow, with an error bar for each image, and by the
bound of a chain of few steps.
"""

import matplotlib.pyplot as plt

import ocm
from ocm.data import digits
from ocm.training.small_unet import small_unet

plt.style.use("tableau-colorblind10")

# %%
# A flow
# ------
# A small flow-matching model, trained on scikit-learn's digits for some seconds.

images = digits()
denoiser = ocm.Denoiser(small_unet(images.shape, width=8), ocm.flow(), "flow_prediction")
settings = ocm.TrainingSettings(num_steps=200, learning_rate=3e-3, warmup_steps=10)
ocm.train_denoiser(denoiser, images.train, settings, progress=False)

# %%
# Say how exact it shall be
# -------------------------
# The error has three parts: the steps of the solver, the random probes of the divergence, and the
# noise within a grey level. A few images choose how much work each part needs. Then every image is
# scored with the same settings.

tolerance = 0.3  # bits/dim for an image
chosen = ocm.likelihood_settings(denoiser, images.test[:4], tolerance, levels=images.levels)
print(
    f"{chosen.num_steps} steps of {chosen.solver}, {chosen.max_probes} products an evaluation, "
    f"{chosen.num_draws} draws"
)

# %%
# Score
# -----
# ``log_likelihood`` follows the ODE of the model, which needs no covariance. ``bits_per_dim`` is an
# upper bound, by a chain of steps and a covariance; with DDPM's β it is far from tight.

held_out = images.test[:12]
scores = {}
for name, some in {"digits": held_out, "upside down": held_out.flip(2)}.items():
    scores[name] = ocm.log_likelihood(denoiser, some, chosen, levels=images.levels)
    bound = ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), some, 20, levels=images.levels)
    print(
        f"{name:12} {scores[name].bits_per_dim.mean():.2f} bits/dim by the ODE, "
        f"bound of β in 20 steps {bound.total.mean():.2f}"
    )
for part, error in scores["digits"].budget.items():
    print(f"error by {part}: {error.square().mean().sqrt():.4f} bits/dim")

# %%
# The picture
# -----------
# Each image beside itself upside down. Most are found less likely, by more than their error bars.

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for (name, found), marker in zip(scores.items(), "os", strict=True):
    axis.errorbar(
        range(1, 13),
        found.bits_per_dim,
        2 * found.bits_per_dim_stderr,
        fmt=marker,
        markersize=4,
        capsize=2,
        label=name,
    )
axis.set(xlabel="image", ylabel="bits/dim, ± 2 standard errors", xticks=range(1, 13))
axis.legend()
figure.savefig("likelihood.png", dpi=150)
print("the picture is likelihood.png")
