"""A diffusion backbone with its schedule: what it says about x0 given x_t.

Whatever a network predicts (:mod:`ocm.diffusion.predictions`), the posterior mean is linear in its
output::

    x0_hat = p_t x_t + q_t output,

and by Tweedie's formula, twice, on any path x_t = alpha x0 + sigma n, with J the Jacobian of the
output at x_t::

    Cov[x0 | x_t] = (sigma^2 / alpha) d x0_hat / d x_t = (sigma^2 / alpha) (p_t I + q_t J).

For a network that predicts the noise this is (beta_bar / alpha_bar)(I + beta_bar H), H the Hessian
of log q(x_t), a small difference near t = N; for one that predicts x0 no digits are lost. Where x_t
holds no signal (alpha = 0: t = N of flow matching, zero terminal SNR) a Jacobian says nothing, and
Cov[x0 | x_t] is the covariance of the data.

Classifier-free guidance of scale w (Ho and Salimans, 2022) replaces the score by
(1 - w) score(x_t) + w score(x_t | label), the score of q(x_t)^(1-w) q(x_t | label)^w. Its Hessian
is the same combination, and so is the covariance stated here::

    x0_hat = (1 - w) x0_hat(x_t) + w x0_hat(x_t | label),
    Cov    = (1 - w) Cov[x0 | x_t] + w Cov[x0 | x_t, label],

for learned covariances too. Where it is negative, samplers clip it at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hessdiag
from ocm.diffusion.backbones.architecture import Architecture, FunctionBackbone
from ocm.diffusion.backbones.families import ARCHITECTURES, architecture_of, is_distilled
from ocm.diffusion.backbones.wrappers import class_of, device_of, in_type_of, unwrapped
from ocm.diffusion.checks import check_batch, check_finite
from ocm.diffusion.conditions import Arguments, Condition, check_labels, check_rows, guided, joined
from ocm.diffusion.predictions import (
    PRECONDITIONED,
    Coefficients,
    check_prediction_type,
    coefficients,
    numbers,
)
from ocm.diffusion.schedules import (
    Schedule,
    at_least_float32,
    full_precision,
    per_sample,
    rounded,
)


@dataclass(frozen=True, eq=False)
class Branch:
    """One of the evaluations that make up a prediction: the only one, or one of a guidance.

    Attributes:
        denoiser: Whose evaluation it is.
        x_t: Shape (B, ...).
        t: One timestep in (0, N], or a tensor of shape (B,); whole on a discrete schedule.
        s: Where the reverse step goes, or None.
        output: What the backbone predicts, of the shape of x_t.
    """

    denoiser: Denoiser
    x_t: Tensor
    t: float | Tensor
    s: float | None
    output: Tensor
    _aux: Mapping[str, Tensor] = field(repr=False)

    @property
    def x0_hat(self) -> Tensor:
        """Mean of x0 given x_t, not clipped."""
        return self.denoiser.x0_hat(self.x_t, self.t, self.output)

    @property
    def features(self) -> Tensor:
        """The input of the backbone's last output layer.

        Raises:
            ValueError: If the backbone shows none.
        """
        return self.denoiser.features_in(self._aux)

    @property
    def further_channels(self) -> Tensor:
        """What the backbone puts out beside its prediction, of the shape of x_t.

        Raises:
            ValueError: If that is nothing.
        """
        if "further_channels" not in self._aux:
            channels = self.x_t.shape[1]
            raise ValueError(
                "backbone must put out a variance beside its prediction, as those of I-DDPM do "
                f"(learned_sigma): {2 * channels} channels, got {channels}"
            )
        return self._aux["further_channels"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one evaluation of the backbone says at (x_t, t); made by :meth:`Denoiser.predict`.

    The backbone is evaluated at the first look at a result. If that is the Jacobian, the graph of
    the evaluation is kept, and all else comes from the same evaluation; so look there first.

    Attributes:
        denoiser: Whose prediction it is.
        x_t: Shape (B, ...).
        t: One timestep in (0, N], or a tensor of shape (B,); whole on a discrete schedule.
        s: Where the reverse step goes, for covariances that are stated for a step; None for t - 1.
        condition: Labels and guidance, or None.
        sample_offset: Number of the first sample, for covariances that draw probes.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(1, 1, 2, 2), 500)
        >>> c, k, J = prediction.covariance_terms    # first: the evaluation is shared
        >>> c.item(), prediction.x0_hat
        (0.5, tensor([[[[1., 1.],
                  [1., 1.]]]]))
    """

    denoiser: Denoiser
    x_t: Tensor
    t: float | Tensor
    s: float | None = None
    condition: Condition | None = None
    sample_offset: int = 0
    # Whether gradients were recorded where it was made.
    _records: bool = False
    # Results so far, shared with the same prediction towards another s.
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def jacobian(self) -> hessdiag.Jacobian:
        """J of the output at x_t, an operator that every estimator of hessdiag takes."""
        if "jacobian" not in self._kept:
            self._kept["jacobian"] = self.denoiser.jacobian(self.x_t, self.t, self.condition)
        jacobian: hessdiag.Jacobian = self._kept["jacobian"]
        return jacobian

    @property
    def keeps_jacobian(self) -> bool:
        """Whether results come from the evaluation of the Jacobian, without other gradients."""
        return "jacobian" in self._kept

    @property
    def output(self) -> Tensor:
        """What the backbone predicts, of the shape of x_t."""
        return self._evaluated[0]

    @property
    def features(self) -> Tensor:
        """The input of the backbone's last output layer.

        Its shape is (B, channels, ...) or ``(B, *grid, width)``. A grid is that of the
        patches for which tokens stand. Under guidance the evaluation is that with a condition.

        Raises:
            ValueError: If the backbone shows none.
        """
        return self.branches[-1][1].features

    @property
    def x0_hat(self) -> Tensor:
        """Mean of x0 given x_t, not clipped."""
        return self.denoiser.x0_hat(self.x_t, self.t, self.output)

    @property
    def branches(self) -> tuple[tuple[float, Branch], ...]:
        """Weights and evaluations of which this is the sum, two under guidance and one without."""
        output, aux = self._evaluated
        weights, outputs, parts = [1.0], [output], [aux]
        if self.condition is not None and "branches" in aux:
            w = self.condition.guidance_scale
            weights, outputs = [1.0 - w, w], [*aux["branches"].chunk(2)]
            halves = {name: values.chunk(2) for name, values in aux.items()}
            parts = [{name: both[i] for name, both in halves.items()} for i in range(2)]
        return tuple(
            (weight, Branch(self.denoiser, self.x_t, self.t, self.s, out, part))
            for weight, out, part in zip(weights, outputs, parts, strict=True)
        )

    @property
    def timestep(self) -> float:
        """t, which must be the same for the whole batch.

        Raises:
            TypeError: If it is a tensor of a timestep for each sample.
        """
        if isinstance(self.t, Tensor):
            raise TypeError("prediction.t must be one timestep for the whole batch, got a tensor")
        return self.t

    def towards(self, s: float) -> Prediction:
        """Return the same prediction for the step to s; the evaluation is shared."""
        return replace(self, s=s)

    def by(self, denoiser: Denoiser) -> Prediction:
        """Return what ``denoiser`` predicts in the same place: this, if it is the same one."""
        own = self.denoiser
        check_denoiser(denoiser)
        if denoiser is own or (
            denoiser.backbone is own.backbone
            and denoiser.schedule is own.schedule
            and denoiser.prediction_type == own.prediction_type
            and denoiser.architecture == own.architecture
        ):
            return self
        return denoiser.predict(
            self.x_t, self.t, s=self.s, condition=self.condition, sample_offset=self.sample_offset
        )

    @property
    def covariance_terms(self) -> tuple[Tensor, Tensor, hessdiag.Jacobian]:
        """C, k and J of Cov[x0 | x_t] = c I + k J; c and k broadcast to x_t.

        Where x_t holds no signal J is the covariance of the data, c = 0 and k = 1.

        Raises:
            ValueError: If it holds none, and the denoiser was given no ``data_covariance``; or the
                output is no posterior mean, since guidance is embedded in the backbone.
        """
        self.denoiser.check_states_a_mean()
        if isinstance(self.t, Tensor) or self.denoiser.schedule.has_signal(self.t):
            return *self.denoiser.covariance_coefficients(self.t, self.x_t), self.jacobian
        one = per_sample(1.0, full_precision(self.x_t[:0]))
        data = hessdiag.Jacobian(self.denoiser.multiply_by_data_covariance, self.x_t)
        return torch.zeros_like(one), one, data

    @property
    def _evaluated(self) -> tuple[Tensor, dict[str, Tensor]]:
        if "jacobian" in self._kept:
            return self.jacobian.output, self.jacobian.aux
        if "evaluated" not in self._kept:
            with torch.set_grad_enabled(self._records):
                self._kept["evaluated"] = self.denoiser.evaluate(self.x_t, self.t, self.condition)
        evaluated: tuple[Tensor, dict[str, Tensor]] = self._kept["evaluated"]
        return evaluated


