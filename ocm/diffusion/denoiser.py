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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.products import Batching, JacobianProducts, Mode
from ocm.diffusion.architectures import Architecture, architecture_of
from ocm.diffusion.schedules import Schedule, check_prediction_type, per_sample


@dataclass(frozen=True, eq=False)
class Condition:
    """Class labels, and how strongly they guide.

    Attributes:
        labels: Class of each sample, int64 of shape (B,).
        guidance_scale: w above; 1 is the plain conditional model.
        null_label: The label that stands for no class; needed for a scale other than 1.
    """

    labels: Tensor
    guidance_scale: float = 1.0
    null_label: int | None = None

    def __post_init__(self) -> None:
        if self.guidance_scale != 1.0 and self.null_label is None:
            raise ValueError(
                f"null_label must be given for guidance_scale = {self.guidance_scale}: the label "
                "that the model was trained with for no class"
            )

    @property
    def is_guided(self) -> bool:
        """Whether each step evaluates the backbone without a class too."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one pass through the backbone says at (x_t, t).

    Attributes:
        x_t: Shape (B, ...).
        t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
        output: What the backbone predicts, of the shape of x_t.
        x0_hat: Mean of x0 given x_t, not clipped.
        features: The input of the backbone's last output layer, shape (B, channels, ...) or
            (B, tokens, channels); under guidance that of the conditional branch.
        sample_offset: Number of the first sample, for covariances that draw probes.
        branches: Under guidance, the weights and predictions of the branches that make it up.
        condition: Labels and guidance that it was made with, or None.
    """

    x_t: Tensor
    t: int | Tensor
    output: Tensor
    x0_hat: Tensor
    features: Tensor
    sample_offset: int = 0
    branches: tuple[tuple[float, Prediction], ...] = ()
    condition: Condition | None = None


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
        condition: Class labels for the samples of a batch, or None.

    Raises:
        ValueError: If the architecture is unknown, its feature layer is missing, or the
            ``prediction_type`` is none of diffusers'.
    """

    backbone: Any
    schedule: Schedule
    prediction_type: str = "epsilon"
    architecture: Architecture | None = None
    condition: Condition | None = None

    def __post_init__(self) -> None:
        check_prediction_type(self.prediction_type)
        if self.architecture is None:
            object.__setattr__(self, "architecture", architecture_of(self.backbone))
        try:
            self.feature_layer  # noqa: B018, looked up for its error
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

    @property
    def feature_layer(self) -> nn.Module:
        """The submodule whose input are the features."""
        module: nn.Module = self.backbone.get_submodule(self._architecture.feature_layer)
        return module

    def freeze(self) -> Denoiser:
        """Put the backbone in eval mode, switch off its gradients, and return the denoiser."""
        self.backbone.eval().requires_grad_(False)
        return self

    def conditioned(
        self, labels: Tensor, guidance_scale: float = 1.0, null_label: int | None = None
    ) -> Denoiser:
        """Return the denoiser of samples with class labels, guided if the scale is not 1.

        Args:
            labels: int64 of shape (B,), for the batches that it will be called with.
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
        condition = Condition(labels.to(self.device), guidance_scale, null_label)
        return replace(self, condition=condition)

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

    def conditioned_as(self, prediction: Prediction) -> Denoiser:
        """Return the denoiser with the labels and the guidance of a prediction."""
        return replace(self, condition=prediction.condition or self.condition)

    @property
    def device(self) -> torch.device:
        """Device of the backbone's parameters."""
        device: torch.device = next(self.backbone.parameters()).device
        return device

    def output(self, x_t: Tensor, t: int | Tensor, *, backbone: nn.Module | None = None) -> Tensor:
        """Return what the backbone predicts, guided if the denoiser is.

        Args:
            x_t: Shape (B, ...).
            t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
            backbone: Called in place of the denoiser's own: the same, wrapped for training.

        Raises:
            TypeError: If t is neither.
            ValueError: If a timestep lies outside 1 .. N (not checked for a tensor on a GPU,
                which would have to be waited for), or there is not one label for each sample.
        """
        condition = self.condition
        if condition is None or not condition.is_guided:
            labels = None if condition is None else self._labels(condition.labels, x_t)
            return self._call(x_t, t, labels, backbone)
        w = condition.guidance_scale
        plain, conditional = self._call(*self._doubled(x_t, t, condition), backbone).chunk(2)
        return (1.0 - w) * plain + w * conditional

    def predict(
        self,
        x_t: Tensor,
        t: int | Tensor,
        *,
        sample_offset: int = 0,
        labels: Tensor | None = None,
    ) -> Prediction:
        """Return what one pass through the backbone says.

        Args:
            x_t: Shape (B, ...).
            t: One timestep in 1 .. N, or an int64 tensor of shape (B,).
            sample_offset: Number of the first sample.
            labels: Class labels of this batch, in place of the denoiser's condition.

        Raises:
            TypeError: As :meth:`output`.
            ValueError: As :meth:`output`.
        """
        if labels is not None:
            return self.conditioned(labels).predict(x_t, t, sample_offset=sample_offset)
        condition = self.condition
        if condition is None or not condition.is_guided:
            labels = None if condition is None else self._labels(condition.labels, x_t)
            output, features = self._call_with_features(x_t, t, labels)
            return self._prediction(x_t, t, output, features, sample_offset)
        w = condition.guidance_scale
        outputs, features = self._call_with_features(*self._doubled(x_t, t, condition))
        branches = tuple(
            (weight, self._prediction(x_t, t, *branch, sample_offset))
            for weight, branch in zip(
                (1.0 - w, w), zip(outputs.chunk(2), features.chunk(2), strict=True), strict=True
            )
        )
        output = torch.stack([weight * branch.output for weight, branch in branches]).sum(dim=0)
        whole = self._prediction(x_t, t, output, branches[1][1].features, sample_offset)
        return replace(whole, branches=branches)

    def x0_hat(self, x_t: Tensor, t: int | Tensor, output: Tensor) -> Tensor:
        """Return the mean of x0 given x_t, p_t x_t + q_t output, which is not clipped."""
        p, q = self.schedule.x0_from(self.prediction_type)
        return per_sample(p, t, x_t) * x_t + per_sample(q, t, x_t) * output

    def x0_coefficients(self, t: int) -> tuple[float, float]:
        """Return p_t and q_t as numbers."""
        p, q = self.schedule.x0_from(self.prediction_type)
        return p[t].item(), q[t].item()

    def covariance_coefficients(self, t: int | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return c and k of Cov[x0 | x_t] = c I + k J, which broadcast to x.

        c = beta_bar / sqrt(alpha_bar) p_t and k = beta_bar / sqrt(alpha_bar) q_t, with J the
        Jacobian of the output.
        """
        p, q = self.schedule.x0_from(self.prediction_type)
        factor = self.schedule.beta_bar / self.schedule.alpha_bar.sqrt()
        like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
        like = like.reshape([0] + [1] * (x.dim() - 1))
        return per_sample(factor * p, t, like), per_sample(factor * q, t, like)

    def output_at(self, t: int | Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function x_t -> output, whose Jacobian the covariances take."""
        return lambda x_t: self.output(x_t, t)

    def covariance_products(
        self, x_t: Tensor, t: int, *, mode: Mode = "auto", batching: Batching = "auto"
    ) -> Callable[[Tensor], Tensor]:
        """Return the products v -> Cov[x0 | x_t] v, for probes v of shape (m, B, ...).

        Args:
            x_t: Shape (B, ...).
            t: Timestep in 1 .. N.
            mode: "vjp" or "jvp": J transposed or J; they differ for a learned network.
            batching: As in :func:`hessdiag.estimate`.
        """
        c, k = self.covariance_coefficients(t, x_t)
        products = JacobianProducts(self.output_at(t), x_t, mode, batching)
        return lambda v: c * v + k * products(v)

    def _prediction(
        self,
        x_t: Tensor,
        t: int | Tensor,
        output: Tensor,
        features: Tensor,
        sample_offset: int,
    ) -> Prediction:
        x0_hat = self.x0_hat(x_t, t, output)
        return Prediction(x_t, t, output, x0_hat, features, sample_offset, condition=self.condition)

    def _call_with_features(
        self, x_t: Tensor, t: int | Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        captured: list[Tensor] = []

        def capture(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])

        hook = self.feature_layer.register_forward_pre_hook(capture)
        try:
            output = self._call(x_t, t, labels)
        finally:
            hook.remove()
        return output, captured[0].detach()

    def _call(
        self,
        x_t: Tensor,
        t: int | Tensor,
        labels: Tensor | None,
        backbone: nn.Module | None = None,
    ) -> Tensor:
        if not isinstance(t, (int, Tensor)):
            raise TypeError(f"t must be an int or an int64 tensor, got {type(t).__name__}")
        if isinstance(t, int):
            self._check_timesteps(t, t)
            # Filled on the device, where a copy from the host could not be part of a CUDA graph.
            t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        elif t.device.type == "cpu":
            self._check_timesteps(int(t.min()), int(t.max()))
        module = self.backbone if backbone is None else backbone
        # Under autocast or in half precision, the output has another type than x_t.
        return self._architecture.call(module, x_t, t - 1, labels).to(x_t.dtype)

    def _check_timesteps(self, lowest: int, highest: int) -> None:
        if not 1 <= lowest <= highest <= self.schedule.num_timesteps:
            raise ValueError(
                f"t must lie in 1 .. {self.schedule.num_timesteps}, got {lowest} .. {highest}"
            )

    def _labels(self, labels: Tensor, x_t: Tensor) -> Tensor:
        # Products may lay probes out as further samples of the batch.
        if len(labels) == 0 or len(x_t) % len(labels):
            raise ValueError(
                "labels must be one for each sample of a batch, or of each of its copies, got "
                f"{len(labels)} for {len(x_t)} samples"
            )
        return labels.repeat(len(x_t) // len(labels))

    def _doubled(
        self, x_t: Tensor, t: int | Tensor, condition: Condition
    ) -> tuple[Tensor, int | Tensor, Tensor]:
        """Lay the batch without a class before the batch with it."""
        labels = self._labels(condition.labels, x_t)
        assert condition.null_label is not None  # checked by Condition
        t = torch.cat([t, t]) if isinstance(t, Tensor) else t
        nulls = torch.full_like(labels, condition.null_label)
        return torch.cat([x_t, x_t]), t, torch.cat([nulls, labels])
