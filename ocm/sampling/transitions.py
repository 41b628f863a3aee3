"""The reverse step as a distribution p(x_s | x_t): its draws and its log-density.

Reinforcement learning of diffusion and flow models, importance weights and annealed samplers need
log p(x_s | x_t) of every step that was taken. With the posterior covariance a step has the right
second moments at any number of steps, and its density is known::

    trajectory = ocm.sample_trajectory(denoiser, covariance, shape, steps=10)
    ratio = (ocm.trajectory_log_prob(denoiser, covariance, trajectory) - trajectory.log_prob).exp()

All of it is computed in float32 at least, whatever the type of the model and of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.kernels import normal, seed_tensor
from ocm.covariances.base import Covariance, check_covariance
from ocm.covariances.operators import PosteriorCovariance, spectral
from ocm.diffusion import draws
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.schedules import full_precision
from ocm.diffusion.timesteps import reverse_steps, timesteps_of
from ocm.sampling.finite import all_finite, check_step
from ocm.sampling.samplers import (
    X0_RANGE,
    ReverseStep,
    Sampler,
    check_options,
    check_reverse_step,
    ddpm,
    starting_noise,
)


@dataclass(frozen=True, eq=False)
class Transition:
    """p(x_s | x_t) = N(mean, covariance) for every sample of a batch.

    Attributes:
        mean: Shape (B, ...), float32 at least.
        covariance: Of x_s, an operator on tensors of that shape.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(2, 1, 4, 4), 800, s=600)
        >>> step = ocm.ddpm(denoiser.schedule, 600, 800)
        >>> law = ocm.transition(prediction, ocm.Beta(denoiser), step)
        >>> x_s = law.draw(torch.zeros(2, 1, 4, 4))    # its mean
        >>> bool((law.log_prob(x_s) > law.log_prob(x_s + 0.1)).all())
        True
    """

    mean: Tensor
    covariance: PosteriorCovariance

    def draw(self, z: Tensor) -> Tensor:
        """Return mean + C^(1/2) z for standard normal z.

        Raises:
            ValueError: If z is not of the shape of the mean.
        """
        _check_shape("z", z, self.mean)
        return self.mean + self.covariance.noise(z.to(self.mean))

    def log_prob(self, x_s: Tensor) -> Tensor:
        """Return log p(x_s | x_t) in nats, the sum over all dimensions, shape (B,).

        Raises:
            TypeError: If the covariance has no density (Lanczos).
            ValueError: If the step adds no noise in some direction, where there is no density; or
                x_s is not of the shape of the mean.
        """
        log_prob, is_positive = self.density(x_s)
        _check_positive(is_positive)
        return log_prob

    def density(self, x_s: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x_s | x_t), shape (B,), and whether there is a density, shape ().

        There is none where a variance is zero, infinite or NaN.

        Nothing is read back from a GPU.
        """
        _check_shape("x_s", x_s, self.mean)
        known = spectral(self.covariance)
        # Of one sample, an eigenvalue may stand for several dimensions.
        whitened = known.basis.analyse(full_precision(x_s) - self.mean)
        variance = known.eigenvalues.expand(whitened.shape)
        terms = whitened.square() / variance + variance.log() + math.log(2.0 * math.pi)
        has_density = (known.eigenvalues > 0) & (known.eigenvalues < torch.inf)
        return -0.5 * terms.flatten(1).sum(dim=1), has_density.all()


def _check_shape(name: str, x: object, mean: Tensor) -> None:
    if not isinstance(x, Tensor) or x.shape != mean.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must have the shape of the mean, {tuple(mean.shape)}, got {got}")


def _check_positive(is_positive: Tensor) -> None:
    if not bool(is_positive.all()):
        raise ValueError(
            "covariance must be positive for log p(x_s | x_t) and finite, and this step adds no "
            "noise in some direction, or NaN: take a sampler with noise (ocm.ddpm, ocm.renoised), "
            "or a covariance that is positive"
        )


