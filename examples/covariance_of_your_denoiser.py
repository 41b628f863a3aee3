"""Few-step sampling of a diffusers model with a covariance that needs no training.

Takes any UNet2DModel that predicts the noise, with the schedule of its scheduler; here one with
random weights, so that nothing is downloaded. ``python examples/covariance_of_your_denoiser.py``
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel

import hessdiag
import ocm

# unet = UNet2DModel.from_pretrained("path/to/your/model")
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
scheduler = DDPMScheduler(num_train_timesteps=1000)

denoiser = ocm.Denoiser(unet, ocm.from_scheduler(scheduler)).freeze()
covariance = ocm.Hutchinson(denoiser, num_probes=12, probes=hessdiag.Coloring(12))
images = ocm.sample(denoiser, covariance, (4, 3, 16, 16), 10)
print(f"{len(images)} images of shape {tuple(images.shape[1:])} in 10 steps")

x0 = ocm.quantise(torch.rand(2, 3, 16, 16) * 2 - 1)  # images in [-1, 1], 256 grey levels
bound = ocm.bits_per_dim(denoiser, covariance, x0, 10)
print(f"bits/dim: {bound.total.mean():.2f}")
