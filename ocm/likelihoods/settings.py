"""How a log-likelihood is taken, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

import hessdiag
from ocm.diffusion.checks import check_number, check_positive_int
from ocm.likelihoods.solvers import SOLVERS

Solver = Literal["euler", "heun", "rk4", "bosh3", "dopri5", "dopri8"]
ADAPTIVE = ("bosh3", "dopri5", "dopri8")
Probes = Literal["auto", "exact", "rademacher", "coloring"]
# A standard error takes two blocks; one set of probes for all evaluations takes more to tell it.
_BLOCKS, _BLOCKS_KEPT = 2, 4
# Below which "auto" takes none.
_FEWEST_COLORS = 12


@dataclass(frozen=True)
class LikelihoodSettings:
    """How the integral of :func:`ocm.log_likelihood` is taken.

    Attributes:
        solver: Fixed steps of "euler", "heun" or "rk4"; or the adaptive ones of torchdiffeq,
            "bosh3", "dopri5" or "dopri8", whose steps suit the whole batch.
        num_steps: Fixed steps; 1, 2 or 4 evaluations of the network each.
        tolerance: Of adaptive steps, for z, relative and absolute.
        probes: "exact", D products an evaluation; "rademacher"; "coloring", for samples with
            spatial axes; "auto"; or a design of hessdiag. "auto" is exact where ``max_probes``
            reach D. Else, where a block has 12 colors or more, it is "coloring" or, without spatial
            axes, balanced colors; with fewer colors what a network couples shares one, and it is
            "rademacher".
        max_probes: Most products for a sample at an evaluation, in at least two blocks.
        new_probes: Whether fixed steps draw probes anew at every evaluation.
        num_draws: Draws of dequantisation noise.
        importance_weighted: Whether several draws give the tighter bound log mean exp, rather than
            the mean of theirs.
        solver_error: What the solver was measured to err by, in nats for a sample of D dimensions,
            by :func:`ocm.likelihood_settings`; None where nobody measured.

    Raises:
        TypeError: If a number of steps, probes or draws is not an int, or the probes are neither a
            design nor a name.
        ValueError: If one is below 1, ``tolerance`` is not in (0, 1), or there is no such solver or
            probes.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> settings = ocm.LikelihoodSettings(solver="heun", num_steps=8, probes="exact")
        >>> found = ocm.log_likelihood(denoiser, torch.zeros(1, 2), settings)
        >>> round(found.value.item(), 2), found.num_evaluations    # - log(2 pi), 2 a step
        (-1.84, 16)
    """

    solver: Solver = "rk4"
    num_steps: int = 16
    tolerance: float = 1e-5
    probes: Probes | hessdiag.ProbeDesign = "auto"
    max_probes: int = 16
    new_probes: bool = True
    num_draws: int = 1
    importance_weighted: bool = False
    solver_error: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            raise ValueError(
                f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}"
            )
        for name in ("num_steps", "max_probes", "num_draws"):
            check_positive_int(name, getattr(self, name))
        check_number("tolerance", self.tolerance)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        probes = self.probes
        if isinstance(probes, type) or not isinstance(probes, (str, hessdiag.ProbeDesign)):
            raise TypeError(f"probes must be a design of hessdiag or a name, got {probes!r}")
        if isinstance(probes, str) and probes not in get_args(Probes):
            raise ValueError(
                f"probes must be a design or one of {', '.join(get_args(Probes))}, got {probes!r}"
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether steps are chosen on the way."""
        return self.solver in ADAPTIVE

    @property
    def num_sets_of_probes(self) -> int:
        """How many sets of probes a solution takes, one or one for each evaluation."""
        if not self.draws_anew:
            return 1
        return self.num_steps * SOLVERS[self.solver].num_stages

    @property
    def draws_anew(self) -> bool:
        """Whether every evaluation has probes of its own."""
        return self.new_probes and not self.is_adaptive

    def design(self, sample_shape: tuple[int, ...]) -> hessdiag.ProbeDesign:
        """Return the one design of the whole solution.

        Raises:
            ValueError: If "exact" needs more than ``max_probes``, or "coloring" a spatial axis.

        Example:
            >>> import ocm
            >>> ocm.LikelihoodSettings(max_probes=48).design((3, 16, 16))
            Coloring(num_colors=24, dense=False)
            >>> ocm.LikelihoodSettings(max_probes=48).design((2,))
            UnitVectors()
        """
        if not isinstance(self.probes, str):
            return self.probes
        features = math.prod(sample_shape)
        if self.probes == "exact" or (self.probes == "auto" and features <= self.max_probes):
            if features > self.max_probes:
                raise ValueError(
                    f"max_probes must be at least D = {features} for probes='exact', got "
                    f"{self.max_probes}"
                )
            return hessdiag.UnitVectors()
        colors = self.max_probes // (_BLOCKS if self.draws_anew else _BLOCKS_KEPT)
        few = 0 if self.probes == "coloring" else _FEWEST_COLORS
        if self.probes == "rademacher" or colors < few:
            return hessdiag.Rademacher()
        if self.probes == "coloring" and len(sample_shape) < 2:
            raise ValueError(
                "probes='coloring' needs samples of shape (channels, ...) with a spatial axis, got "
                f"{sample_shape}; 'auto' has colors without geometry"
            )
        if len(sample_shape) > 1:
            return hessdiag.Coloring(max(1, min(colors, features)))
        return hessdiag.BalancedColoring(min(colors, features))


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-likelihoods in nats, float64 of shape (B,), and what their parts are worth.

    Attributes:
        value: log p(x), or the bound on log P of images.
        log_prior: Its part log N(z_N; 0, I), the mean over draws.
        probe_stderr: The standard error by probes; infinite where one block says nothing.
        draw_stderr: The standard error by dequantisation noise: 0 for continuous data, infinite
            for a single draw. Of weighted draws it is that of the delta method, too small where few
            draws share the weight.
        degrees: Degrees of freedom of ``probe_stderr``, by Welch and Satterthwaite; 0 where that
            is infinite.
        num_features: The number D of dimensions of a sample.
        num_evaluations: Of the network, for a sample.
        num_products: With its Jacobian, for a sample.
        settings: How it was taken.

    Example:
        >>> import torch, ocm
        >>> denoiser = ocm.Denoiser(lambda x, time: 0 * x, ocm.flow(), "v_prediction")  # N(0, I)
        >>> settings = ocm.LikelihoodSettings(solver="heun", num_steps=8, probes="rademacher")
        >>> found = ocm.log_likelihood(denoiser, torch.zeros(2, 3, 4, 4), settings)
        >>> found.bits_per_dim.round(decimals=1)    # log2(2 pi) / 2
        tensor([1.3000, 1.3000], dtype=torch.float64)
        >>> low, high = found.interval(0.99)
        >>> low.shape, list(found.budget)
        (torch.Size([2]), ['solver', 'probes', 'dequantisation'])
    """

    value: Tensor
    log_prior: Tensor
    probe_stderr: Tensor
    draw_stderr: Tensor
    degrees: Tensor
    num_features: int
    num_evaluations: int
    num_products: int
    settings: LikelihoodSettings = field(repr=False)

    @property
    def stderr(self) -> Tensor:
        """The standard error by chance, of probes and dequantisation noise, in nats."""
        return torch.hypot(self.probe_stderr, self.draw_stderr)

    @property
    def bits_per_dim(self) -> Tensor:
        """-value / (D log 2)."""
        return -self.value / self._nats_per_bit

    @property
    def bits_per_dim_stderr(self) -> Tensor:
        """The standard error by chance, in bits/dim."""
        return self.stderr / self._nats_per_bit

    @property
    def budget(self) -> dict[str, Tensor | None]:
        """What "solver", "probes" and "dequantisation" may each be off by, in bits/dim.

        The first is that of :func:`ocm.likelihood_settings`, None where nobody measured it.
        """
        solver = self.settings.solver_error
        return {
            "solver": None if solver is None else torch.tensor(solver / self._nats_per_bit),
            "probes": self.probe_stderr / self._nats_per_bit,
            "dequantisation": self.draw_stderr / self._nats_per_bit,
        }

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of the interval that holds the value without chance, by ``level``.

        Student's quantile, with the degrees of freedom of both parts by Welch and Satterthwaite.

        Raises:
            ValueError: If ``level`` is not between 0 and 1.
        """
        from scipy.special import stdtrit

        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        fourth = self.probe_stderr**4 / self.degrees
        if self.settings.num_draws > 1:
            fourth = fourth + self.draw_stderr**4 / (self.settings.num_draws - 1)
        degrees = torch.where(fourth > 0, self.stderr**4 / fourth, torch.inf)
        quantile = torch.from_numpy(stdtrit(degrees.cpu().numpy(), (1 + level) / 2))
        half = torch.where(self.stderr > 0, quantile.to(self.stderr) * self.stderr, 0.0)
        half = torch.where(self.stderr.isinf(), torch.inf, half)
        return self.value - half, self.value + half

    @property
    def _nats_per_bit(self) -> float:
        return self.num_features * math.log(2)
