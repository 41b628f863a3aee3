"""Analytic-DPM (Bao et al., 2022): one variance for each timestep, from one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocm.covariances.base import Covariance, constant
from ocm.covariances.operators import SpectralCovariance, variance_bound
from ocm.diffusion.checks import check_samples, check_timesteps
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.draws import FITTING
from ocm.diffusion.noise import labelled, noisy_prediction
from ocm.diffusion.tables import Table
from ocm.progress import tracked


@dataclass(frozen=True, eq=False)
class Analytic(Covariance):
    """Cov[x0 | x_t] = Var_t I (Analytic-DPM, Bao et al., ICLR 2022).

    Made by :func:`ocm.fit_analytic` or :func:`ocm.fit_analytic_from_data`; it costs nothing then.

    Attributes:
        denoiser: Whose schedule it is.
        scaled_variances: Var_t (1 + SNR_t) by timestep, which changes slowly with t: from the
            variance of the data at t = N to at most 1 at t = 0, for a true score.

    Raises:
        TypeError: By ``at``, if there is not one timestep for the batch.
        ValueError: By ``at``, if t lies outside the table.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> covariance = ocm.Analytic(denoiser, ocm.diffusion.tables.Table({1: [1.0], 1000: [1.0]}))
        >>> covariance.variances(x0_range=None)[499].item()    # at t = 500
        0.5
    """

    denoiser: Denoiser
    scaled_variances: Table

    def variances(self, x0_range: tuple[float, float] | None = (-1.0, 1.0)) -> Tensor:
        """Return Var_t for t = 1 .. N, float64, bounded to what data in ``x0_range`` allow.

        These are what :func:`ocm.optimal_timesteps` takes; those that were fitted from data, since
        near t = N many samples are needed to tell the ones from the score from zero.

        Raises:
            ValueError: If the table does not reach from 1 to N.
        """
        levels = range(1, self.denoiser.schedule.num_timesteps + 1)
        bound = variance_bound(x0_range)
        variances = [self._variance(t) for t in levels]
        return torch.tensor(variances, dtype=torch.float64).clamp(0.0, bound)

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return Var_t I.

        Raises:
            ValueError: If t lies outside the table.
        """
        return constant(self._variance(prediction.timestep), prediction)

    def _variance(self, t: float) -> float:
        # beta_bar = 1 / (1 + SNR)
        return self.scaled_variances.numbers(None, t)[0] * self.denoiser.schedule.level(t).beta_bar


