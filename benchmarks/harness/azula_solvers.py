"""azula's solvers of inverse problems, on a denoiser of ours, at our timesteps and with our noise.

Its denoisers take a schedule t -> (alpha, sigma) and return a mean that is differentiable for x_t:
both are ours here. Its samplers draw their noise by ``torch.randn_like``, once a step; it is
replaced by the noise of :func:`ocm.sample`, so that the same method gives the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import ocm
from hessdiag.kernels import normal
from ocm.diffusion import draws
from ocm.diffusion.timesteps import reverse_steps
from ocm.sampling.samplers import starting_noise


@dataclass(frozen=True)
class Problem:
    """A linear measurement y = A x0 + noise_std n.

    Attributes:
        name: What it is called.
        operator: A, from (B, ...) to vectors (B, m), which azula's solvers of equations take.
        pseudo_inverse: A^+, back.
        noise_std: Standard deviation of the noise.
    """

    name: str
    operator: Callable[[Tensor], Tensor]
    pseudo_inverse: Callable[[Tensor], Tensor]
    noise_std: float


def is_installed() -> bool:
    """Return whether azula is there: ``pip install --no-deps -r benchmarks/peers.txt``."""
    try:
        import azula  # noqa: F401
    except ImportError:
        return False
    return True


def solve(
    method: str,
    denoiser: ocm.Denoiser,
    problem: Problem,
    y: Tensor,
    shape: Sequence[int],
    timesteps: Sequence[float],
    *,
    seed: int,
    zeta: float = 1.0,
    **options: Any,
) -> Tensor:
    """Return azula's samples of x0 given y, by steps of DDPM.

    Args:
        method: "DPS", "PGDM", "TMPD" or "MMPS".
        denoiser: A denoiser on a path with signal at the last timestep.
        problem: A and the noise of y.
        y: Shape (B, m).
        shape: (B, ...).
        timesteps: Increasing, as of :func:`ocm.sample`.
        seed: Seed of the noise.
        zeta: Length of the steps of DPS. azula divides the gradient by the norm of the misfit of
            the whole batch, so that it is multiplied by the root of their number here.
        options: Of MMPS, ``solver`` and ``iterations``.
    """
    from azula import guidance, sample

    plain, A, std = _adapted(denoiser), problem.operator, problem.noise_std
    sampler: Any
    if method == "DPS":
        sampler = guidance.DPSSampler(plain, y, A, zeta * math.sqrt(len(y)), silent=True)
    elif method == "PGDM":
        sampler = guidance.PGDMSampler(plain, y, A, problem.pseudo_inverse, eta=1.0, silent=True)
    elif method == "TMPD":
        sampler = sample.DDPMSampler(guidance.TMPDenoiser(plain, y, A, std**2), silent=True)
    else:
        sampler = sample.DDPMSampler(guided(denoiser, problem, y, **options), silent=True)
    steps, x = reverse_steps(timesteps), starting_noise(denoiser, shape, timesteps[-1], seed, 0)
    noise = (normal(shape, seed, step=draws.of_level(t)) for _, t in steps)
    x = x.to(y)
    with _GivenNoise(noise):
        for s, t in steps:
            x = sampler.step(x, *(torch.tensor(float(level)) for level in (t, s)))
    return x.detach()


def guided(denoiser: ocm.Denoiser, problem: Problem, y: Tensor, **options: Any) -> Any:
    """Return azula's MMPS: (x_t, t) to E[x0 | x_t, y]."""
    from azula import guidance
    from azula.linalg.covariance import IsotropicCovariance

    noise = IsotropicCovariance(torch.tensor(problem.noise_std**2).to(y))
    return guidance.MMPSDenoiser(_adapted(denoiser), y, problem.operator, noise, **options)


def _adapted(denoiser: ocm.Denoiser) -> Any:
    from azula.denoise import Denoiser, DiracPosterior

    path = denoiser.schedule

    class OfOurs(Denoiser):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return path.alpha(t.item()), path.sigma(t.item())

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            level = t.item() if path.is_continuous else round(t.item())
            output = denoiser.output(x_t, level)
            return DiracPosterior(denoiser.x0_hat(x_t, level, output))

    return OfOurs()


class _GivenNoise(TorchFunctionMode):
    """``torch.randn_like`` returns what it is given."""

    def __init__(self, noise: Iterator[Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn_like:
            return next(self.noise).to(args[0])
        return func(*args, **(kwargs or {}))
