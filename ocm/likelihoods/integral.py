"""The integral of the divergence along one solution, with the variance that probes leave in it.

The solution does not depend on the divergence. So with fixed steps probes may be drawn anew at each
evaluation: with weights w_k, and Var_k the variance at each, their errors add up to::

    Var = sum_k w_k^2 Var_k,

where one set of probes that is kept for the whole solution, as is common, errs the same way
everywhere. With adaptive steps (``torchdiffeq``) probes are kept, since a step may be taken again;
the integrals of independent blocks of them tell the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hessdiag
from ocm.likelihoods.probability_flow import Place, ProbabilityFlow
from ocm.likelihoods.settings import LikelihoodSettings
from ocm.likelihoods.solvers import SOLVERS, evaluation_places, evaluation_weights, solve
from ocm.progress import tracked

# Degrees of freedom enough for a standard error, from few products.
_MOST_GROUPS = 8


@dataclass(frozen=True, eq=False)
class Integral:
    """What a solution says of a batch; all of shape (B,), float64.

    Attributes:
        log_density: log p(y).
        log_prior: log N(z_N; 0, I).
        variance: Of log_density, by probes; infinite where one block says nothing.
        fourth: The sum of squared variances of its independent parts, each over its degrees of
            freedom.
        num_evaluations: Of the network.
        num_products: For a sample.
    """

    log_density: Tensor
    log_prior: Tensor
    variance: Tensor
    fourth: Tensor
    num_evaluations: int
    num_products: int


@dataclass(frozen=True)
class Probing:
    """Which probes an integral takes.

    Attributes:
        design: One for the whole solution.
        max_probes: For a sample at an evaluation, in whole blocks.
        seed: Of the probes.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe.
    """

    design: hessdiag.ProbeDesign
    max_probes: int
    seed: int
    sample_offset: int
    probe_offset: int

    def trace(self, J: hessdiag.Jacobian, k: int) -> hessdiag.TraceEstimate:
        """Return tr J by set k of probes."""
        return hessdiag.trace(
            J,
            max_probes=self.max_probes,
            probes=self.design,
            seed=self.seed,
            sample_offset=self.sample_offset,
            probe_offset=self.probe_offset + k * self.max_probes,
        )


def integrate(
    ode: ProbabilityFlow,
    y: Tensor,
    dtype: torch.dtype,
    first_timestep: float,
    settings: LikelihoodSettings,
    probing: Probing,
    progress: bool = False,
) -> Integral:
    """Return log p(y), y = x_t1 / alpha_t1.

    Args:
        ode: The probability flow.
        y: Shape (B, ...), float64.
        dtype: That the network is shown.
        first_timestep: t_1.
        settings: Solver and steps.
        probing: Which probes.
        progress: Whether to show a progress bar.
    """
    mesh = ode.mesh(first_timestep, 1 if settings.is_adaptive else settings.num_steps)
    cosine = -math.tanh(mesh[0])
    if settings.is_adaptive:
        z, integral = _adaptive(ode, cosine * y, dtype, mesh, settings, probing)
    else:
        z, integral = _fixed(ode, cosine * y, dtype, mesh, settings, probing, progress)
    log_prior = ode.log_prior(z)
    D = y[:1].numel()
    return Integral(
        log_prior + integral.mean + D * math.log(cosine),
        log_prior.detach(),
        integral.variance.detach(),
        integral.fourth.detach(),
        integral.num_evaluations,
        integral.num_products,
    )


@dataclass(frozen=True, eq=False)
class _Sums:
    """What evaluations add up to; of shape (B,)."""

    mean: Tensor
    variance: Tensor
    fourth: Tensor
    num_evaluations: int
    num_products: int


def _fixed(
    ode: ProbabilityFlow,
    z: Tensor,
    dtype: torch.dtype,
    mesh: list[float],
    settings: LikelihoodSettings,
    probing: Probing,
    progress: bool,
) -> tuple[Tensor, _Sums]:
    method = SOLVERS[settings.solver]
    places = ode.places(evaluation_places(method, mesh))
    weights = evaluation_weights(method, mesh)
    sums = (_Anew if settings.draws_anew else _Kept)(ode, probing, z)

    def velocity(z: Tensor, k: int) -> Tensor:
        shown = z.to(dtype)
        J = ode.jacobian(shown, places[k])
        sums.add(J, places[k], weights[k])
        return ode.velocity(shown, J, places[k]).double()

    steps = tracked(range(len(mesh) - 1), "log-likelihood", shown=progress)
    return solve(method, velocity, z, mesh, steps), sums.total()


class _Anew:
    """The sum over evaluations that have probes of their own."""

    def __init__(self, ode: ProbabilityFlow, probing: Probing, z: Tensor) -> None:
        self._ode, self._probing, self._num_features = ode, probing, z[:1].numel()
        self._mean, self._variance, self._fourth = (z.new_zeros(len(z)) for _ in range(3))
        self._evaluations = self._products = 0

    def add(self, J: hessdiag.Jacobian, place: Place, weight: float) -> None:
        """Add an evaluation, and its variance by its own blocks."""
        found = self._probing.trace(J, self._evaluations)
        self._evaluations += 1
        self._products += int(found.num_probes.max())
        divergence = self._ode.divergence(found.trace.double(), place, self._num_features)
        self._mean = self._mean + weight * divergence
        n, stderr = found.num_blocks.double(), found.stderr.detach().double()
        # Blocks that agree say that there is no variance here: not all evaluations are so lucky.
        stderr = torch.where(torch.isinf(stderr) & (n > 1), 0.0, stderr)
        variance = (weight * place.scale * place.of_output * stderr).square()
        self._variance = self._variance + variance
        self._fourth = self._fourth + variance.square() / (n - 1).clamp(min=1)

    def total(self) -> _Sums:
        """Return mean and variance of the integral."""
        return _Sums(self._mean, self._variance, self._fourth, self._evaluations, self._products)


class _Kept:
    """The sum over evaluations that share blocks of probes."""

    def __init__(self, ode: ProbabilityFlow, probing: Probing, z: Tensor) -> None:
        self._ode, self._probing, self._num_features = ode, probing, z[:1].numel()
        self.groups = groups(probing.design, tuple(z.shape[1:]), probing.max_probes)
        self._probes: hessdiag.ProbeDesign | None = None
        self._integrals = z.new_zeros(len(self.groups), len(z))
        self._evaluations = self._products = 0

    def divergences(self, J: hessdiag.Jacobian, place: Place) -> Tensor:
        """Return the divergence by each block, shape (n, B)."""
        if self._probes is None:
            self._probes = self._drawn(J)
        J.expect(max(count for _, count in self.groups))
        found = [
            hessdiag.trace(J, max_probes=count, probes=self._probes, probe_offset=first)
            for first, count in self.groups
        ]
        self._evaluations += 1
        self._products += sum(int(estimate.num_probes.max()) for estimate in found)
        traces = torch.stack([estimate.trace.double() for estimate in found])
        return self._ode.divergence(traces, place, self._num_features)

    def add(self, J: hessdiag.Jacobian, place: Place, weight: float) -> None:
        """Add an evaluation."""
        self._integrals = self._integrals + weight * self.divergences(J, place)

    def total(self, integrals: Tensor | None = None) -> _Sums:
        """Return mean and variance of the integral, from those of the blocks, shape (n, B)."""
        integrals = self._integrals if integrals is None else integrals
        n, mean = len(integrals), integrals.mean(0)
        if self._probing.design.is_exact:
            variance = torch.zeros_like(mean)
        elif n == 1:
            variance = torch.full_like(mean, torch.inf)
        else:
            variance = integrals.detach().var(0) / n
        fourth = variance.square() / max(1, n - 1)
        return _Sums(mean, variance, fourth, self._evaluations, self._products)

    def _drawn(self, J: hessdiag.Jacobian) -> hessdiag.ProbeDesign:
        """Return the probes, drawn for the type that the network is shown."""
        probing = self._probing
        if probing.design.is_exact:  # unit vectors, too many to keep
            return probing.design
        return hessdiag.fixed_probes(
            J.x.detach(),
            probing.max_probes,
            probing.design,
            seed=probing.seed,
            sample_offset=probing.sample_offset,
            probe_offset=probing.probe_offset,
        )


def groups(
    design: hessdiag.ProbeDesign, sample_shape: tuple[int, ...], max_probes: int
) -> list[tuple[int, int]]:
    """Return first probe and number of probes of at most eight equal groups of whole blocks.

    Example:
        >>> groups(hessdiag.Rademacher(), (4,), 16)[:2], len(groups(hessdiag.Rademacher(), (4,), 3))
        ([(0, 2), (2, 2)], 3)
    """
    size = design.block_size(sample_shape)
    blocks = 1 if design.is_exact else max(1, max_probes // size)
    number = min(blocks, _MOST_GROUPS)
    count = blocks // number * size
    return [(k * count, count) for k in range(number)]


def _adaptive(
    ode: ProbabilityFlow,
    z: Tensor,
    dtype: torch.dtype,
    mesh: list[float],
    settings: LikelihoodSettings,
    probing: Probing,
) -> tuple[Tensor, _Sums]:
    odeint, kept = _torchdiffeq(), _Kept(ode, probing, z)

    def derivative(omega: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (place,) = ode.places([omega.item()])
        shown = state[0].to(dtype)
        J = ode.jacobian(shown, place)
        divergences = kept.divergences(J, place)
        return ode.velocity(shown, J, place).double(), divergences

    start = z, z.new_zeros(len(kept.groups), len(z))
    omegas = torch.tensor(mesh, dtype=torch.float64, device=z.device)
    # Steps follow the solution alone, which probes have no part in; and they are numbers, through
    # which no gradient goes, as through omega above.
    options: dict[str, Any] = {"norm": lambda state: state[0].detach().square().mean().sqrt()}
    states, integrals = odeint(
        derivative,
        start,
        omegas,
        rtol=settings.tolerance,
        atol=settings.tolerance,
        method=settings.solver,
        options=options,
    )
    return states[-1], kept.total(integrals[-1])


def _torchdiffeq() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "adaptive solvers need torchdiffeq (pip install torchdiffeq); 'heun' and 'rk4' do not"
        ) from error
    solver: Callable[..., Any] = odeint
    return solver
