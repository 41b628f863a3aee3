"""Settings of a log-likelihood by the error that it may have, measured on a few samples.

The error of a sample has three parts, in bits/dim: what the solver does with so many steps, and
the standard errors by probes and by dequantisation noise. Of a tolerance e the first may be e/2 and
the variances of the others 3/4 e^2 together. With V_M the variance by M products an evaluation, V_d
that by dequantisation noise, and R draws of it::

    (V_d + V_M) / R <= 3/4 e^2    at the least cost R (1 + 3/2 M),

where a product costs about one and a half evaluations of the network.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ocm.diffusion.checks import check_number
from ocm.diffusion.denoiser import Denoiser
from ocm.likelihoods.log_likelihood import log_likelihood
from ocm.likelihoods.settings import LikelihoodSettings

_FEWEST_STEPS, _MOST_STEPS = 8, 512
_MOST_DRAWS = 256
# Products of the two measurements. Below so many "auto" takes Rademacher probes, then colors.
_FEW, _MANY = 8, 48
_FEWEST_COLORED = 24
_COST_OF_A_PRODUCT = 1.5


def likelihood_settings(
    denoiser: Denoiser,
    x: Tensor,
    tolerance: float,
    *,
    levels: int | None = None,
    seed: int = 0,
    **options: Any,
) -> LikelihoodSettings:
    """Return settings with which the error of a sample is about the tolerance.

    Args:
        denoiser: The denoiser.
        x: A few samples to measure on, eight say, as :func:`ocm.log_likelihood` takes them. Errors
            are root mean squares over them.
        tolerance: In bits/dim.
        levels: Number of grey levels, or None.
        seed: Of probes and dequantisation noise.
        options: Further arguments of :func:`ocm.log_likelihood`.

    Raises:
        ValueError: If the tolerance is not positive, there are no samples, or it takes more than
            512 steps or 256 draws.

    Example:
        >>> import torch, ocm
        >>> def velocity(x, time):
        ...     u = time[:, None] / 1000
        ...     return (2 * u - 1) / (u**2 + (1 - u) ** 2) * x
        >>> denoiser = ocm.Denoiser(velocity, ocm.flow(), "flow_prediction")
        >>> found = ocm.likelihood_settings(denoiser, torch.zeros(2, 2).double(), 0.01)
        >>> found.num_steps, found.max_probes, found.num_draws
        (8, 2, 1)
    """
    check_number("tolerance", tolerance)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, in bits/dim, got {tolerance}")
    if len(x) == 0:
        raise ValueError("x must hold samples to measure on, got none")
    D = x[0].numel()
    allowed = tolerance * D * math.log(2)

    def taken(settings: LikelihoodSettings, **more: Any) -> Any:
        return log_likelihood(denoiser, x, settings, levels=levels, seed=seed, **options, **more)

    settings, error = _enough_steps(taken, allowed / 2, D)
    settings = replace(settings, solver_error=error)
    target = 0.75 * allowed**2
    is_image = levels is not None

    def measured(M: int) -> tuple[float, float]:
        """Return the variances of one draw by M products and by dequantisation noise."""
        R = 2 if is_image else 1
        found = taken(replace(settings, max_probes=M, num_draws=R))
        of_probes, of_draws = (
            R * error.square().mean().item() for error in (found.probe_stderr, found.draw_stderr)
        )
        return of_probes, of_draws

    few, noise = measured(min(_FEW, D))
    each = [few * min(_FEW, D)] * 2  # the variance by one product, without colors and with them
    # Colors are measured where so many products may pay.
    wanted = (
        each[0] / target
        if not is_image
        else math.sqrt(each[0] / (_COST_OF_A_PRODUCT * max(noise, 1e-12)))
    )
    if _FEWEST_COLORED < wanted and _MANY < D:
        each[1] = min(each[0], _MANY * measured(_MANY)[0])

    def variance(M: int) -> float:
        return 0.0 if M >= D else each[M >= _FEWEST_COLORED] / M

    best: tuple[float, int, int] | None = None
    # In few dimensions the exact trace is as cheap as any, and nothing else was measured.
    for M in [D] if D <= _FEW else {2**k for k in range(1, D.bit_length())} | {24, 48, 96, D}:
        if M > D:
            continue
        R = math.ceil((noise + variance(M)) / target) if is_image else 1
        R = max(R, 2) if is_image else R
        if R <= _MOST_DRAWS and (is_image or variance(M) <= target):
            best = min(best or (math.inf, 0, 0), (R * (1 + _COST_OF_A_PRODUCT * M), M, R))
    if best is None:
        raise ValueError(
            f"tolerance must be larger: {tolerance} bits/dim take more than {_MOST_DRAWS} draws of "
            f"dequantisation noise, whose standard deviation is {noise**0.5 / D / math.log(2):.3g}"
        )
    return replace(settings, max_probes=best[1], num_draws=best[2])


def _enough_steps(taken: Any, allowed: float, D: int) -> tuple[LikelihoodSettings, float]:
    """Return the fewest steps that twice as many change by no more than ``allowed``, and by what.

    With the same probes at every evaluation and in both, which are no part of the difference.
    """
    M = min(2, D)
    settings = LikelihoodSettings(
        num_steps=_FEWEST_STEPS, max_probes=M, probes="auto" if M == D else "rademacher"
    )
    coarse = taken(replace(settings, new_probes=False)).value
    while settings.num_steps <= _MOST_STEPS:
        finer = replace(settings, num_steps=2 * settings.num_steps)
        fine = taken(replace(finer, new_probes=False)).value
        error = (fine - coarse).square().mean().sqrt().item()
        if error <= allowed:
            return replace(settings, probes="auto"), error
        settings, coarse = finer, fine
    raise ValueError(
        f"tolerance must be larger: {_MOST_STEPS} steps still err by "
        f"{error / D / math.log(2):.3g} bits/dim"
    )
