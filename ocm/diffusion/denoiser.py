"""A diffusion backbone with its schedule: what it says about x0 given x_t.

Whatever a network predicts (the noise, x0 or v), the posterior mean is linear in its output,

    x0_hat = p_t x_t + q_t output,

and by Tweedie's formula, twice, with J the Jacobian of the output at x_t,

    Cov[x0 | x_t] = (beta_bar / sqrt(alpha_bar)) d x0_hat / d x_t
                  = (beta_bar / sqrt(alpha_bar)) (p_t I + q_t J).

For a network that predicts the noise this is (beta_bar / alpha_bar)(I + beta_bar H), H the Hessian
of log q(x_t), a small difference near t = N; for one that predicts x0 no digits are lost.

Classifier-free guidance of scale w (Ho and Salimans, 2022) replaces the score by
(1 - w) score(x_t) + w score(x_t | label), the score of q(x_t)^(1-w) q(x_t | label)^w. Its Hessian
is the same combination, and so is the covariance stated here:

    x0_hat = (1 - w) x0_hat(x_t) + w x0_hat(x_t | label),
    Cov    = (1 - w) Cov[x0 | x_t] + w Cov[x0 | x_t, label],

for learned covariances too. Where it is negative, samplers clip it at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hessdiag
from ocm.diffusion.architectures import Architecture, architecture_of
from ocm.diffusion.schedules import Schedule, check_prediction_type, full_precision, per_sample


@dataclass(frozen=True, eq=False)
class Condition:
    """Class labels, and how strongly they guide; made by :meth:`Denoiser.condition`.

    Attributes:
        labels: Class of each sample, int64 of shape (B,).
        guidance_scale: w above; 1 is the plain conditional model.
        null_label: The label that stands for no class; needed for a scale other than 1.

    Raises:
        ValueError: If there is guidance and no null label.
    """

    labels: Tensor
    guidance_scale: float = 1.0
    null_label: int | None = None

    def __post_init__(self) -> None:
        if self.is_guided and self.null_label is None:
            raise ValueError(
                f"null_label must be given for guidance_scale = {self.guidance_scale}: the label "
                "that the model was trained with for no class"
            )

    @property
    def is_guided(self) -> bool:
        """Whether the backbone is evaluated without a class too."""
        return self.guidance_scale != 1.0

    def repeated(self, count: int) -> Tensor:
        """Return the labels of ``count`` samples: of a batch, or of several copies of it.

        Raises:
            ValueError: If that is no multiple of the number of labels.
        """
        # Products may lay probes out as further samples of the batch.
        if len(self.labels) == 0 or count % len(self.labels):
            raise ValueError(
                "labels must be one for each sample of a batch, or of each of its copies, got "
                f"{len(self.labels)} for {count} samples"
            )
        return self.labels.repeat(count // len(self.labels))


def guided(both: Tensor, guidance_scale: float) -> Tensor:
    """Return (1 - w) of the first half of a batch, without a class, plus w of the second, with one.

    Example:
        >>> guided(torch.tensor([1.0, 2.0]), 3.0)
        tensor([4.])
    """
    without_class, with_class = both.chunk(2)
    return (1.0 - guidance_scale) * without_class + guidance_scale * with_class


class Branch(NamedTuple):
    """One of the evaluations that make up a prediction: the only one, or one of a guidance.

    Attributes:
        x_t: Shape (B, ...).
        t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
        s: Where the reverse step goes, or None.
        x0_hat: Mean of x0 given x_t, not clipped.
        features: The input of the backbone's last output layer.
    """

    x_t: Tensor
    t: int | Tensor
    s: int | None
    x0_hat: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one evaluation of the backbone says at (x_t, t); made by :meth:`Denoiser.predict`.

    The backbone is evaluated at the first look at a result. If that is the Jacobian, the graph of
    the evaluation is kept, and all else comes from the same evaluation; so look there first.

    Attributes:
        denoiser: Whose prediction it is.
        x_t: Shape (B, ...).
        t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
        s: Where the reverse step goes, for covariances that are stated for a step; None for t - 1.
        condition: Labels and guidance, or None.
        sample_offset: Number of the first sample, for covariances that draw probes.
    """

    denoiser: Denoiser
    x_t: Tensor
    t: int | Tensor
    s: int | None = None
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
    def output(self) -> Tensor:
        """What the backbone predicts, of the shape of x_t."""
        return self._evaluated[0]

    @property
    def features(self) -> Tensor:
        """The input of the backbone's last output layer, (B, channels, ...) or (B, tokens, width).

        Under guidance that of the evaluation with a class.
        """
        return self.branches[-1][1].features

    @property
    def x0_hat(self) -> Tensor:
        """Mean of x0 given x_t, not clipped."""
        return self.denoiser.x0_hat(self.x_t, self.t, self.output)

    @property
    def branches(self) -> tuple[tuple[float, Branch], ...]:
        """Weights and evaluations of which this is the sum: one, or two under guidance."""
        output, aux = self._evaluated
        w = None if self.condition is None else self.condition.guidance_scale
        weights = (1.0,) if len(aux) == 1 or w is None else (1.0 - w, w)
        outputs = aux[1].chunk(2) if len(aux) > 1 else (output,)
        return tuple(
            (
                weight,
                Branch(
                    self.x_t,
                    self.t,
                    self.s,
                    self.denoiser.x0_hat(self.x_t, self.t, branch),
                    features,
                ),
            )
            for weight, branch, features in zip(
                weights, outputs, aux[0].chunk(len(weights)), strict=True
            )
        )

    @property
    def timestep(self) -> int:
        """t, which must be the same for the whole batch.

        Raises:
            TypeError: If it is a tensor of a timestep for each sample.
        """
        if not isinstance(self.t, int):
            raise TypeError("prediction.t must be one timestep for the whole batch, got a tensor")
        return self.t

    def towards(self, s: int) -> Prediction:
        """Return the same prediction for the step to s; the evaluation is shared."""
        return replace(self, s=s)

    def by(self, denoiser: Denoiser) -> Prediction:
        """Return what ``denoiser`` predicts in the same place: this, if it is the same one."""
        own = self.denoiser
        if denoiser.backbone is own.backbone and denoiser.schedule is own.schedule:
            return self
        return denoiser.predict(
            self.x_t, self.t, s=self.s, condition=self.condition, sample_offset=self.sample_offset
        )

    @property
    def covariance_coefficients(self) -> tuple[Tensor, Tensor]:
        """C and k of Cov[x0 | x_t] = c I + k J, which broadcast to x_t."""
        return self.denoiser.covariance_coefficients(self.t, self.x_t)

    @property
    def _evaluated(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        if "jacobian" in self._kept:
            return self.jacobian.output, self.jacobian.aux
        if "evaluated" not in self._kept:
            with torch.set_grad_enabled(self._records):
                self._kept["evaluated"] = self.denoiser.evaluate(self.x_t, self.t, self.condition)
        evaluated: tuple[Tensor, tuple[Tensor, ...]] = self._kept["evaluated"]
        return evaluated


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A diffusers backbone and the schedule it was trained with.

    The backbone is used as it is: put it in eval mode and freeze it with :meth:`freeze` before
    sampling, scoring or training a head.

    Attributes:
        backbone: A ``UNet2DModel`` or ``DiTTransformer2DModel``, or any module with an
            ``architecture``.
        schedule: The noise schedule.
        prediction_type: What the backbone predicts: "epsilon", "sample" or "v_prediction".
        architecture: How it is called and where its features are; None finds out by its class.

    Raises:
        ValueError: If the architecture is unknown, its feature layer is missing, or the
            ``prediction_type`` is none of diffusers'.
    """

    backbone: Any
    schedule: Schedule
    prediction_type: str = "epsilon"
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        if self.architecture is None:
            object.__setattr__(self, "architecture", architecture_of(self.backbone))
        try:
            self.backbone.get_submodule(self._architecture.feature_layer)
        except AttributeError:
            raise ValueError(
                f"backbone must have the submodule {self._architecture.feature_layer!r}, whose "
                f"input a head reads; {type(self.backbone).__name__} has none"
            ) from None
        config = getattr(self.backbone, "config", None)
        channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
        if self._architecture.class_name == "UNet2DModel" and channels[0] != channels[1]:
            raise ValueError(
                "backbone must predict one value for every input channel and nothing else, got "
                f"in_channels = {channels[0]}, out_channels = {channels[1]}"
            )

    @property
    def _architecture(self) -> Architecture:
        assert self.architecture is not None  # set in __post_init__
        return self.architecture

    def freeze(self) -> Denoiser:
        """Put the backbone in eval mode, switch off its gradients, and return the denoiser."""
        self.backbone.eval().requires_grad_(False)
        return self

    def condition(
        self, labels: Tensor, guidance_scale: float = 1.0, null_label: int | None = None
    ) -> Condition:
        """Return the condition of samples with class labels, guided if the scale is not 1.

        Args:
            labels: int64 of shape (B,), for the batch of a call.
            guidance_scale: w, 1 for none.
            null_label: The label for no class; for ``DiTTransformer2DModel`` its number of
                classes, which is the default there.

        Raises:
            ValueError: If a label is none of the backbone's, on the CPU; or there is guidance and
                no null label.
        """
        null_label = self.null_label if null_label is None else null_label
        if self.num_classes is not None and labels.device.type == "cpu" and len(labels):
            highest = self.num_classes if null_label is None else max(self.num_classes, null_label)
            if int(labels.min()) < 0 or int(labels.max()) > highest:
                raise ValueError(
                    f"labels must lie in 0 .. {self.num_classes - 1}, got {int(labels.min())} .. "
                    f"{int(labels.max())}"
                )
        return Condition(labels.to(self.device), guidance_scale, null_label)

    @property
    def takes_labels(self) -> bool:
        """Whether the backbone is trained with class labels."""
        return self.num_classes is not None

    @property
    def num_classes(self) -> int | None:
        """How many classes the backbone is trained with, or None for none."""
        return self._architecture.num_classes(self.backbone)

    @property
    def null_label(self) -> int | None:
        """The label that the backbone was trained with for no class, or None."""
        return self._architecture.null_label(self.backbone)

    @property
    def device(self) -> torch.device:
        """Device of the backbone's parameters."""
        device: torch.device = next(self.backbone.parameters()).device
        return device

    def predict(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        s: int | None = None,
        condition: Condition | None = None,
        sample_offset: int = 0,
    ) -> Prediction:
        """Return what the backbone says, evaluated at the first look.

        Args:
            x_t: Shape (B, ...).
            t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
            s: Where the reverse step goes; only :class:`ocm.ImprovedDDPM` looks at it.
            condition: Labels and guidance (:meth:`condition`), for a backbone that takes them.
            sample_offset: Number of the first sample.

        Raises:
            TypeError: If t is neither.
            ValueError: If a timestep lies outside 1 .. N (not checked for a tensor on a GPU, which
                would have to be waited for), or there is not one label for each sample.
        """
        self._check_timesteps(t)
        if condition is not None:
            condition.repeated(len(x_t))
        records = torch.is_grad_enabled()
        return Prediction(self, x_t, t, s, condition, sample_offset, records)

    def output(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        condition: Condition | None = None,
        backbone: nn.Module | None = None,
    ) -> Tensor:
        """Return what the backbone predicts, differentiable for its parameters and x_t.

        Args:
            x_t: As in :meth:`predict`.
            t: As in :meth:`predict`.
            condition: As in :meth:`predict`.
            backbone: Called in place of the denoiser's own: the same, wrapped for training.

        Raises:
            TypeError: As :meth:`predict`.
            ValueError: As :meth:`predict`.
        """
        module = self.backbone if backbone is None else backbone

        def call(x: Tensor, level: Tensor, labels: Tensor | None) -> tuple[Tensor]:
            return (self._architecture.call(module, x, level, labels),)

        return self._evaluated(call, x_t, t, condition)[0]

    def evaluate(
        self, x_t: Tensor, t: int | Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and features; under guidance the outputs of both branches too.

        Features and outputs of two branches lie one after the other, without a class first.
        """

        def call(x: Tensor, level: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._architecture.call_with_features(self.backbone, x, level, labels)

        output, *rest = self._evaluated(call, x_t, t, condition)
        return output, tuple(rest)

    def jacobian(
        self,
        x_t: Tensor,
        t: int | Tensor,
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

    def x0_hat(self, x_t: Tensor, t: int | Tensor, output: Tensor) -> Tensor:
        """Return the mean of x0 given x_t, p_t x_t + q_t output, which is not clipped."""
        p, q = self.schedule.x0_from(self.prediction_type)
        return per_sample(p, t, x_t) * x_t + per_sample(q, t, x_t) * output

    def covariance_coefficients(self, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return c and k of Cov[x0 | x_t] = c I + k J, at least float32, which broadcast to x.

        c = beta_bar / sqrt(alpha_bar) p_t and k = beta_bar / sqrt(alpha_bar) q_t, with J the
        Jacobian of the output.
        """
        p, q = self.schedule.x0_from(self.prediction_type)
        factor = self.schedule.beta_bar / self.schedule.alpha_bar.sqrt()
        like = full_precision(x[:0])
        return per_sample(factor * p, t, like), per_sample(factor * q, t, like)

    def _evaluated(
        self,
        call: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]],
        x_t: Tensor,
        t: int | Tensor,
        condition: Condition | None,
    ) -> tuple[Tensor, ...]:
        """Return the output, and what else ``call`` returns; both branches under guidance."""
        self._check_timesteps(t)
        if isinstance(t, int):
            # Filled on the device, where a copy from the host could not be part of a CUDA graph.
            t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        labels = None if condition is None else condition.repeated(len(x_t))
        if condition is None or not condition.is_guided:
            output, *rest = call(x_t, t - 1, labels)
            # Under autocast or in half precision, the output has another type than x_t.
            return output.to(x_t.dtype), *rest
        assert labels is not None
        assert condition.null_label is not None  # checked by Condition
        nulls = torch.full_like(labels, condition.null_label)
        outputs, *rest = call(
            torch.cat([x_t, x_t]), torch.cat([t, t]) - 1, torch.cat([nulls, labels])
        )
        outputs = outputs.to(x_t.dtype)
        return guided(outputs, condition.guidance_scale), *rest, outputs

    def _check_timesteps(self, t: int | Tensor) -> None:
        if not isinstance(t, (int, Tensor)):
            raise TypeError(f"t must be an int or an int64 tensor, got {type(t).__name__}")
        if isinstance(t, Tensor) and t.device.type != "cpu":
            return
        lowest, highest = (t, t) if isinstance(t, int) else (int(t.min()), int(t.max()))
        if not 1 <= lowest <= highest <= self.schedule.num_timesteps:
            raise ValueError(
                f"t must lie in 1 .. {self.schedule.num_timesteps}, got {lowest} .. {highest}"
            )
