"""What the schedulers share whose steps draw x_s with the variance that a model states.

What their models put out is twice as long as x_t in dimension 1: the prediction, and the ratio of
Var[x0 | x_t] to the unit of :class:`ocm.Parameterisation`. A step draws x_s ~ N(mean, variance),
its log-density can be had beside it, and a scheduler is made of another one of diffusers only if
the two have the same noise levels.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.diffusion.from_diffusers import from_scheduler, rebuilt


@dataclass
class OCMSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: x_s.
        pred_original_sample: x0_hat, as it enters the mean of x_s.
        log_prob: log p(x_s | x_t) in nats, shape (B,), where it was asked for.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    log_prob: Tensor | None = None


class GaussianStep(NamedTuple):
    """x_s ~ N(mean, variance), at least in float32; without noise where ``variance`` is None."""

    mean: Tensor
    variance: Tensor | None
    x0_hat: Tensor


def log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return log N(x; mean, variance) in nats, summed over all dimensions but the first.

    Raises:
        ValueError: If a variance is not positive, where there is no density.

    Example:
        >>> log_density(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """
    if not bool((variance > 0).all()):
        raise ValueError(
            "log_prob must be that of a step with noise in every dimension: there is none in the "
            "step from timestep 0, and none where the variance is 0 (eta = 0 and no variance "
            "stated)"
        )
    terms = (x - mean) ** 2 / variance + variance.log() + math.log(2.0 * math.pi)
    return -0.5 * terms.flatten(1).sum(1)


