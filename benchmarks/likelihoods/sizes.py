"""The sizes of the comparison of log-likelihoods."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LikelihoodSize:
    """What differs between a full run and a smaller one.

    Attributes:
        num_images: Test images of the tables of bound and ODE.
        num_compared: Test images of the comparison of probes.
        num_steps: Of RK4, four evaluations each.
        num_products: An evaluation, in the comparison of probes.
        target: Standard error in bits/dim that times are taken to.
        num_draws: Of dequantisation noise, in the tables.
        step_counts: K of the bounds.
        num_seeds: Of the coverage.
        num_repeats: Calls of the peer, each with a probe of its own.
    """

    num_images: int = 48
    num_compared: int = 4
    num_steps: int = 16
    num_products: int = 48
    target: float = 0.005
    num_draws: int = 4
    step_counts: tuple[int, ...] = (10, 100)
    num_seeds: int = 400
    num_repeats: int = 16


# Every line runs, and the figures mean nothing.
QUICK = LikelihoodSize(
    num_images=4,
    num_compared=2,
    num_steps=2,
    num_products=24,
    target=1e3,
    num_draws=2,
    step_counts=(2, 3),
    num_seeds=4,
    num_repeats=3,
)
