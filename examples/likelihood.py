"""How likely a flow model finds images, with an error for each, beside the bound of a few steps.

Trains a small flow-matching model on scikit-learn's digits for some seconds, so that nothing is
downloaded, and scores held-out digits and the same digits upside down.
``python examples/likelihood.py``
"""

import ocm
from ocm.data import digits
from ocm.training.small_unet import small_unet

images = digits()
denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.flow(), "flow_prediction")
settings = ocm.TrainingSettings(num_steps=200, learning_rate=3e-3, warmup_steps=10)
ocm.train_denoiser(denoiser, images.train, settings, progress=False)
denoiser.freeze()

# A few images choose steps, probes and draws; all others are scored with the same.
tolerance = 0.3  # bits/dim for an image
chosen = ocm.likelihood_settings(denoiser, images.test[:4], tolerance, levels=images.levels)
print(
    f"for an error of {tolerance} bits/dim: {chosen.num_steps} steps of {chosen.solver}, "
    f"{chosen.max_probes} products an evaluation, {chosen.num_draws} draws"
)

held_out = images.test[:12]
for name, some in (("digits", held_out), ("upside down", held_out.flip(2))):
    found = ocm.log_likelihood(denoiser, some, chosen, levels=images.levels)
    bound = ocm.bits_per_dim(denoiser, ocm.Beta(denoiser), some, 20, levels=images.levels)
    print(
        f"{name:12} {found.bits_per_dim.mean():.2f} bits/dim by the ODE, an image ± "
        f"{found.bits_per_dim_stderr.square().mean().sqrt():.2f};  bound of β in 20 steps "
        f"{bound.total.mean():.2f}"
    )
parts = {
    name: error if error is None else round(error.square().mean().sqrt().item(), 4)
    for name, error in found.budget.items()
}
print(f"what an image's error is made of, in bits/dim: {parts}")
