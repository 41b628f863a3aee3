"""Fixed steps of explicit Runge-Kutta methods, with the weight that each evaluation has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RungeKutta:
    """An explicit method, by its tableau.

    A step of length h is::

        k_j = f(w + c_j h, z + h sum_l a_jl k_l),    z <- z + h sum_j b_j k_j

    Attributes:
        nodes: The nodes c.
        stages: The rows of a, each up to its diagonal.
        weights: The weights b.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        """Evaluations of a step."""
        return len(self.weights)


SOLVERS = {
    "euler": RungeKutta((0.0,), ((),), (1.0,)),
    "heun": RungeKutta((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": RungeKutta(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


def evaluation_places(method: RungeKutta, mesh: Sequence[float]) -> list[float]:
    """Return where the method evaluates, step after step.

    Example:
        >>> evaluation_places(SOLVERS["heun"], [0.0, 1.0, 3.0])
        [0.0, 1.0, 1.0, 3.0]
    """
    return [w + c * (end - w) for w, end in itertools.pairwise(mesh) for c in method.nodes]


def evaluation_weights(method: RungeKutta, mesh: Sequence[float]) -> list[float]:
    """Return the weight of each evaluation in an integral along the solution.

    Example:
        >>> evaluation_weights(SOLVERS["heun"], [0.0, 1.0, 3.0])
        [0.5, 0.5, 1.0, 1.0]
    """
    return [b * (end - w) for w, end in itertools.pairwise(mesh) for b in method.weights]


def solve(
    method: RungeKutta,
    velocity: Callable[[Tensor, int], Tensor],
    z: Tensor,
    mesh: Sequence[float],
    steps: Iterable[int] | None = None,
) -> Tensor:
    """Return the solution at the end of the mesh.

    Args:
        method: Of the steps.
        velocity: From z and the number of the evaluation, as :func:`evaluation_places` counts
            them, to dz/dw.
        z: At the beginning.
        mesh: Values of w, in order.
        steps: Numbers of the steps, all of them once: what shows progress.

    Example:
        >>> import torch
        >>> solve(SOLVERS["rk4"], lambda z, k: z, torch.ones(1), [0.0, 0.5, 1.0])    # e
        tensor([2.7173])
    """
    for i in range(len(mesh) - 1) if steps is None else steps:
        h = mesh[i + 1] - mesh[i]
        slopes: list[Tensor] = []
        for j, row in enumerate(method.stages):
            stage = z
            for a, slope in zip(row, slopes, strict=True):
                if a:
                    stage = stage + (a * h) * slope
            slopes.append(velocity(stage, i * method.num_stages + j))
        for b, slope in zip(method.weights, slopes, strict=True):
            z = z + (b * h) * slope
    return z
