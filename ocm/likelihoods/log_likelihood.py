"""Log-likelihoods by the probability-flow ODE, with an error for every part that is estimated.

Along a solution from the data, z_1, to noise, z_N::

    log p(z_1) = log N(z_N; 0, I) + integral of div(dz/domega) domega

(:mod:`ocm.likelihoods.probability_flow`). It is the density of data with the noise of the first
timestep; images get a bound on the probability of their grey levels from it
(:mod:`ocm.likelihoods.dequantisation`).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from hessdiag.kernels import normal
from ocm.covariances.base import Covariance, check_covariance
from ocm.diffusion import draws
from ocm.diffusion.checks import check_batch, check_finite
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import at_least_float32
from ocm.likelihoods.dequantisation import Dequantisation, dequantise
from ocm.likelihoods.integral import Integral, Probing, integrate
from ocm.likelihoods.probability_flow import ProbabilityFlow
from ocm.likelihoods.settings import LikelihoodSettings, LogLikelihood
from ocm.sampling.likelihood import check_images, decoder_term
from ocm.sampling.samplers import X0_RANGE


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    settings: LikelihoodSettings | None = None,
    *,
    levels: int | None = None,
    dequantisation: Dequantisation | None = None,
    covariance: Covariance | None = None,
    first_timestep: float = 1,
    condition: Condition | None = None,
    seed: int = 0,
    sample_offset: int = 0,
    differentiable: bool = False,
    progress: bool = False,
) -> LogLikelihood:
    """Return the log-likelihood of each sample by the probability-flow ODE (Song et al., 2021).

    The model's density is that of the data with the noise of the first timestep, y = x_t1 / alpha;
    with it, images get a bound on log P of their grey levels
    (:mod:`ocm.likelihoods.dequantisation`).

    With fixed steps a sample's result does not depend on the batch it comes in. An adaptive solver
    suits its steps to the batch, and so does the last digit of a sample.

    Args:
        denoiser: The frozen denoiser of any path: diffusion, flow or EDM. Between the timesteps of
            a discrete schedule the network is told numbers that are not whole.
        x: Data of shape (B, ...), where ``levels`` is None; else images in [-1, 1] on the grid of
            that many grey levels.
        settings: Solver, probes and draws; :func:`ocm.likelihood_settings` chooses them by a
            tolerance. None takes the defaults, which are right to about 0.01 bits/dim on images.
        levels: Number of grey levels, or None for continuous data.
        dequantisation: "uniform", "truncated_normal" or "decoder"; None is the first, or the third
            where a covariance is given.
        covariance: States Var[x0 | x_t1] for the decoder.
        first_timestep: t_1 in (0, N), at least 1 on a discrete schedule.
        condition: Labels, tensors and guidance.
        seed: Of probes and dequantisation noise.
        sample_offset: Number of the first sample.
        differentiable: Whether ``value`` carries gradients to x and to the network's parameters,
            through all steps; their graphs are kept.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If x is not finite, or images leave the grid; or an argument is out of range.
        FloatingPointError: If a log-likelihood is not finite.

    Example:
        Standard normal data on the straight path, whose velocity is known:

        >>> import torch, ocm
        >>> def velocity(x, time):
        ...     u = time[:, None] / 1000
        ...     return (2 * u - 1) / (u**2 + (1 - u) ** 2) * x
        >>> denoiser = ocm.Denoiser(velocity, ocm.flow(), "flow_prediction")
        >>> found = ocm.log_likelihood(denoiser, torch.zeros(1, 2).double())
        >>> round(found.value.item(), 3)    # - log(2 pi)
        -1.838
    """
    settings = LikelihoodSettings() if settings is None else settings
    if not isinstance(settings, LikelihoodSettings):
        raise TypeError(f"settings must be ocm.LikelihoodSettings, got {type(settings).__name__}")
    check_batch("x", x)
    if len(x) == 0:
        raise ValueError(f"x must hold at least one sample, got shape {tuple(x.shape)}")
    dequantisation = _checked(x, levels, dequantisation, covariance)
    if covariance is not None:
        check_covariance(covariance)
    x = x.to(denoiser.device)
    shape = tuple(x.shape[1:])
    # A network of half precision is shown its own type all the same.
    dtype = at_least_float32(x.dtype)
    ode = ProbabilityFlow.of(denoiser, condition, differentiable=differentiable)
    _check_first(first_timestep, ode.last_timestep, denoiser.schedule.is_continuous)
    design = settings.design(shape)
    block = design.block_size(shape)
    count = max(block, settings.max_probes // block * block)
    if count > settings.max_probes:
        raise ValueError(
            f"max_probes must be at least {block}, a block of {design}, got {settings.max_probes}"
        )
    logs: list[Tensor] = []
    found: list[Integral] = []
    with nullcontext() if differentiable else torch.no_grad():
        for draw in range(1 if levels is None else settings.num_draws):
            y, log_weight = x.double(), torch.zeros(len(x), dtype=torch.float64, device=x.device)
            if levels is not None:
                step = draws.DEQUANTISATION + draw
                noise = normal(
                    x.shape, seed, step=step, sample_offset=sample_offset, device=x.device
                )
                std = math.exp(-0.5 * denoiser.schedule.log_snr(first_timestep).item())
                y, log_weight = dequantise(x, noise, dequantisation, levels=levels, std=std)
            if covariance is not None:
                assert levels is not None  # checked above
                prediction = denoiser.predict(
                    (denoiser.schedule.alpha(first_timestep).item() * y).to(dtype),
                    first_timestep,
                    condition=condition,
                    sample_offset=sample_offset,
                )
                stated = covariance.at(prediction).bounded(X0_RANGE)
                bits = decoder_term(stated, prediction, x, levels)
                log_weight = log_weight - bits * math.prod(shape) * math.log(2)
            # Draws that are weighed against each other share their probes: their errors would
            # weigh otherwise.
            number = 0 if settings.importance_weighted else draw
            probing = Probing(
                design,
                count,
                seed,
                sample_offset,
                number * settings.num_sets_of_probes * count,
            )
            found.append(
                integrate(ode, y, dtype, first_timestep, settings, probing, progress=progress)
            )
            logs.append(found[-1].log_density + log_weight)
    return _combined(torch.stack(logs), found, settings, levels is None, math.prod(shape))


def _check_first(first: float, last: float, is_continuous: bool) -> None:
    is_noisy = first > 0 if is_continuous else first >= 1
    if not (is_noisy and first < last):
        raise ValueError(
            f"first_timestep must lie in {'(0' if is_continuous else '[1'}, {last:g}), where there "
            f"are both noise and data, got {first}"
        )


def _checked(
    x: Tensor,
    levels: int | None,
    dequantisation: Dequantisation | None,
    covariance: Covariance | None,
) -> Dequantisation:
    """Return the dequantisation, after a look at the data."""
    if levels is None:
        if dequantisation is not None or covariance is not None:
            raise ValueError(
                "dequantisation and covariance must be left out for continuous data, which have "
                "levels=None"
            )
        check_finite("x", x.detach())
        return "uniform"
    if dequantisation is None:
        dequantisation = "uniform" if covariance is None else "decoder"
    if (dequantisation == "decoder") != (covariance is not None):
        raise ValueError(
            "covariance must be given with dequantisation='decoder', whose variance it states, and "
            f"with no other, got {dequantisation!r}"
        )
    check_images(x.detach(), levels)
    return dequantisation


def _combined(
    logs: Tensor,
    found: list[Integral],
    settings: LikelihoodSettings,
    is_continuous: bool,
    num_features: int,
) -> LogLikelihood:
    """Return what draws of dequantisation noise say together; logs are of shape (draws, B)."""
    R = len(logs)
    variances = torch.stack([one.variance for one in found])
    fourths = torch.stack([one.fourth for one in found])
    if settings.importance_weighted:
        value = logs.logsumexp(0) - math.log(R)
        # Never 0, which infinite variances would make NaN.
        shares = (logs - logs.logsumexp(0)).exp().detach().clamp(min=1e-300)
        # Probes are shared, and so are their errors.
        variance = (shares * variances.sqrt()).sum(0).square()
        fourth = (shares * fourths.sqrt()).sum(0).square()
        spread = (R * shares).var(0) / R if R > 1 else None
    else:
        value = logs.mean(0)
        variance, fourth = variances.sum(0) / R**2, fourths.sum(0) / R**4
        # What differs between draws is in part the errors of their probes.
        spread = (logs.detach().var(0) / R - variance).clamp(min=0) if R > 1 else None
    if spread is None:
        spread = torch.full_like(variance, 0.0 if is_continuous else torch.inf)
    degrees = torch.where(fourth > 0, variance.square() / fourth, torch.inf)
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(
            f"the log-likelihood of {int((~torch.isfinite(value)).sum())} of {len(value)} samples "
            "is not finite; does the denoiser return NaN?"
        )
    return LogLikelihood(
        value=value,
        log_prior=torch.stack([one.log_prior for one in found]).mean(0),
        probe_stderr=variance.sqrt(),
        draw_stderr=spread.sqrt(),
        degrees=torch.where(variance.isinf(), 0.0, degrees),
        num_features=num_features,
        num_evaluations=sum(one.num_evaluations for one in found),
        num_products=sum(one.num_products for one in found),
        settings=settings,
    )
