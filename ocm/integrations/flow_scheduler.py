"""diffusers' Euler scheduler of flow matching, with the covariance that a model states.

The step from sigma_t to sigma_s, with x0_hat = x_t - sigma_t v and lambda = noise sigma_s, draws::

    x_s ~ N(a x_t + b x0_hat, lambda^2 I + b^2 Var[x0 | x_t]),
    a = sqrt(sigma_s^2 - lambda^2) / sigma_t,    b = (1 - sigma_s) - a (1 - sigma_t).

noise = 0 is Euler's step of the ODE and the spread of x0 that it leaves out; noise = 1 is
``stochastic_sampling`` of diffusers. The second moments of x_s are right for any of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.diffusion.schedules import flow, full_precision
from ocm.integrations.gaussian_steps import (
    CovarianceScheduler,
    GaussianStep,
    OCMSchedulerOutput,
    takes_arguments_of,
)
from ocm.sampling.samplers import ddpm, renoised


class OCMFlowScheduler(CovarianceScheduler, FlowMatchEulerDiscreteScheduler):
    """Steps of flow matching with the covariance that the model states.

    Sigmas, shifts and everything else are those of ``FlowMatchEulerDiscreteScheduler``, and so are
    the steps of a model without a variance, unless noise is asked for. The last step, to
    sigma = 0, returns x0_hat.

    Args:
        args: Those of ``FlowMatchEulerDiscreteScheduler``, as the keyword arguments that are not
            listed here are.
        noise: The share lambda / sigma_s of new noise, from 0, the ODE's step, to 1. None for
            DDPM's: the moments of q(x_s | x_t, x0). ``stochastic_sampling`` makes it 1.
        data_std: The unit of the model's ratio, that of its :class:`ocm.Parameterisation`; None for
            the papers', which is infinite at sigma = 1.
        noise_at_end: Whether the last step draws x0 from N(x0_hat, Var[x0 | x_t]).

    Raises:
        ValueError: If ``noise`` lies outside of [0, 1], ``data_std`` is not positive, or sigmas are
            inverted.

    Example:
        >>> import torch, ocm
        >>> scheduler = ocm.OCMFlowScheduler(noise=None, data_std=1.0)
        >>> scheduler.set_timesteps(4)
        >>> x_t = torch.zeros(1, 2)
        >>> stated = torch.cat([torch.zeros(1, 2), torch.ones(1, 2)], 1)
        >>> output = scheduler.step(stated, scheduler.timesteps[0], x_t, return_log_prob=True)
        >>> output.log_prob.shape
        torch.Size([1])
    """

    __module__ = "ocm"  # where pipelines look for it, in a process that imports ocm alone
    _compatibles = ["FlowMatchEulerDiscreteScheduler"]  # noqa: RUF012, as diffusers declares it
    _path = "flow"

    @register_to_config
    @takes_arguments_of(FlowMatchEulerDiscreteScheduler)
    def __init__(
        self,
        *args: Any,
        noise: float | None = 0.0,
        data_std: float | None = None,
        noise_at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if noise is not None and not 0.0 <= noise <= 1.0:
            raise ValueError(f"noise must lie in [0, 1] or be None, got {noise}")
        if self.config.invert_sigmas:
            raise ValueError("invert_sigmas must be False, got True: there sigma scales the data")
        self.parameterisation = Parameterisation(math.inf if data_std is None else data_std)
        self._flow = flow(self.config.num_train_timesteps)

    # Pipelines look for ``sigmas`` among its arguments.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set ``timesteps`` and ``sigmas``, as ``FlowMatchEulerDiscreteScheduler`` does."""
        self._has_warned = False
        super().set_timesteps(*args, **kwargs)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        return_log_prob: bool = False,
        prev_sample: Tensor | None = None,
    ) -> Any:
        """Draw x_s from x_t, s being the next of ``timesteps``, or the data after the last.

        Args:
            model_output: The velocity and, as further channels, the ratio of Var[x0 | x_t] to its
                unit: shape (B, 2C, ...). Shape (B, C, ...) for a model without a variance.
            timestep: One of ``timesteps``.
            sample: x_t, shape (B, C, ...).
            s_churn: Not used, as in diffusers.
            s_tmin: Not used.
            s_tmax: Not used.
            s_noise: Not used.
            generator: Source of the noise, or one for each sample; None for PyTorch's own.
            per_token_timesteps: Of models without a variance alone, in diffusers' own step.
            return_dict: Whether an output is returned rather than a tuple.
            variance_noise: Standard normal noise in place of the generator's, of the shape of
                ``sample``.
            return_log_prob: Whether ``log_prob`` is returned too: log p(x_s | x_t) in nats, shape
                (B,), at x_s as it is returned.
            prev_sample: x_s, whose ``log_prob`` is returned, and nothing drawn; the place in
                ``timesteps`` is then that of ``timestep``, and the scheduler stays where it is.

        Raises:
            ValueError: If ``timestep`` is none of ``timesteps``, shapes do not fit, there are both
                a generator and noise, or a step without noise is asked for its density.
        """
        velocity, ratio = self._split(model_output, sample)
        noise = 1.0 if self.config.stochastic_sampling else self.config.noise
        is_theirs = ratio is None and noise == float(self.config.stochastic_sampling)
        if per_token_timesteps is not None and not is_theirs:
            raise ValueError(
                "per_token_timesteps must be None for a model that states a variance, and for "
                "steps with noise"
            )
        if is_theirs and prev_sample is None and variance_noise is None and not return_log_prob:
            drawn = (
                super()
                .step(
                    model_output,
                    timestep,
                    sample,
                    generator=generator,
                    per_token_timesteps=per_token_timesteps,
                )
                .prev_sample
            )
            return OCMSchedulerOutput(drawn) if return_dict else (drawn,)

        place = self._place(timestep, moves=prev_sample is None)
        sigma_t, sigma_s = self._on_host("sigmas")[place : place + 2].double().tolist()
        N = self.config.num_train_timesteps
        path, s, t = self._flow, N * sigma_s, N * sigma_t
        step = ddpm(path, s, t) if noise is None else renoised(path, s, t, noise=noise)
        x_t, velocity = full_precision(sample), full_precision(velocity)
        x0_hat = x_t - sigma_t * velocity
        variance: Tensor | None = None
        if s > 0 or self.config.noise_at_end:
            variance = torch.full_like(x_t, step.noise_variance)
            if ratio is not None:
                unit = self._unit(t, torch.sigmoid(path.log_snr(t)).item())
                stated = unit * full_precision(ratio).clamp(min=0.0)
                variance = variance + step.mean_from_x0**2 * stated
        return self._finish(
            GaussianStep(step.mean_from_x_t * x_t + step.mean_from_x0 * x0_hat, variance, x0_hat),
            sample,
            generator,
            variance_noise,
            prev_sample,
            return_log_prob,
            return_dict,
        )

    def _place(self, timestep: float | Tensor, *, moves: bool) -> int:
        """Return the number of the step, and move on to the next one if it is taken."""
        if not moves or (self.step_index is None and self.begin_index is None):
            known, t = self._on_host("timesteps"), self._host_number(timestep)
            place = int(self.index_for_timestep(t, known))
            if not moves:
                return place
            self._step_index = place
        elif self.step_index is None:
            self._step_index = self.begin_index
        place = int(self.step_index)
        self._step_index = place + 1
        return place


# An example of a class whose __module__ is another one.
__test__ = {OCMFlowScheduler.__name__: OCMFlowScheduler}
