"""Class-conditional sampling in latent space with a covariance: :class:`OCMDiTPipeline`.

diffusers' own ``DiTPipeline`` drops the channels of the variance and hands its scheduler no
generator; ``DDPMPipeline`` needs no replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ocm.diffusion.conditions import guided
from ocm.integrations.attached import CovarianceModel
from ocm.integrations.gaussian_steps import CovarianceScheduler
from ocm.integrations.latents import decode

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class OCMDiTPipeline(DiffusionPipeline):
    """Samples of given classes, by a DiT with a covariance on the latents of an autoencoder.

    Args:
        transformer: :func:`ocm.attach` of a ``DiTTransformer2DModel``.
        vae: The ``AutoencoderKL`` of its latents.
        scheduler: An :class:`ocm.OCMScheduler` or :class:`ocm.OCMDDIMScheduler` without clipping:
            ``transformer.scheduler(...)`` of the scheduler that the transformer came with.

    Raises:
        TypeError: If the transformer or the scheduler is none of these.

    Example:
        >>> import ocm
        >>> from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
        >>> dit = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1,
        ...     in_channels=4, sample_size=4, norm_num_groups=4, num_embeds_ada_norm=10)
        >>> vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
        >>> model = ocm.attach(dit)    # then ocm.train_head(model.covariance(...), ...)
        >>> scheduler = model.scheduler(DDIMScheduler(clip_sample=False))
        >>> pipeline = ocm.OCMDiTPipeline(model, vae, scheduler)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> pipeline([1, 7], num_inference_steps=2, output_type="latent").images.shape
        torch.Size([2, 4, 4, 4])
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self, transformer: CovarianceModel, vae: AutoencoderKL, scheduler: CovarianceScheduler
    ) -> None:
        super().__init__()
        if not isinstance(transformer, CovarianceModel) or not isinstance(
            scheduler, CovarianceScheduler
        ):
            raise TypeError(
                "transformer must be ocm.attach(transformer), and scheduler its "
                "transformer.scheduler(scheduler), got "
                f"{type(transformer).__name__} and {type(scheduler).__name__}"
            )
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 10,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one image of each class label.

        Guidance of scale w combines the predictions with and without the class, and their
        variances, by the same weights 1 - w and w (:mod:`ocm.diffusion.denoiser`); a variance that
        comes out negative is taken as 0.

        Args:
            class_labels: Class of each image.
            guidance_scale: w; 1 for the plain conditional model.
            generator: Source of all noise, or one for each image; None for PyTorch's own.
            num_inference_steps: Steps, each one pass through the transformer.
            output_type: "pil", "np" (n, H, W, C) or "pt" (n, C, H, W) in [0, 1], or "latent" for
                the scaled latents.
            return_dict: Whether an ``ImagePipelineOutput`` is returned rather than a tuple.

        Raises:
            ValueError: If a label is no class, ``output_type`` is unknown, or the scheduler clips
                latents or takes another unit of variance than the model's.
        """
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}"
            )
        config, device = self.transformer.config, self._execution_device
        scheduler = self.scheduler.config
        clips = scheduler.clip_sample and scheduler.clip_sample_range <= 1.0
        if clips or scheduler.data_std != config.data_std:
            raise ValueError(
                "scheduler must not clip latents to those of images, and take the unit of the "
                f"model's variance, data_std = {config.data_std}, got clip_sample = "
                f"{scheduler.clip_sample} and data_std = {scheduler.data_std}: use "
                "transformer.scheduler(scheduler, clip_sample=False)"
            )
        labels = torch.as_tensor(class_labels).reshape(-1)
        # The label after the last class stands for none, as the model was trained.
        null = config.num_embeds_ada_norm
        if len(labels) == 0 or bool(((labels < 0) | (labels >= null)).any()):
            raise ValueError(
                f"class_labels must be classes in 0 .. {null - 1}, got {labels.tolist()}"
            )
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        labels = labels.to(device)
        is_guided = guidance_scale != 1.0
        if is_guided:
            labels = torch.cat([torch.full_like(labels, null), labels])

        latents = randn_tensor(
            shape, generator=generator, device=device, dtype=self.transformer.dtype
        )
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if is_guided else latents
            stated = self.transformer(inputs, timestep=t, class_labels=labels).sample
            if is_guided:
                stated = guided(stated, guidance_scale)
            latents = self.scheduler.step(stated, t, latents, generator=generator).prev_sample

        images = latents
        if output_type != "latent":
            images = VaeImageProcessor().postprocess(decode(self.vae, latents).float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