@torch.no_grad()
def fit_analytic(
    denoiser: Denoiser,
    x0: Tensor,
    timesteps: Sequence[float],
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Analytic:
    """Estimate Var_t = (beta_bar / alpha_bar) (1 - E|epsilon|^2 / D) from the score.

    The mean square of the noise that was drawn, whose expectation is 1, is a control variate: near
    t = N, where epsilon nearly equals it, a few samples would not tell the difference from zero.

    Args:
        denoiser: The frozen denoiser.
        x0: Training data, shape (n, ...); a thousand images are plenty.
        timesteps: Where to estimate it; between them Var_t (1 + SNR_t) is interpolated.
        labels: Class of each sample, for a denoiser that takes them.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        progress: Whether to show a progress bar.

    Returns:
        The covariance: one variance for each timestep.

    Raises:
        TypeError: If x0 is no floating-point tensor, ``batch_size`` no int, or ``timesteps`` no
            sequence.
        ValueError: If x0 is empty or not finite, there is not one label for each sample, a
            timestep lies outside the schedule or there is none, or the denoiser's output is no
            posterior mean.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> covariance = ocm.fit_analytic(denoiser, x0, [250, 500, 750])
        >>> variance = covariance.at(denoiser.predict(x0, 500)).diagonal()
        >>> abs(variance.item() - 0.5) < 0.05
        True
    """
    check_samples(x0, labels, batch_size)
    denoiser.check_states_a_mean()
    schedule = denoiser.schedule

    def variance(t: float) -> float:
        alpha, sigma, *_ = schedule.level(t)
        if alpha == 0:
            return x0.double().var(dim=0).mean().item()
        squares = []
        for first in range(0, len(x0), batch_size):
            batch = x0[first : first + batch_size]
            condition = labelled(denoiser, labels, first, len(batch))
            prediction = noisy_prediction(
                denoiser, batch, t, seed, first, condition=condition, draw=FITTING
            )
            pair = [
                (prediction.x_t.double() - alpha * mean.to(prediction.x_t).double()) / sigma
                for mean in (batch, prediction.x0_hat)
            ]
            squares.append(torch.stack([noise.square().flatten() for noise in pair]).cpu())
        drawn, predicted = torch.cat(squares, dim=1)
        covariance = torch.cov(torch.stack([drawn, predicted]))
        weight = covariance[0, 1] / covariance[0, 0].clamp(min=torch.finfo(torch.float64).tiny)
        fraction = 1.0 - predicted.mean() + weight * (drawn.mean() - 1.0)
        return float(fraction * (sigma / alpha) ** 2)

    return Analytic(denoiser, _tabulate(denoiser, variance, timesteps, progress))


@torch.no_grad()
def fit_analytic_from_data(
    denoiser: Denoiser,
    x0: Tensor,
    timesteps: Sequence[float],
    *,
    labels: Tensor | None = None,
    x0_range: tuple[float, float] | None = (-1.0, 1.0),
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> Analytic:
    """Estimate Var_t = E|x0 - x0_hat|^2 / D from the data.

    The product 2 (x0 - x0_hat) (x0_hat - mu) of a posterior mean, whose expectation is 0, is a
    control variate; with weight 1 it would make this the law of total variance,
    Var[x0] - E|x0_hat - mu|^2 / D, which little noise leaves to chance. mu is the mean of each
    dimension. The result is at most ((high - low) / 2)^2 for data in ``x0_range``, which x0_hat is
    clipped to.

    Args:
        denoiser: As in :func:`fit_analytic`, like what is not listed here.
        x0: Training data, shape (n, ...).
        timesteps: Where to estimate it.
        labels: Class of each sample.
        x0_range: Where the data lie; None for data without bounds.
        seed: Seed of the noise.
        batch_size: Samples at a time.
        progress: Whether to show a progress bar.

    Returns:
        The covariance: one variance for each timestep.

    Raises:
        TypeError: As :func:`fit_analytic`, or if ``x0_range`` is no pair.
        ValueError: As :func:`fit_analytic`, or if ``x0_range`` is not in order.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> timesteps = range(1, 1001, 111)
        >>> covariance = ocm.fit_analytic_from_data(denoiser, x0, timesteps, x0_range=None)
        >>> variances = covariance.variances(x0_range=None)    # for ocm.optimal_timesteps
        >>> variances.shape, abs(variances[499].item() - 0.5) < 0.05
        (torch.Size([1000]), True)
    """
    check_samples(x0, labels, batch_size)
    bound = variance_bound(x0_range)
    denoiser.check_states_a_mean()
    mean = x0.double().mean(dim=0).cpu()

    def variance(t: float) -> float:
        pairs = []
        for first in range(0, len(x0), batch_size):
            batch = x0[first : first + batch_size]
            condition = labelled(denoiser, labels, first, len(batch))
            prediction = noisy_prediction(
                denoiser, batch, t, seed, first, condition=condition, draw=FITTING
            )
            x0_hat = prediction.x0_hat if x0_range is None else prediction.x0_hat.clamp(*x0_range)
            x0_hat = x0_hat.double().cpu()
            error = batch.double().cpu() - x0_hat
            terms = error.square(), 2.0 * error * (x0_hat - mean)
            pairs.append(torch.stack([term.flatten() for term in terms]))
        errors, products = torch.cat(pairs, dim=1)
        covariance = torch.cov(torch.stack([errors, products]))
        weight = covariance[0, 1] / covariance[1, 1].clamp(min=torch.finfo(torch.float64).tiny)
        variance = errors.mean() - weight * products.mean()
        return float(min(max(variance.item(), 0.0), bound))

    return Analytic(denoiser, _tabulate(denoiser, variance, timesteps, progress))


def _tabulate(
    denoiser: Denoiser,
    variance: Callable[[float], float],
    timesteps: Sequence[float],
    progress: bool,
) -> Table:
    ordered = sorted(set(check_timesteps(timesteps)))
    for t in ordered:
        denoiser.schedule.check(t)
    shown = tracked(ordered, "analytic", "timesteps", shown=progress)
    return Table({t: [variance(t) / denoiser.schedule.level(t).beta_bar] for t in shown})