def transition(
    prediction: Prediction,
    covariance: Covariance,
    step: ReverseStep,
    *,
    x0_range: tuple[float, float] | None = X0_RANGE,
) -> Transition:
    """Return p(x_s | x_t) = N(a x_t + b x0_hat, lambda^2 I + b^2 Cov[x0 | x_t]).

    Args:
        prediction: The prediction at (x_t, t). Where gradients are recorded the mean carries those
            of the backbone; products with its Jacobian are taken as constants.
        covariance: States Cov[x0 | x_t].
        step: That of a sampler, ``ocm.ddpm(schedule, s, t)`` say.
        x0_range: Where x0_hat is clipped to, and what bounds the covariance; None for no bounds.

    Raises:
        TypeError: If the covariance states none, or the step is none.
        ValueError: If the step is not finite, or the range not in order.

    Example:
        The variance of x_s, of standard normal data with its own covariance:

        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> prediction = denoiser.predict(torch.ones(2, 1, 4, 4), 800)
        >>> step = ocm.ddpm(denoiser.schedule, 400, 800)
        >>> law = ocm.transition(prediction, ocm.Beta(denoiser), step)
        >>> law.mean.shape, round(law.covariance.diagonal().item(), 3)
        (torch.Size([2, 1, 4, 4]), 0.476)
    """
    check_covariance(covariance)
    check_reverse_step(step)
    denoiser, x_t = prediction.denoiser, full_precision(prediction.x_t)
    stated = covariance.at(prediction).bounded(x0_range)
    if prediction.keeps_jacobian and torch.is_grad_enabled():
        # Which has no graph to the parameters of the backbone.
        prediction = denoiser.predict(
            prediction.x_t, prediction.t, s=prediction.s, condition=prediction.condition
        )
    x0_hat = denoiser.x0_hat(x_t, prediction.t, full_precision(prediction.output))
    if x0_range is not None:
        x0_hat = x0_hat.clamp(*x0_range)
    a, b, noise_variance = step
    return Transition(a * x_t + b * x0_hat, stated.affine(b**2, noise_variance))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A batch of samples with all states on the way.

    Attributes:
        timesteps: t_K > ... > t_1, where each state but the last lies; then 0.
        states: x at these, shape (K + 1, B, ...).
        log_prob: log p(x_s | x_t) of each step that drew noise, in nats, float32 of shape
            (B, steps): all but the last, or all with noise at the end.
        sample_offset: Number of the first sample.

    Example:
        >>> import ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> trajectory = ocm.sample_trajectory(denoiser, ocm.Beta(denoiser), (2, 1, 4, 4), steps=4)
        >>> trajectory.timesteps, trajectory.states.shape, trajectory.x0.shape
        ([1000, 667.0, 334.0, 1.0, 0], torch.Size([5, 2, 1, 4, 4]), torch.Size([2, 1, 4, 4]))
    """

    timesteps: list[float]
    states: Tensor
    log_prob: Tensor
    sample_offset: int = 0

    @property
    def x0(self) -> Tensor:
        """The samples, shape (B, ...)."""
        return self.states[-1]


@torch.no_grad()
def sample_trajectory(
    denoiser: Denoiser,
    covariance: Covariance,
    shape: Sequence[int],
    steps: int | Sequence[float],
    *,
    sampler: Sampler = ddpm,
    condition: Condition | None = None,
    seed: int = 0,
    sample_offset: int = 0,
    x0_range: tuple[float, float] | None = X0_RANGE,
    noise_at_end: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Draw samples as :func:`ocm.sample` does, and keep every state and its log-density.

    The density is that of the state as it is kept, rounded to ``dtype``. No gradients are recorded:
    those are for :func:`trajectory_log_prob`.

    Args:
        denoiser: As in :func:`ocm.sample`, as all here.
        covariance: States Cov[x0 | x_t], with eigenvalues.
        shape: (B, ...).
        steps: Number of timesteps, or the timesteps.
        sampler: Whose steps add noise, all but the last; not :class:`ocm.SecondOrder`.
        condition: Class labels and guidance.
        seed: Seed of the noise.
        sample_offset: Number of the first sample.
        x0_range: Where the data lie, or None.
        noise_at_end: Whether the last step draws noise too.
        dtype: Type of the states.

    Returns:
        The states of the trajectory and the log-probabilities of its steps.

    Raises:
        TypeError: If the covariance has no density (Lanczos), or the sampler looks at more than
            x_t.
        ValueError: As :func:`ocm.sample`, or if a step but the last adds no noise.
        FloatingPointError: As :func:`ocm.sample`.

    Example:
        >>> import ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> trajectory = ocm.sample_trajectory(denoiser, ocm.Beta(denoiser), (2, 1, 4, 4), steps=4)
        >>> trajectory.log_prob.shape    # the last of 4 steps is without noise
        torch.Size([2, 3])
    """
    check_options(denoiser, covariance, sampler, x0_range, dtype)
    timesteps, number = timesteps_of(denoiser.schedule, steps), seed_tensor(seed, denoiser.device)
    x = starting_noise(denoiser, shape, timesteps[-1], number, sample_offset).to(dtype)
    states, densities = [x], []
    for s, t in reverse_steps(timesteps):
        prediction = denoiser.predict(
            full_precision(x), t, s=s, condition=condition, sample_offset=sample_offset
        )
        step = sampler(denoiser.schedule, s, t)
        law = transition(prediction, covariance, step, x0_range=x0_range)
        if s > 0 or noise_at_end:
            draw = draws.of_level(t)
            z = normal(shape, number, step=draw, sample_offset=sample_offset, device=x.device)
            x = law.draw(z).to(dtype)
            densities.append(law.density(x))
        else:
            x = law.mean.to(dtype)
        states.append(x)
    drawn = torch.stack(states)
    if not all_finite(drawn):
        before = max(0, int(drawn.isfinite().flatten(1).all(dim=1).int().argmin()) - 1)
        s, t = reverse_steps(timesteps)[before]
        prediction = denoiser.predict(
            full_precision(states[before]),
            t,
            s=s,
            condition=condition,
            sample_offset=sample_offset,
        )
        stated = covariance.at(prediction).bounded(x0_range)
        check_step(drawn, prediction, covariance, stated)
    log_prob = _stacked(densities) if densities else x.new_zeros(len(x), 0).float()
    return Trajectory([*timesteps[::-1], 0], drawn, log_prob, sample_offset)


