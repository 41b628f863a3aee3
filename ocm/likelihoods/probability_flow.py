"""The probability-flow ODE of any path, in one variable.

On x_t = alpha x0 + sigma n let r = sqrt(alpha^2 + sigma^2), z = x_t / r and theta the angle with
tan(theta) = sigma / alpha, from 0 at the data to pi/2 where there is no signal. With::

    omega = log tan(theta / 2),    cos(theta) = -tanh(omega),    sin(theta) = 1 / cosh(omega),

the ODE whose solutions have the distribution of z at every omega (Song et al., 2021) and the rate
at which its log-density changes along them are, on every path::

    dz/domega               = cos(theta) z - x0_hat(z),
    d log p(z)/domega       = -(D cos(theta) - tr d x0_hat/dz),
    d x0_hat/dz             = r (p I + q J),

with x0_hat = p x_t + q output and J the Jacobian of the output. Nothing is divided by: near the
data, where sigma goes to 0, omega goes to -infinity as log(sigma), and where alpha is 0 it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hessdiag
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser
from ocm.diffusion.schedules import Schedule

# Of the last timestep of a network that predicts noise.
_LEAST_LOG_SNR = -10.2
# Of steps, from omega = 0.
_AWAY = 0.02


@dataclass(frozen=True)
class Place:
    """A place on the path, and what the ODE needs to know of it.

    Attributes:
        t: The timestep, whole or between those of a discrete schedule.
        scale: The scale r.
        of_z: cos(theta) - r p, the weight of z in dz/domega, which no rounding of z disturbs.
        of_output: -q, the weight of the output.
    """

    t: float
    scale: float
    of_z: float
    of_output: float


@dataclass(frozen=True, eq=False)
class ProbabilityFlow:
    """The ODE of a denoiser.

    Attributes:
        denoiser: On a continuous path.
        condition: Labels, tensors and guidance, or None.
        differentiable: Whether velocities and traces carry gradients.
    """

    denoiser: Denoiser
    condition: Condition | None = None
    differentiable: bool = False

    @staticmethod
    def of(
        denoiser: Denoiser, condition: Condition | None = None, *, differentiable: bool = False
    ) -> ProbabilityFlow:
        """Return the ODE, a discrete schedule filled in between its timesteps."""
        schedule = between_timesteps(denoiser.schedule)
        return ProbabilityFlow(replace(denoiser, schedule=schedule), condition, differentiable)

    @property
    def last_timestep(self) -> float:
        """Where the data are taken to be gone: N, or before it where noise is predicted.

        An error of the noise is one of x0_hat that is sigma / alpha times as large, so that the end
        is at sigma / alpha = e^5.1, as diffusers advises for solvers on the cosine schedule.
        """
        schedule = self.denoiser.schedule
        least = torch.tensor(_LEAST_LOG_SNR, dtype=torch.float64)
        if self.denoiser.prediction_type != "epsilon":
            return schedule.num_timesteps
        return min(schedule.timestep_of(least).item(), schedule.num_timesteps)

    def omega(self, t: float) -> float:
        """Return omega at a timestep in (0, N].

        Example:
            >>> import ocm
            >>> ode = ProbabilityFlow.of(Denoiser(lambda x, time: x, ocm.flow(), "flow_prediction"))
            >>> round(ode.omega(1), 2), ode.omega(1000)
            (-7.6, 0.0)
        """
        schedule = self.denoiser.schedule
        alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
        return math.log(math.tan(math.atan2(sigma, alpha) / 2)) if alpha > 0 else 0.0

    def mesh(self, first: float, num_steps: int) -> list[float]:
        """Return the ends of steps from timestep ``first`` to the last one, values of omega.

        They are even in log sinh(d - omega), half of log SNR, d = 1/50 away from where it is
        infinite: even in omega near the data, and closer near the noise, where a network that
        predicts noise is least smooth.

        Example:
            >>> import ocm
            >>> ode = ProbabilityFlow.of(Denoiser(lambda x, time: x, ocm.flow(), "flow_prediction"))
            >>> [round(omega, 2) for omega in ode.mesh(1, 4)]
            [-7.6, -4.89, -2.19, -0.28, 0.0]
        """
        ends = self.omega(first), self.omega(self.last_timestep)
        begin, end = (math.log(math.sinh(_AWAY - omega)) for omega in ends)
        even = torch.linspace(begin, end, num_steps + 1, dtype=torch.float64)
        inner: list[float] = (_AWAY - even.exp().asinh())[1:-1].tolist()
        return [ends[0], *inner, ends[1]]

    def places(self, omegas: Sequence[float]) -> list[Place]:
        """Return the places of values of omega."""
        omega = torch.tensor(list(omegas), dtype=torch.float64)
        # SNR = 1 / tan^2(theta) = sinh^2(omega).
        t = self.denoiser.schedule.timestep_of(2.0 * torch.sinh(-omega).log())
        r = torch.hypot(*self.denoiser.schedule.scales(t))
        p, q, _ = self.denoiser.coefficients(t)
        rows = torch.stack([t, r, -omega.tanh() - r * p, -q], dim=1)
        return [Place(*row) for row in rows.tolist()]

    def jacobian(self, z: Tensor, place: Place) -> hessdiag.Jacobian:
        """Return J of the output, from whose evaluation :meth:`velocity` comes too.

        Args:
            z: Shape (B, ...), in the type that the network is shown.
            place: Where.
        """
        return self.denoiser.jacobian(
            place.scale * z, place.t, self.condition, differentiable=self.differentiable
        )

    def velocity(self, z: Tensor, J: hessdiag.Jacobian, place: Place) -> Tensor:
        """Return dz/domega. Products come first: how many there are tells how to evaluate."""
        return place.of_z * z + place.of_output * J.output

    def divergence(self, trace: Tensor, place: Place, num_features: int) -> Tensor:
        """Return the divergence of dz/domega from tr J, or from an estimate of it."""
        return num_features * place.of_z + place.scale * place.of_output * trace

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log N(z; 0, I), shape (B,), of z at the last timestep."""
        squares = z.double().square().flatten(1).sum(1)
        return -0.5 * (squares + z[0].numel() * math.log(2 * math.pi))


def between_timesteps(schedule: Schedule) -> Schedule:
    """Return a path on which any t in (0, N] may be asked for; a continuous one is that already.

    Between two timesteps of a discrete schedule theta and r are linear in t, and so is what the
    network is told.

    Example:
        >>> import ocm
        >>> path = between_timesteps(ocm.cosine())
        >>> [round(path.alpha(t).item(), 4) for t in (500, 500.5, 501)]
        [0.7027, 0.7022, 0.7016]
    """
    if schedule.is_continuous:
        return schedule
    alpha, sigma = schedule.scales(torch.arange(schedule.num_timesteps + 1, dtype=torch.float64))
    # From either end, where the other angle has no digits left.
    from_data, from_noise = torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)
    radii = torch.hypot(alpha, sigma)

    def at(table: Tensor, t: Tensor) -> Tensor:
        below = t.floor().clamp(0, schedule.num_timesteps - 1).long()
        return table[below].lerp(table[below + 1], t - below)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        place = t.double().cpu()
        radius = at(radii, place)
        alpha, sigma = radius * at(from_noise, place).sin(), radius * at(from_data, place).sin()
        return alpha.to(t.device), sigma.to(t.device)

    return replace(schedule, scales=scales, is_continuous=True)
