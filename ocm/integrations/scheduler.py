"""A diffusers scheduler whose steps use the covariance that a model states beside its prediction.

:class:`OCMScheduler` is a drop-in for ``DDPMScheduler`` and ``DDIMScheduler`` and takes models with
twice the channels of x_t, such as :func:`ocm.attach` makes: the prediction, and the ratio of
Var[x0 | x_t] to the unit of :class:`ocm.Parameterisation`. diffusers counts noise levels from 0,
so that its timestep t - 1 is level t of :class:`ocm.Schedule`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401, see below
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.operators import variance_bound
from ocm.diffusion.checks import check_positive_int
from ocm.diffusion.from_diffusers import from_scheduler
from ocm.diffusion.predictions import check_prediction_type, coefficients
from ocm.diffusion.schedules import Schedule
from ocm.diffusion.timesteps import even_timesteps
from ocm.sampling.samplers import ddim

_INHERITED = inspect.signature(DDPMScheduler.__init__).parameters
_SPACINGS = ("even", "leading", "linspace", "trailing")


# Pipelines load a scheduler only from a module in which the name SchedulerMixin stands.
class OCMScheduler(DDPMScheduler):
    """DDPM and DDIM steps with the covariance that the model states.

    A step from t to s draws x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Var[x0 | x_t]), with the
    coefficients of :func:`ocm.ddim`, of which eta = 1 is DDPM. x0_hat is clipped as the
    configuration says and the variance to what such data allow; the step to x_0 adds no noise.
    A model without a variance takes the step with Var[x0 | x_t] = 0, which is DDPM's beta_tilde,
    and a warning.

    Args:
        num_train_timesteps: Noise levels N of the model.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: Course of the betas, by the names of ``DDPMScheduler``.
        trained_betas: The betas themselves, in place of the three above.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_sample: Whether x0_hat is clipped; off for latents.
        clip_sample_range: To -range .. range.
        eta: 1 for DDPM, 0 for DDIM whose only noise is that of the covariance.
        data_std: The unit of the model's ratio, that of its
            :class:`ocm.Parameterisation`; None for the papers'.
        timestep_spacing: "even", from N down to 1 as :func:`ocm.even_timesteps`, or "leading",
            "linspace" or "trailing" as in diffusers.
        steps_offset: Added to the timesteps of "leading".
        max_last_noise: Largest standard deviation of the last noisy step
            (:func:`ocm.sampling.samplers.last_step_noise`); None for no bound.
        rescale_betas_zero_snr: Must be False: without signal at N there is no x0_hat from noise.
        thresholding: Must be False.

    Raises:
        ValueError: If an argument is none of those above.

    Example:
        >>> scheduler = OCMScheduler(num_train_timesteps=1000)
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps
        tensor([999, 749, 499, 250,   0])
        >>> x_t, prediction, ratio = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
        >>> scheduler.step(torch.cat([prediction, ratio], 1), 0, x_t).prev_sample
        tensor([[0., 0.]])
    """

    _compatibles = ["DDPMScheduler", "DDIMScheduler"]  # noqa: RUF012, as diffusers declares it
    timesteps: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | np.ndarray[Any, Any] | Tensor | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        eta: float = 1.0,
        data_std: float | None = None,
        timestep_spacing: str = "even",
        steps_offset: int = 0,
        max_last_noise: float | None = None,
        rescale_betas_zero_snr: bool = False,
        thresholding: bool = False,
    ) -> None:
        check_prediction_type(prediction_type)
        if timestep_spacing not in _SPACINGS:
            raise ValueError(
                f"timestep_spacing must be one of {', '.join(_SPACINGS)}, got {timestep_spacing!r}"
            )
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {clip_sample_range}")
        if max_last_noise is not None and not max_last_noise >= 0:
            raise ValueError(f"max_last_noise must be at least 0, got {max_last_noise}")
        if thresholding:
            raise ValueError(
                "thresholding must be False: the covariance is that of an x0_hat that is at most "
                "clipped; use clip_sample"
            )
        self.parameterisation = Parameterisation(math.inf if data_std is None else data_std)
        config = {name: value for name, value in self.config.items() if name in _INHERITED}
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64).tolist()
            config |= {"trained_betas": betas, "num_train_timesteps": len(betas)}
        self.schedule: Schedule = from_scheduler(config)
        super().__init__(**config)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Set ``timesteps``, decreasing, int64 and on ``device``, before sampling.

        Args:
            num_inference_steps: Number of steps.
            device: Where ``timesteps`` will be.
            timesteps: The timesteps themselves, in place of their number: decreasing, in 0 .. N-1.

        Raises:
            TypeError: If ``num_inference_steps`` is no int.
            ValueError: If both or neither of the two are given, or they do not fit N.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "one of num_inference_steps and timesteps must be given, got "
                f"{num_inference_steps} and {timesteps}"
            )
        N = self.schedule.num_timesteps
        if timesteps is not None:
            levels = [int(level) for level in timesteps]
        else:
            check_positive_int("num_inference_steps", num_inference_steps)
            assert num_inference_steps is not None
            if num_inference_steps > N:
                raise ValueError(
                    f"num_inference_steps must be at most num_train_timesteps = {N}, got "
                    f"{num_inference_steps}"
                )
            levels = [t - 1 for t in reversed(even_timesteps(self.schedule, num_inference_steps))]
            if self.config.timestep_spacing != "even":
                super().set_timesteps(num_inference_steps)
                levels = self.timesteps.tolist()
        falls = all(low < high for high, low in itertools.pairwise(levels))
        if not levels or not falls or levels[0] >= N or levels[-1] < 0:
            raise ValueError(f"timesteps must decrease from at most {N - 1} to 0, got {levels}")
        self.num_inference_steps, self.custom_timesteps = len(levels), timesteps is not None
        self.timesteps = torch.tensor(levels, dtype=torch.int64, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_s from x_t, s being the next of ``timesteps``, or the data after the last.

        Args:
            model_output: The prediction and, as further channels, the ratio of Var[x0 | x_t] to
                its unit: shape (B, 2C, ...). Shape (B, C, ...) for a model without a variance.
            timestep: One of ``timesteps``.
            sample: x_t, shape (B, C, ...).
            generator: Source of the noise, or one for each sample; None for PyTorch's own.
            return_dict: Whether diffusers' ``DDPMSchedulerOutput`` is returned rather than a tuple.
            variance_noise: Standard normal noise in place of the generator's, of the shape of
                ``sample``.

        Raises:
            ValueError: If ``timestep`` is none of ``timesteps``, shapes do not fit, or there are
                both a generator and noise.
        """
        if variance_noise is not None and (
            generator is not None or variance_noise.shape != sample.shape
        ):
            raise ValueError(
                f"variance_noise must have the shape of sample, {tuple(sample.shape)}, and no "
                f"generator beside it, got {tuple(variance_noise.shape)} and {generator}"
            )
        s, t, is_last_noise = self._levels(timestep)
        prediction, ratio = self._split(model_output, sample)
        step = ddim(self.schedule, s, t, eta=self.config.eta)
        p, q, _ = coefficients(
            self.config.prediction_type, self.schedule.alpha(t), self.schedule.sigma(t)
        )
        # Not by hessdiag.kernels.gaussian_step, which makes its own noise: here it is the
        # generator's, x0_hat is returned too, and guidance may differentiate it.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x_t = sample.to(dtype)
        x0_hat = p * x_t + q * prediction.to(dtype)
        variance = self.parameterisation.scale(self.schedule, t).item() * ratio.to(dtype)
        variance = variance.clamp(min=0.0)
        if self.config.clip_sample:
            limit = self.config.clip_sample_range
            x0_hat = x0_hat.clamp(-limit, limit)
            variance = variance.clamp(max=variance_bound((-limit, limit)))
        x_s = step.mean_from_x_t * x_t + step.mean_from_x0 * x0_hat
        if s > 0:
            noise_variance = step.noise_variance + step.mean_from_x0**2 * variance
            if self.config.max_last_noise is not None and is_last_noise:
                noise_variance = noise_variance.clamp(max=self.config.max_last_noise**2)
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            x_s = x_s + noise_variance.sqrt() * variance_noise
        x_s, x0_hat = x_s.to(sample.dtype), x0_hat.to(sample.dtype)
        return DDPMSchedulerOutput(x_s, x0_hat) if return_dict else (x_s, x0_hat)

    def _levels(self, timestep: int | Tensor) -> tuple[int, int, bool]:
        """Return s and t, counted from 1 with 0 for data, and whether s is the last above 0."""
        levels = self.timesteps.tolist()
        level = torch.as_tensor(timestep).squeeze().tolist()
        if level not in levels:
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, {levels[:3]} ... {levels[-1]}, got "
                f"{level}"
            )
        place = levels.index(level)
        s = levels[place + 1] + 1 if place + 1 < len(levels) else 0
        return s, levels[place] + 1, place + 2 == len(levels)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and the ratio, zero for a model without a variance."""
        channels = sample.shape[1]
        if model_output.shape == sample.shape:
            warnings.warn(
                f"model_output has the {channels} channels of the sample and states no variance: "
                "the steps take beta_tilde, DDPM's smaller one. ocm.attach(model) gives a model "
                "one, and ocm.OCMDiTPipeline keeps that of a DiT",
                UserWarning,
                stacklevel=3,
            )
            return model_output, torch.zeros_like(model_output)
        if model_output.shape != (len(sample), 2 * channels, *sample.shape[2:]):
            raise ValueError(
                "model_output must have the shape of sample or twice its channels, got "
                f"{tuple(model_output.shape)} for {tuple(sample.shape)}"
            )
        return model_output[:, :channels], model_output[:, channels:]