def trajectory_log_prob(
    denoiser: Denoiser,
    covariance: Covariance,
    trajectory: Trajectory,
    *,
    sampler: Sampler = ddpm,
    condition: Condition | None = None,
    x0_range: tuple[float, float] | None = X0_RANGE,
) -> Tensor:
    """Return log p(x_s | x_t) of the steps of a trajectory by this denoiser, shape (B, steps).

    Differentiable for the parameters of the backbone, through the mean, and of a head, through the
    covariance: the gradient of a policy, or the ratio of two of them.

    Args:
        denoiser: The denoiser, not frozen where its gradients are wanted.
        covariance: States Cov[x0 | x_t].
        trajectory: Of :func:`sample_trajectory`.
        sampler: As the trajectory was drawn.
        condition: As the trajectory was drawn.
        x0_range: As the trajectory was drawn.

    Raises:
        TypeError: If the covariance has no density (Lanczos).
        ValueError: If a step adds no noise.

    Example:
        The gradient of a reward's policy, for one parameter:

        >>> import torch, ocm
        >>> scale = torch.zeros((), requires_grad=True)
        >>> denoiser = ocm.Denoiser(lambda x, time: scale * x, ocm.flow(), "v_prediction")
        >>> covariance = ocm.Beta(denoiser)
        >>> trajectory = ocm.sample_trajectory(denoiser, covariance, (2, 1, 4, 4), steps=4)
        >>> log_prob = ocm.trajectory_log_prob(denoiser, covariance, trajectory)
        >>> bool((log_prob - trajectory.log_prob).abs().max() < 1e-3)
        True
        >>> reward = trajectory.x0.mean(dim=(1, 2, 3))
        >>> (reward[:, None] * log_prob).mean().backward()
        >>> scale.grad.shape
        torch.Size([])
    """
    times, states = trajectory.timesteps, trajectory.states
    densities = []
    for k in range(trajectory.log_prob.shape[1]):
        t, s = times[k], times[k + 1]
        prediction = denoiser.predict(
            full_precision(states[k]),
            t,
            s=s,
            condition=condition,
            sample_offset=trajectory.sample_offset,
        )
        step = sampler(denoiser.schedule, s, t)
        law = transition(prediction, covariance, step, x0_range=x0_range)
        densities.append(law.density(states[k + 1]))
    return _stacked(densities) if densities else trajectory.log_prob


def _stacked(densities: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return log p of all steps, shape (B, steps), and look once whether there is a density."""
    log_probs, are_positive = zip(*densities, strict=True)
    _check_positive(torch.stack(are_positive))
    return torch.stack(log_probs, dim=1)
