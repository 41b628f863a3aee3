"""diffusers' DDPM and DDIM schedulers, with the covariance that a model states.

:class:`OCMScheduler` is a ``DDPMScheduler`` and :class:`OCMDDIMScheduler` a ``DDIMScheduler``: of
a model whose output has the channels of x_t they take diffusers' own steps. A model with twice the
channels, such as :func:`ocm.attach` makes, states the prediction and the ratio of Var[x0 | x_t] to
the unit of :class:`ocm.Parameterisation`. Both parents draw x_s = a x_t + b x0 + lambda z with x0
replaced by its mean x0_hat; the spread of x0 adds b^2 Var[x0 | x_t] to the variance::

    x_s ~ N(mean of the parent, lambda^2 I + b^2 Var[x0 | x_t]).

As in the parents, a step to the data adds noise in ``OCMScheduler``, unless it is from timestep 0,
and none in ``OCMDDIMScheduler``, unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.covariances.operators import variance_bound
from ocm.diffusion.predictions import check_prediction_type
from ocm.diffusion.schedules import full_precision
from ocm.integrations.gaussian_steps import (
    CovarianceScheduler,
    GaussianStep,
    OCMSchedulerOutput,
    takes_arguments_of,
)

# Values of variance_type with which further channels are the variance of I-DDPM.
LEARNED = ("learned", "learned_range")


class _BetaScheduler(CovarianceScheduler):
    """What DDPM and DDIM have in common."""

    _compatibles = ["DDPMScheduler", "DDIMScheduler"]  # noqa: RUF012, as diffusers declares it
    _path = "betas"
    _other_levels = (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_flow_sigmas",
        "use_lu_lambdas",
    )
    alphas_cumprod: Tensor

    def _check(self, data_std: float | None, max_last_noise: float | None) -> None:
        check_prediction_type(self.config.prediction_type)
        if max_last_noise is not None and not max_last_noise >= 0:
            raise ValueError(f"max_last_noise must be at least 0, got {max_last_noise}")
        self.parameterisation = Parameterisation(math.inf if data_std is None else data_std)

    def _alpha_bar(self, t: int) -> float:
        """Return alpha_bar at t, and refuse predictions that say nothing there."""
        alpha_bar = self._on_host("alphas_cumprod")[t].item()
        if alpha_bar == 0.0 and self.config.prediction_type == "epsilon":
            raise ValueError(
                f"prediction_type must be 'v_prediction' or 'sample' at timestep {t}, where "
                "rescale_betas_zero_snr=True leaves no signal: x0 does not follow from 'epsilon'"
            )
        return alpha_bar

    def _variance(
        self, ratio: Tensor, t: int, s: int, b_squared: float, noise_variance: float
    ) -> Tensor | None:
        """Return lambda^2 + b^2 Var[x0 | x_t] within what clipped data allow; None for no noise."""
        if t == 0:
            return None
        config, limit = self.config, math.inf
        if config.thresholding or config.clip_sample:
            limit = 1.0 if config.thresholding else config.clip_sample_range
        variance = self._unit(t, self._alpha_bar(t)) * full_precision(ratio)
        total = noise_variance + b_squared * variance.clamp(0.0, variance_bound((-limit, limit)))
        if config.max_last_noise is not None and s <= config.steps_offset:
            total = total.clamp(max=config.max_last_noise**2)
        return total


class OCMScheduler(_BetaScheduler, DDPMScheduler):
    """DDPM steps with the covariance that the model states.

    mean and lambda^2 are those of ``DDPMScheduler`` with variance_type "fixed_small" (Ho, Jain and
    Abbeel, 2020), b = sqrt(alpha_bar_s) beta(s, t) / beta_bar_t, and s is the next of
    ``timesteps``. Where x0_hat is clipped or thresholded, Var[x0 | x_t] is bounded by what such
    data allow. With variance_type "learned" or "learned_range" further channels mean what they
    mean to diffusers.

    Args:
        args: Those of ``DDPMScheduler``, as the keyword arguments that are not listed here are;
            timestep_spacing may also be "even", from N - 1 down to 0.
        data_std: The unit of the model's ratio, that of its :class:`ocm.Parameterisation`; None
            for the papers'.
        max_last_noise: Largest standard deviation of the noise in steps to the data or to the
            first timestep, ``steps_offset`` (:func:`ocm.sampling.samplers.last_step_noise`); None
            for no bound.

    Raises:
        ValueError: If the prediction type is unknown, ``data_std`` is not positive, or
            ``max_last_noise`` is negative.

    Example:
        >>> import torch, ocm
        >>> scheduler = ocm.OCMScheduler()
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps
        tensor([800, 600, 400, 200,   0])
        >>> x_t, prediction, ratio = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
        >>> stated = torch.cat([prediction, ratio], 1)
        >>> scheduler.step(stated, 200, x_t, return_log_prob=True).log_prob.shape
        torch.Size([1])
    """

    __module__ = "ocm"  # where pipelines look for it, in a process that imports ocm alone
    # The table of alpha_bar, and numbers of steps that were made of it.
    _made: tuple[Tensor, dict[tuple[int, int, int], tuple[float, ...]]] | None = None

    @register_to_config
    @takes_arguments_of(DDPMScheduler)
    def __init__(
        self,
        *args: Any,
        data_std: float | None = None,
        max_last_noise: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check(data_std, max_last_noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set ``timesteps``, as ``DDPMScheduler`` does, or evenly from N - 1 down to 0.

        Args:
            num_inference_steps: Number of steps.
            device: Where ``timesteps`` will be.
            timesteps: The timesteps themselves, in place of their number.
        """
        self._has_warned = False
        even = self.config.timestep_spacing == "even"
        if num_inference_steps is None or timesteps is not None or not even:
            super().set_timesteps(num_inference_steps, device, timesteps)
            return
        N = self.config.num_train_timesteps
        levels = torch.linspace(N, 1, num_inference_steps, dtype=torch.float64).round() - 1
        super().set_timesteps(None, device, levels.long().tolist())
        self.num_inference_steps, self.custom_timesteps = num_inference_steps, False

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """Return the timestep after this one, -1 after the last, as ``DDPMScheduler`` does.

        Raises:
            ValueError: If ``timestep`` is none of those that were set.
        """
        t = int(self._host_number(timestep))
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        known: list[int] = self._on_host("timesteps").tolist()
        if t not in known:
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, {known[:3]} ... {known[-1]}, got {t}"
            )
        return [*known, -1][known.index(t) + 1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: Tensor | None = None,
        return_log_prob: bool = False,
        prev_sample: Tensor | None = None,
    ) -> Any:
        """Draw x_s from x_t, s being the next of ``timesteps``, or the data after the last.

        Args:
            model_output: The prediction and, as further channels, the ratio of Var[x0 | x_t] to
                its unit: shape (B, 2C, ...). Shape (B, C, ...) for a model without a variance.
            timestep: One of ``timesteps``.
            sample: x_t, shape (B, C, ...).
            generator: Source of the noise, or one for each sample; None for PyTorch's own.
            return_dict: Whether an output with ``prev_sample`` and ``pred_original_sample`` is
                returned rather than a tuple.
            variance_noise: Standard normal noise in place of the generator's, of the shape of
                ``sample``.
            return_log_prob: Whether ``log_prob`` is returned too: log p(x_s | x_t) in nats, shape
                (B,), at x_s as it is returned.
            prev_sample: x_s, whose ``log_prob`` is returned, and nothing drawn.

        Raises:
            ValueError: If ``timestep`` is none of ``timesteps``, shapes do not fit, there are both
                a generator and noise, a step without noise is asked for its density, or epsilon is
                predicted where there is no signal.
        """
        t = int(self._host_number(timestep))
        self._alpha_bar(t)
        if self.variance_type in LEARNED:
            prediction, ratio = model_output[:, : sample.shape[1]], None
        else:
            prediction, ratio = self._split(model_output, sample)
        if ratio is None and variance_noise is None and prev_sample is None:
            output = super().step(model_output, t, sample, generator)
            if return_log_prob:
                drawn = output.prev_sample.detach()
                again = self.step(model_output, t, sample, prev_sample=drawn)
                output = OCMSchedulerOutput(**output, log_prob=again.log_prob)
            return output if return_dict else output.to_tuple()
        s = self.previous_timestep(t)
        signal, noise, a, b, b_squared, small = self._numbers(t, s)
        x_t = full_precision(sample)
        x0_hat = self._x0_hat(full_precision(prediction), x_t, signal, noise)
        if ratio is not None:
            variance = self._variance(ratio, t, s, b_squared, small)
        else:
            learned = model_output[:, sample.shape[1] :]
            variance = self._parents_variance(t, full_precision(learned))
        return self._finish(
            GaussianStep(a * x_t + b * x0_hat, variance, x0_hat),
            sample,
            generator,
            variance_noise,
            prev_sample,
            return_log_prob,
            return_dict,
        )

    # The arithmetic of these three is diffusers', float32 tables included: with other tables the
    # steps of a model whose variance is 0 would not be diffusers' at many steps.
    def _numbers(self, t: int, s: int) -> tuple[float, ...]:
        """Return sqrt(alpha_bar_t) and sqrt(beta_bar_t), a, b, b^2 and lambda^2, made once."""
        table = self._on_host("alphas_cumprod")
        if self._made is None or self._made[0] is not table or table.is_inference():
            self._made = table, {}
        place = t, s, 0 if table.is_inference() else table._version
        if place not in self._made[1]:
            alpha_bar_t, alpha_bar_s = table[t], table[s] if s >= 0 else self.one
            alpha, beta_bar = alpha_bar_t / alpha_bar_s, 1 - alpha_bar_t
            a = alpha**0.5 * (1 - alpha_bar_s) / beta_bar
            b = alpha_bar_s**0.5 * (1 - alpha) / beta_bar
            small = ((1 - alpha_bar_s) / beta_bar * (1 - alpha)).clamp(min=1e-20)
            numbers = alpha_bar_t**0.5, beta_bar**0.5, a, b, b**2, small
            self._made[1][place] = tuple(number.item() for number in numbers)
        return self._made[1][place]

    def _x0_hat(self, prediction: Tensor, x_t: Tensor, signal: float, noise: float) -> Tensor:
        kind, x0_hat = self.config.prediction_type, prediction
        if kind == "epsilon":
            x0_hat = (x_t - noise * prediction) / signal
        elif kind == "v_prediction":
            x0_hat = signal * x_t - noise * prediction
        if self.config.thresholding:
            return torch.as_tensor(self._threshold_sample(x0_hat))
        limit = self.config.clip_sample_range
        return x0_hat.clamp(-limit, limit) if self.config.clip_sample else x0_hat

    def _parents_variance(self, t: int, learned: Tensor) -> Tensor | None:
        """Return the variance of ``DDPMScheduler``, whose helper returns other things too."""
        if t == 0:
            return None
        value: Tensor = self._get_variance(t, predicted_variance=learned)
        if self.variance_type == "fixed_small_log":
            return value**2
        return value.exp() if self.variance_type == "learned_range" else value


