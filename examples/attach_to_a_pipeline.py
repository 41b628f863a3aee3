"""A covariance for a diffusers pipeline: attach a head, train it, sample in a few steps, save.

Takes any DDPMPipeline; here one of a U-Net with random weights, so that nothing is downloaded, and
a few training steps on noise. ``python examples/attach_to_a_pipeline.py``
"""

import tempfile

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import ocm

# pipeline = DDPMPipeline.from_pretrained("path/to/your/pipeline")
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
pipeline = DDPMPipeline(unet, DDPMScheduler())

model = ocm.attach(pipeline.unet, parameterisation=ocm.Parameterisation(data_std=0.5))

images = torch.rand(64, 3, 16, 16) * 2 - 1  # your training images, in [-1, 1]
settings = ocm.TrainingSettings(num_steps=5, batch_size=8)  # 10,000 and more for a real model
ocm.train_head(model.covariance(pipeline.scheduler), images, settings, progress=False)

pipeline = DDPMPipeline(model, model.scheduler(pipeline.scheduler))
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
pictures = pipeline(4, generator, num_inference_steps=10).images
print(f"{len(pictures)} pictures of {pictures[0].size} in 10 steps")

with tempfile.TemporaryDirectory() as directory:
    pipeline.save_pretrained(directory)
    loaded = DDPMPipeline.from_pretrained(directory)
print(f"loaded again: {type(loaded.unet).__name__} with {type(loaded.scheduler).__name__}")