def takes_arguments_of(parent: Any) -> Callable[[Any], Any]:
    """Give an ``__init__`` the parent's arguments, of any version, and its own keyword-only ones.

    diffusers reads from its signature what the configuration holds.
    """

    def decorate(init: Any) -> Any:
        inherited = inspect.signature(parent.__init__).parameters
        own = inspect.signature(init).parameters.values()
        keywords = [one for one in own if one.kind is one.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature([*inherited.values(), *keywords])
        return init

    return decorate


class CovarianceScheduler:
    """What is common to schedulers of models that state a variance; to be derived from first."""

    _compatibles: ClassVar[list[str]]
    # Name of the path, and entries of other schedulers that lead off its timesteps.
    _path: ClassVar[str]
    _other_levels: ClassVar[tuple[str, ...]] = ()
    config: Any
    parameterisation: Parameterisation
    timesteps: Tensor
    _has_warned = False
    # By name, a tensor, its version and what was read of it.
    _read: Mapping[str, tuple[Tensor, int, Tensor]] = MappingProxyType({})

    def _on_host(self, name: str) -> Tensor:
        """Return a tensor of the scheduler on the CPU, read again only when it has changed."""
        tensor: Tensor = getattr(self, name)
        if tensor.device.type == "cpu" or tensor.is_inference():
            return tensor.cpu()
        kept = self._read.get(name)
        if kept is None or kept[0] is not tensor or kept[1] != tensor._version:
            kept = tensor, tensor._version, tensor.cpu()
            self._read = {**self._read, name: kept}
        return kept[2]

    def _host_number(self, timestep: float | Tensor) -> float:
        """Return a timestep as a number; a GPU is not waited for if it is one of ``timesteps``."""
        if not isinstance(timestep, Tensor):
            return timestep
        place = timestep.storage_offset() - self.timesteps.storage_offset()
        is_part = (
            timestep.untyped_storage()._cdata == self.timesteps.untyped_storage()._cdata
            and timestep.dtype == self.timesteps.dtype
            and timestep.numel() == 1
        )
        if is_part and 0 <= place < len(self.timesteps) and self.timesteps.is_contiguous():
            timestep = self._on_host("timesteps")[place]
        number: float = timestep.item()
        return number

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the scheduler that means what another one does.

        diffusers' own takes the entries that the other one left at its defaults as not said; here
        they keep their values, so that a scheduler means the same from memory and from disk. A
        class that does not clip gives one that does not.

        Args:
            config: A scheduler of diffusers, or its configuration.
            return_unused_kwargs: Whether to return a tuple, with the entries that were not used.
            kwargs: Entries that take the place of those of ``config``.

        Raises:
            ValueError: If the other scheduler is of another path, or its noise levels are not those
                of its timesteps.
        """
        arguments = inspect.signature(cls.__init__).parameters
        entries = cls._entries_of(config)
        for name in cls._other_levels:
            if kwargs.pop(name, entries.pop(name, False)):
                raise ValueError(
                    f"{name} must be False: its noise levels are not those of the timesteps, "
                    f"which {cls.__name__} takes; use from_config(scheduler, {name}=False)"
                )
        # What diffusers would drop, where that changes nothing.
        entries["_use_default_values"] = [
            name
            for name in entries.get("_use_default_values", ())
            if name in arguments and entries.get(name) == arguments[name].default
        ]
        parents: Any = super()  # of diffusers, behind this one
        made, unused = parents.from_config(entries, return_unused_kwargs=True, **kwargs)
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def _entries_of(cls, config: Any) -> dict[str, Any]:
        """Return the entries of a scheduler or configuration that mean something here."""
        stated = getattr(config, "config", config)
        if isinstance(config, cls) or (
            isinstance(stated, Mapping) and stated.get("_class_name") == cls.__name__
        ):
            return dict(stated)
        other = rebuilt(config)
        path = from_scheduler(other)
        if path.name != cls._path:
            raise ValueError(
                f"scheduler must have the path {cls._path!r} of {cls.__name__}, got "
                f"{type(other).__name__} of {path.name!r}"
            )
        known = {"_use_default_values", *inspect.signature(cls.__init__).parameters}
        # A class without the entry does not clip. Only a scheduler of ocm has entries of its own.
        entries = {"clip_sample": False, **other.config}
        entries |= {name: value for name, value in stated.items() if name in known}
        if "flow_shift" in other.config:  # as solvers of several paths call it
            entries["shift"] = other.config.flow_shift
        for kind in cls._compatibles:
            known |= inspect.signature(getattr(diffusers, kind).__init__).parameters.keys()
        known |= set(cls._other_levels)
        return {name: value for name, value in entries.items() if name in known}

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the prediction and the ratio, None for a model that states no variance."""
        channels = sample.shape[1]
        if model_output.shape == sample.shape:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"model_output has the {channels} channels of the sample and states no "
                    "variance: the steps are those of diffusers. ocm.attach(model) gives a model "
                    "one",
                    UserWarning,
                    stacklevel=3,
                )
            return model_output, None
        if model_output.shape != (len(sample), 2 * channels, *sample.shape[2:]):
            raise ValueError(
                "model_output must have the shape of sample, or be twice as long in dimension 1, "
                f"got {tuple(model_output.shape)} for {tuple(sample.shape)}"
            )
        return model_output[:, :channels], model_output[:, channels:]

    def _unit(self, t: float, alpha_bar: float) -> float:
        """Return the unit of the ratio, that of :meth:`ocm.Parameterisation.scale`."""
        data_std = self.parameterisation.data_std
        if alpha_bar == 0.0 and math.isinf(data_std):
            raise ValueError(
                f"data_std must be a number where no signal is left, at timestep {t} of a flow or "
                "of rescale_betas_zero_snr=True: the papers' unit is infinite there, got None"
            )
        return (1.0 - alpha_bar) / (alpha_bar + (1.0 - alpha_bar) / data_std**2)

    def _finish(
        self,
        step: GaussianStep,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        variance_noise: Tensor | None,
        prev_sample: Tensor | None,
        return_log_prob: bool,
        return_dict: bool,
    ) -> OCMSchedulerOutput | tuple[Tensor, ...]:
        """Draw x_s, or take the one that is given, and say how likely it was."""
        if prev_sample is not None and prev_sample.shape != sample.shape:
            raise ValueError(
                f"prev_sample must have the shape of sample, {tuple(sample.shape)}, got "
                f"{tuple(prev_sample.shape)}"
            )
        if variance_noise is not None and (
            generator is not None or variance_noise.shape != sample.shape
        ):
            raise ValueError(
                f"variance_noise must have the shape of sample, {tuple(sample.shape)}, and no "
                f"generator beside it, got {tuple(variance_noise.shape)} and {generator}"
            )
        x_s = prev_sample
        if x_s is None:
            x_s = step.mean
            if step.variance is not None:
                if variance_noise is None:
                    variance_noise = randn_tensor(
                        sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                    )
                x_s = x_s + step.variance.sqrt() * variance_noise
            x_s = x_s.to(sample.dtype)
        log_prob = None
        if return_log_prob or prev_sample is not None:
            # A draw is a constant here, as it is when it is handed in later.
            at = (x_s.detach() if prev_sample is None else prev_sample).to(step.mean.dtype)
            variance = torch.zeros_like(at) if step.variance is None else step.variance
            log_prob = log_density(at, step.mean, variance)
        output = OCMSchedulerOutput(x_s, step.x0_hat.to(sample.dtype), log_prob)
        return output if return_dict else output.to_tuple()