class OCMDDIMScheduler(_BetaScheduler, DDIMScheduler):
    """DDIM steps with the covariance that the model states.

    mean and lambda^2 = eta^2 beta_tilde(s, t) are those of ``DDIMScheduler`` (Song, Meng and Ermon,
    2021): sqrt(alpha_bar_s) x0_hat + sqrt(beta_bar_s - lambda^2) epsilon, where x0_hat is clipped
    and epsilon is not, unless ``use_clipped_model_output``. Since epsilon follows from x_t and x0,
    b = sqrt(alpha_bar_s) - sqrt((beta_bar_s - lambda^2) alpha_bar_t / beta_bar_t) either way. s is
    t - N // K, as diffusers takes it, whether it is one of ``timesteps`` or not.

    ``DDIMPipeline`` makes a ``DDIMScheduler`` of the one that it is given. Set it afterwards::

        pipeline = DDIMPipeline(model, scheduler)
        pipeline.scheduler = model.scheduler(scheduler)

    or use ``DDPMPipeline``, which keeps it, on disk too, and takes ``eta`` from the configuration.

    Args:
        args: Those of ``DDIMScheduler``, as the keyword arguments that are not listed here are.
        eta: Of steps that do not say it: 0 for DDIM, whose only noise is that of the covariance, 1
            for DDPM.
        data_std: As in :class:`OCMScheduler`.
        max_last_noise: As in :class:`OCMScheduler`.
        noise_at_end: Whether a step to the data draws them from N(x0_hat, Var[x0 | x_t]). It is
            as long as the others with "trailing".

    Raises:
        ValueError: If the prediction type is unknown, eta lies outside of [0, 1], ``data_std`` is
            not positive, or ``max_last_noise`` is negative.

    Example:
        >>> import torch, ocm
        >>> scheduler = ocm.OCMDDIMScheduler()
        >>> scheduler.set_timesteps(5)
        >>> x_t, prediction, ratio = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)
        >>> stated = torch.cat([prediction, ratio], 1)
        >>> scheduler.step(stated, 200, x_t, eta=0.0).prev_sample
        tensor([[0., 0.]])
    """

    __module__ = "ocm"

    @register_to_config
    @takes_arguments_of(DDIMScheduler)
    def __init__(
        self,
        *args: Any,
        eta: float = 0.0,
        data_std: float | None = None,
        max_last_noise: float | None = None,
        noise_at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check(data_std, max_last_noise)
        _check_eta(eta)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Set ``timesteps``, as ``DDIMScheduler`` does.

        Args:
            num_inference_steps: Number of steps.
            device: Where ``timesteps`` will be.
        """
        self._has_warned = False
        super().set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        return_log_prob: bool = False,
        prev_sample: Tensor | None = None,
    ) -> Any:
        """Draw x_s from x_t.

        Args:
            model_output: As in :meth:`OCMScheduler.step`.
            timestep: The level of x_t, in 0 .. N - 1.
            sample: x_t, shape (B, C, ...).
            eta: In [0, 1]; None for that of the configuration.
            use_clipped_model_output: Whether epsilon is that of the clipped x0_hat.
            generator: As in :meth:`OCMScheduler.step`, as are the other arguments.
            variance_noise: Standard normal noise in place of the generator's.
            return_dict: Whether to return an output rather than a tuple.
            return_log_prob: Whether ``log_prob`` is returned too.
            prev_sample: x_s, whose ``log_prob`` is returned, and nothing drawn.

        Raises:
            ValueError: As in :meth:`OCMScheduler.step`, or if eta lies outside of [0, 1] or
                ``set_timesteps`` was not called.
        """
        eta = self.config.eta if eta is None else eta
        _check_eta(eta)
        t = int(self._host_number(timestep))
        alpha_bar_t = self._alpha_bar(t)
        prediction, ratio = self._split(model_output, sample)
        if ratio is None and prev_sample is None:
            parents = (eta, use_clipped_model_output, generator, variance_noise)
            output = super().step(model_output, t, sample, *parents)
            if return_log_prob:
                drawn = output.prev_sample.detach()
                again = self.step(model_output, t, sample, *parents[:2], prev_sample=drawn)
                output = OCMSchedulerOutput(**output, log_prob=again.log_prob)
            return output if return_dict else output.to_tuple()
        x0_and_epsilon, x0_hat = super().step(
            full_precision(prediction),
            t,
            full_precision(sample),
            0.0,
            use_clipped_model_output,
            return_dict=False,
        )
        s = t - self.config.num_train_timesteps // self.num_inference_steps
        table = self._on_host("alphas_cumprod")
        alpha_bar_s = (table[s] if s >= 0 else self.final_alpha_cumprod).item()
        beta_bar_s, beta_bar_t = 1.0 - alpha_bar_s, 1.0 - alpha_bar_t
        noise_variance = eta**2 * beta_bar_s / beta_bar_t * (1.0 - alpha_bar_t / alpha_bar_s)
        # Of epsilon; the parent's rounds below 0 without signal, and gives nan.
        share = max(1.0 - noise_variance / beta_bar_s, 0.0) if beta_bar_s > 0.0 else 1.0
        from_x0 = math.sqrt(alpha_bar_s) * x0_hat
        mean = from_x0 + math.sqrt(share) * (x0_and_epsilon - from_x0)
        b = math.sqrt(alpha_bar_s) - math.sqrt(share * beta_bar_s * alpha_bar_t / beta_bar_t)
        variance: Tensor | None = mean.new_full((), noise_variance)
        if ratio is not None and (s >= 0 or self.config.noise_at_end):
            variance = self._variance(ratio, t, s, b**2, noise_variance)
        return self._finish(
            GaussianStep(mean, variance, x0_hat),
            sample,
            generator,
            variance_noise,
            prev_sample,
            return_log_prob,
            return_dict,
        )


def _check_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")


# Examples of classes whose __module__ is another one.
__test__ = {one.__name__: one for one in (OCMScheduler, OCMDDIMScheduler)}
