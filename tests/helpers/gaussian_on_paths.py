"""Data N(0, variance) on any path: its posterior, and networks of every prediction type."""

from dataclasses import dataclass

import ocm
from ocm.covariances.base import constant
from ocm.diffusion.predictions import PRECONDITIONED, coefficients, target


@dataclass(frozen=True)
class Gaussian(ocm.Covariance):
    """N(0, variance) on a path; as a covariance, that of x0 given x_t."""

    schedule: ocm.Schedule
    variance: float

    def gain(self, t):
        """E[x0 | x_t] / x_t."""
        alpha, sigma, *_ = self.schedule.level(t)
        return alpha * self.variance / (alpha**2 * self.variance + sigma**2)

    def posterior_variance(self, t):
        """Var[x0 | x_t]."""
        alpha, sigma, *_ = self.schedule.level(t)
        return self.variance * sigma**2 / (alpha**2 * self.variance + sigma**2)

    def at(self, prediction):
        return constant(self.posterior_variance(prediction.timestep), prediction)

    def denoiser(self, kind="sample"):
        """A network that is right to the last digit of its type, from the time that it is told."""
        schedule = self.schedule

        def network(x, time):
            time = time[:1].double()
            if schedule.is_continuous:
                t = schedule.timestep_where(schedule.time, time).item()
            else:
                t = time.item() + 1
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            *_, input_scale = coefficients(kind, alpha, sigma, schedule.data_std)
            x_t = x.double() / (input_scale if kind in PRECONDITIONED else 1)
            noise = sigma / (alpha**2 * self.variance + sigma**2) * x_t
            output = target(kind, alpha, sigma, self.gain(t) * x_t, noise, schedule.data_std)
            return output.to(x.dtype)

        return ocm.Denoiser(network, schedule, kind)