def check_denoiser(denoiser: object) -> None:
    """Raise unless the denoiser of a covariance is one.

    Raises:
        TypeError: If it is anything else, a schedule say.
    """
    if not isinstance(denoiser, Denoiser):
        kind = type(denoiser).__name__
        raise TypeError(f"denoiser of a covariance must be an ocm.Denoiser, got {kind}")


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A diffusers backbone and the schedule it was trained with.

    It states the mean x0_hat of x0 given x_t, and by Tweedie's formula (Efron, 2011) the covariance
    (sigma^2 / alpha) d x0_hat / d x_t. The backbone is used as it is: put it in eval mode and
    freeze it with :meth:`freeze` before sampling, scoring or training a head.

    Attributes:
        backbone: A model of diffusers that :mod:`ocm.diffusion.backbones.families` lists, compiled
            or with adapters, distributed or offloaded as it may be; any module with an
            ``architecture``; or a function (x_t, time) -> output, time what the schedule tells a
            network, of shape (B,).
        schedule: The noise schedule.
        prediction_type: What the backbone predicts, of :mod:`ocm.diffusion.predictions`.
        architecture: How it is called and where its features are; None finds out by its class.
        data_covariance: What Cov[x0 | x_t] is where x_t holds no signal: a variance, variances of
            the shape of a sample, or a matrix (D, D) over its features
            (``x0.flatten(1).T.cov()``). Only covariances that take products there ask for it.

    Raises:
        TypeError: If the backbone cannot be called, or the schedule is none.
        ValueError: If the architecture is unknown, its feature layer is missing, the
            ``prediction_type`` is unknown, or it is "epsilon" on a path without signal at N; or
            ``data_covariance`` is not finite, or a negative variance.

    Example:
        >>> import torch, ocm
        >>> from diffusers import DDPMScheduler
        >>> from ocm.training.small_unet import small_unet
        >>> unet, schedule = small_unet((1, 8, 8), width=8), ocm.from_scheduler(DDPMScheduler())
        >>> denoiser = ocm.Denoiser(unet, schedule).freeze()
        >>> x0 = torch.zeros(2, 1, 8, 8)
        >>> x_t = denoiser.schedule.diffuse(x0, 500, torch.ones_like(x0))
        >>> denoiser.predict(x_t, 500).x0_hat.shape
        torch.Size([2, 1, 8, 8])
    """

    backbone: Any
    schedule: Schedule
    prediction_type: str = "epsilon"
    architecture: Architecture | None = None
    data_covariance: Tensor | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                "schedule must be an ocm.Schedule, such as ocm.linear(), got "
                f"{type(self.schedule).__name__}"
            )
        check_prediction_type(self.prediction_type)
        _check_data_covariance(self.data_covariance)
        N = self.schedule.num_timesteps
        if self.prediction_type == "epsilon" and not self.schedule.has_signal(N):
            raise ValueError(
                "prediction_type must not be 'epsilon' on a path without signal at t = N, where "
                f"the noise says nothing about x0, got the path {self.schedule.name!r}; in a "
                "scheduler of diffusers that is rescale_betas_zero_snr=True"
            )
        if not isinstance(self.backbone, nn.Module):
            if not callable(self.backbone):
                kind = type(self.backbone).__name__
                raise TypeError(f"backbone must be a module or a function, got {kind}")
            object.__setattr__(self, "backbone", FunctionBackbone(self.backbone))
        if self.architecture is None:
            object.__setattr__(self, "architecture", architecture_of(self.backbone))
        try:
            self._architecture.listener(self.backbone)
        except AttributeError:
            raise ValueError(
                f"backbone must have the submodule {self._architecture.feature_layer!r}, whose "
                f"input a head reads; {type(unwrapped(self.backbone)).__name__} has none"
            ) from None
        if self._architecture.class_name in ARCHITECTURES:
            config = unwrapped(self.backbone).config
            given, made = config.in_channels, config.out_channels or config.in_channels
            if self._architecture.is_packed and config.out_channels:
                made *= config.patch_size**2
            if made not in (given, 2 * given):
                raise ValueError(
                    "backbone must predict one value for every input channel, and at most a "
                    f"variance beside it, got in_channels = {given}, out_channels = {made}"
                )

    @property
    def _architecture(self) -> Architecture:
        assert self.architecture is not None  # set in __post_init__
        return self.architecture

    def check_states_a_mean(self) -> None:
        """Raise unless the output is that of a posterior mean, whose Jacobian is a covariance.

        Raises:
            ValueError: If guidance is embedded in the backbone.
        """
        if is_distilled(self.backbone):
            raise ValueError(
                "backbone must predict a posterior mean for its Jacobian to be a covariance, and "
                f"{class_of(self.backbone).__name__} with guidance_embeds = True was distilled from"
                " a guided model; ocm.NPR learns its squared errors on data"
            )

    def freeze(self) -> Denoiser:
        """Put the backbone in eval mode, switch off its gradients, and return the denoiser."""
        self.backbone.eval().requires_grad_(False)
        return self

    def condition(
        self,
        labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        null_label: int | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        null_tensors: Mapping[str, Any] | None = None,
    ) -> Condition:
        """Return what samples are conditioned on, guided if the scale is not 1.

        Args:
            labels: Class of each sample, int64 of shape (B,), for the batch of a call.
            guidance_scale: w, 1 for none.
            null_label: The label for no class; for ``DiTTransformer2DModel`` its number of
                classes, which is the default there.
            tensors: Further arguments of the backbone, such as ``encoder_hidden_states``
                (:class:`ocm.diffusion.conditions.Condition`).
            null_tensors: Those of the branch without a condition that differ from ``tensors``.

        Raises:
            ValueError: If a label is none of the backbone's, on the CPU; or there is guidance and
                nothing that stands for no condition.
        """
        check_labels(labels)
        null_label = self.null_label if null_label is None else null_label
        is_known = labels is not None and labels.device.type == "cpu" and len(labels) > 0
        if labels is not None and is_known and self.num_classes is not None:
            highest = max(self.num_classes - 1, -1 if null_label is None else null_label)
            if int(labels.min()) < 0 or int(labels.max()) > highest:
                raise ValueError(
                    f"labels must lie in 0 .. {self.num_classes - 1}, got {int(labels.min())} .. "
                    f"{int(labels.max())}"
                )
        device = self.device
        labels, given, nulls = pytree.tree_map_only(
            Tensor, lambda x: x.to(device), (labels, dict(tensors or {}), dict(null_tensors or {}))
        )
        return Condition(labels, guidance_scale, null_label, given, nulls)

    @property
    def takes_labels(self) -> bool:
        """Whether the backbone is trained with class labels."""
        return self.num_classes is not None

    @property
    def states_variance(self) -> bool:
        """Whether the backbone puts out a variance beside its prediction, by its configuration."""
        config = getattr(unwrapped(self.backbone), "config", None)
        given, made = (getattr(config, f"{side}_channels", None) for side in ("in", "out"))
        return bool(given and made == 2 * given)

    @property
    def num_classes(self) -> int | None:
        """How many classes the backbone is trained with, or None for none."""
        return self._architecture.num_classes(unwrapped(self.backbone))

    @property
    def null_label(self) -> int | None:
        """The label that the backbone was trained with for no class, or None."""
        return self._architecture.null_label(unwrapped(self.backbone))

    @property
    def device(self) -> torch.device:
        """The device of the backbone, that of its weights unless they are offloaded."""
        return device_of(self.backbone)

    def predict(
        self,
        x_t: Tensor,
        t: float | Tensor,
        *,
        s: float | None = None,
        condition: Condition | None = None,
        sample_offset: int = 0,
    ) -> Prediction:
        """Return what the backbone says, evaluated at the first look.

        Args:
            x_t: Shape (B, ...).
            t: One timestep in (0, N], or a tensor of shape (B,); whole on a discrete schedule.
            s: Where the reverse step goes; only :class:`ocm.ImprovedDDPM` looks at it.
            condition: Labels, tensors and guidance (:meth:`condition`), for a backbone that takes
                them.
            sample_offset: Number of the first sample.

        Raises:
            TypeError: If t is neither, or x_t no floating-point tensor.
            ValueError: If a timestep lies outside 1 .. N (not checked for a tensor on a GPU, which
                would have to be waited for), s is not before t, or there is not one timestep or
                label for each sample.
        """
        check_batch("x_t", x_t)
        self._check_timesteps(t, len(x_t))
        if s is not None and not isinstance(t, Tensor) and not 0 <= s < t:
            raise ValueError(f"s must lie in [0, t), got s = {s}, t = {t}")
        if condition is not None:
            check_rows(condition, len(x_t))
        records = torch.is_grad_enabled()
        return Prediction(self, x_t, t, s, condition, sample_offset, records)

    def output(
        self,
        x_t: Tensor,
        t: float | Tensor,
        *,
        condition: Condition | None = None,
        backbone: nn.Module | None = None,
    ) -> Tensor:
        """Return what the backbone predicts, differentiable for its parameters and x_t.

        Args:
            x_t: As in :meth:`predict`.
            t: As in :meth:`predict`; but a network that is shown x_t itself may also be asked
                between the timesteps of a discrete schedule, as samplers of diffusers do.
            condition: As in :meth:`predict`.
            backbone: Called in place of the denoiser's own: the same, wrapped for training.

        Raises:
            TypeError: As :meth:`predict`.
            ValueError: As :meth:`predict`.
        """
        check_batch("x_t", x_t)
        self._check_timesteps(t, len(x_t), between=self.prediction_type not in PRECONDITIONED)
        module = self.backbone if backbone is None else backbone

        def call(*arguments: Any, **conditions: Any) -> tuple[Tensor, None]:
            return self._architecture.call(module, *arguments, **conditions), None

        return self._evaluated(call, x_t, t, condition)[0]

    def evaluate(
        self, x_t: Tensor, t: float | Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and "features" by name; under guidance both "branches" too.

        Features and outputs of two branches lie one after the other, without a condition first.
        """
        self.schedule.check(t)

        def call(*arguments: Any, **conditions: Any) -> tuple[Tensor, Tensor | None]:
            return self._architecture.call_with_features(self.backbone, *arguments, **conditions)

        return self._evaluated(call, x_t, t, condition)

    def features_in(self, aux: Mapping[str, Tensor]) -> Tensor:
        """Return the features of an evaluation, from what it returned beside its output.

        Raises:
            ValueError: If the backbone shows none.
        """
        return self._architecture.required(aux.get("features"))

    def jacobian(
        self,
        x_t: Tensor,
        t: float | Tensor,
        condition: Condition | None = None,
        **ways: Any,
    ) -> hessdiag.Jacobian:
        """Return J of the output at x_t; its ``aux`` are the further results of :meth:`evaluate`.

        Args:
            x_t: As in :meth:`predict`.
            t: As in :meth:`predict`.
            condition: As in :meth:`predict`.
            ways: How the backbone is evaluated, as :class:`hessdiag.Jacobian` takes it.
        """
        return hessdiag.Jacobian(
            lambda x: self.evaluate(x, t, condition),
            x_t,
            has_aux=True,
            remember=self.backbone,
            **ways,
        )

    def _check_timesteps(self, t: float | Tensor, count: int, *, between: bool = False) -> None:
        if isinstance(t, Tensor) and t.dim() > 0 and t.shape not in ((1,), (count,)):
            raise ValueError(
                f"t must be one timestep, or one for each of {count} samples, got shape "
                f"{tuple(t.shape)}"
            )
        self.schedule.check(t, between=between)

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """Return p, q and the scale of the network's input at t, float64 of the shape of t."""
        schedule = self.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return coefficients(self.prediction_type, alpha, sigma, schedule.data_std)

    def x0_hat(self, x_t: Tensor, t: float | Tensor, output: Tensor) -> Tensor:
        """Return the mean of x0 given x_t, p_t x_t + q_t output, which is not clipped.

        Both terms are taken in float32 at least: float16 holds no p above 65504.
        """
        x = full_precision(x_t)
        p, q, _ = self._factors(t, x)
        x0_hat = p * x + q * full_precision(output)
        return x0_hat.to(torch.promote_types(output.dtype, x_t.dtype))

    def numbers(self, t: float) -> tuple[float, float, float]:
        """Return :meth:`coefficients` at one timestep as numbers, which are computed once."""
        alpha, sigma, *_ = self.schedule.level(t)
        return numbers(self.prediction_type, alpha, sigma, self.schedule.data_std)

    def _factors(self, t: float | Tensor, x: Tensor) -> tuple[float | Tensor, ...]:
        """Return :meth:`coefficients` as factors of x."""
        if isinstance(t, Tensor):
            return tuple(per_sample(values, x) for values in self.coefficients(t))
        return tuple(rounded(number, x.dtype) for number in self.numbers(t))

    def covariance_coefficients(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return c and k of Cov[x0 | x_t] = c I + k J, at least float32, which broadcast to x.

        c = sigma^2 / alpha p_t and k = sigma^2 / alpha q_t, with J the Jacobian of the output.
        """
        p, q, _ = self.coefficients(t)
        factor = self.schedule.sigma(t) ** 2 / self.schedule.alpha(t)
        like = full_precision(x[:0])
        return per_sample(factor * p, like), per_sample(factor * q, like)

    def multiply_by_data_covariance(self, v: Tensor) -> Tensor:
        """Return C v, C the covariance of the data.

        Raises:
            ValueError: If there is none, or it does not fit samples of this shape.
        """
        values, is_matrix = self._data_values(v.shape[1:], v)
        return (v.flatten(1) @ values).reshape(v.shape) if is_matrix else v * values

    def _data_values(self, sample_shape: torch.Size, like: Tensor) -> tuple[Tensor, bool]:
        """Return the covariance of the data, and whether that is a matrix over all features."""
        if self.data_covariance is None:
            raise ValueError(
                "data_covariance must be given to the denoiser: at this timestep x_t holds no "
                "signal, and Cov[x0 | x_t] is that of the data. "
                "Denoiser(..., data_covariance=x0.var(0)) takes the variances of data x0"
            )
        values = torch.as_tensor(self.data_covariance).to(like)
        if values.dim() == 0 or values.shape == sample_shape:
            return values, False
        features = sample_shape.numel()
        if values.shape != (features, features):
            raise ValueError(
                f"data_covariance must be a number, or of shape {tuple(sample_shape)} or "
                f"{(features, features)}, got {tuple(values.shape)}"
            )
        return values, True

    def _evaluated(
        self,
        call: Callable[..., tuple[Tensor, Tensor | None]],
        x_t: Tensor,
        t: float | Tensor,
        condition: Condition | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and what goes with it by name; both branches under guidance."""
        x = self._input(x_t, t)
        t = t.item() if isinstance(t, Tensor) and t.dim() == 0 else t
        is_between = t.is_floating_point() if isinstance(t, Tensor) else isinstance(t, float)
        is_real = self.schedule.is_continuous or is_between
        dtype = at_least_float32(x_t.dtype) if is_real else torch.int64
        if isinstance(t, Tensor):
            time = self.schedule.time(t.double()).to(dtype)
        else:  # filled on the device, where a copy could not be part of a CUDA graph
            number = self.schedule.level(t).time
            number = number if is_real else int(number)
            time = torch.full((len(x),), number, dtype=dtype, device=x.device)
        branches: list[Arguments] = [(None, {})] if condition is None else condition.arguments(x)
        together = joined(branches) if len(branches) > 1 else None
        if together is not None:
            x, time, branches = torch.cat([x, x]), torch.cat([time, time]), [together]
        called = [call(x, time, labels, **tensors) for labels, tensors in branches]
        outputs, features = zip(*called, strict=True)
        for made in outputs:
            if not isinstance(made, Tensor) or not made.is_floating_point():
                got = made.dtype if isinstance(made, Tensor) else type(made).__name__
                raise TypeError(f"backbone must put out a floating-point tensor, got {got}")
        # Under autocast or in half precision, the output has another type than x_t.
        output = torch.cat(outputs).to(x_t.dtype) if len(outputs) > 1 else outputs[0].to(x_t.dtype)
        aux = {}
        if features[0] is not None:
            aux["features"] = torch.cat(features) if len(features) > 1 else features[0]
        channels = x_t.shape[1]
        is_guided = condition is not None and condition.is_guided
        shapes = [(len(x_t) * (1 + is_guided), n * channels, *x_t.shape[2:]) for n in (1, 2)]
        if output.shape not in shapes:
            raise ValueError(
                "backbone must put out the shape of x_t, or twice its channels with a variance, "
                f"got {tuple(output.shape)} for {tuple(x_t.shape)}"
            )
        if output.shape[1] > channels:
            aux["further_channels"] = output[:, channels:].detach()
            output = output[:, :channels]
        if condition is not None and is_guided:
            aux["branches"] = output
            output = guided(output, condition.guidance_scale)
        return output, aux

    def _input(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Return what the network is shown of x_t, in the type of its weights if one is half."""
        if self.prediction_type in PRECONDITIONED:
            x_t = self._factors(t, x_t)[2] * x_t
        return in_type_of(self.backbone, x_t)


def _check_data_covariance(values: object) -> None:
    if values is None:
        return
    if isinstance(values, (int, float)):
        values = torch.tensor(float(values))
    check_finite("data_covariance", values)
    assert isinstance(values, Tensor)
    # A matrix and the variances of a sample may be of one shape.
    if values.dim() != 2 and bool((values < 0).any()):
        raise ValueError(
            f"data_covariance must be of variances of at least 0, got {values.min().item():.3g}"
        )
