"""A few numbers for each timestep, interpolated between them, or for each step of a process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TimestepTable:
    """Numbers by timestep, linear between those that were measured.

    Attributes:
        timesteps: Increasing, int64 of shape (n,), n at least 1.
        values: Float64, shape (n, k).

    Raises:
        ValueError: If the timesteps do not increase, or there are not n rows of finite values.

    Example:
        >>> TimestepTable.of([100, 200], [[1.0], [3.0]]).at(150)
        tensor([2.], dtype=torch.float64)
    """

    timesteps: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        increasing = len(self.timesteps) > 0 and bool((self.timesteps.diff() > 0).all())
        if not increasing or self.values.dim() != 2 or len(self.values) != len(self.timesteps):
            raise ValueError(
                "timesteps must increase, with a row of values each, got "
                f"{self.timesteps.tolist()[:5]} and values of shape {tuple(self.values.shape)}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("values must be finite")

    @staticmethod
    def of(timesteps: Sequence[int], values: Sequence[Sequence[float]]) -> TimestepTable:
        """Return the table of plain numbers."""
        return TimestepTable(
            torch.tensor(timesteps, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)
        )

    def at(self, t: int, s: int | None = None) -> Tensor:
        """Return the k values at t, whatever the end s of the step.

        Raises:
            ValueError: If t lies outside the timesteps that were measured.
        """
        first, last = int(self.timesteps[0]), int(self.timesteps[-1])
        if not first <= t <= last:
            raise ValueError(
                f"t must lie in {first} .. {last}, where this was fitted, got {t}; fit it on the "
                "timesteps that you use"
            )
        right = int(torch.searchsorted(self.timesteps, t))
        if int(self.timesteps[right]) == t:
            return self.values[right]
        ends = self.timesteps[right - 1 : right + 1].double()
        place = (t - ends[0]) / (ends[1] - ends[0])
        return torch.lerp(self.values[right - 1], self.values[right], place)

    def covers(self, steps: Sequence[tuple[int, int]]) -> bool:
        """Return whether every t of the steps (s, t) was measured itself."""
        return {t for _, t in steps} <= set(self.timesteps.tolist())

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON values."""
        return {"timesteps": self.timesteps.tolist(), "values": self.values.tolist()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> TimestepTable:
        """Return the table that :meth:`to_json` wrote."""
        return TimestepTable.of(record["timesteps"], record["values"])


@dataclass(frozen=True, eq=False)
class StepTable:
    """Numbers by the step (s, t) of a reverse process, for those that were measured.

    Attributes:
        steps: Pairs s < t, int64 of shape (n, 2).
        values: Float64, shape (n, k).

    Raises:
        ValueError: If there are not n rows of finite values.

    Example:
        >>> StepTable.of([(100, 200), (100, 300)], [[1.0], [3.0]]).at(300, 100)
        tensor([3.], dtype=torch.float64)
    """

    steps: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        pairs = self.steps.dim() == 2 and self.steps.shape[1] == 2 and len(self.steps) > 0
        if not pairs or self.values.dim() != 2 or len(self.values) != len(self.steps):
            raise ValueError(
                "steps must be pairs (s, t), with a row of values each, got shapes "
                f"{tuple(self.steps.shape)} and {tuple(self.values.shape)}"
            )
        if not bool(torch.isfinite(self.values).all()):
            raise ValueError("values must be finite")

    @staticmethod
    def of(steps: Sequence[tuple[int, int]], values: Sequence[Sequence[float]]) -> StepTable:
        """Return the table of plain numbers."""
        return StepTable(
            torch.tensor(steps, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)
        )

    def at(self, t: int, s: int | None = None) -> Tensor:
        """Return the k values of the step from t to s; None stands for t - 1.

        Raises:
            ValueError: If that step was not measured.
        """
        s = t - 1 if s is None else s
        found = (self.steps == torch.tensor([s, t])).all(dim=1).nonzero().flatten()
        if len(found) == 0:
            raise ValueError(
                f"the step from t = {t} to s = {s} must be one of the {len(self.steps)} that this "
                "was fitted on; fit it on the numbers of steps that you use"
            )
        return self.values[found[0]]

    def covers(self, steps: Sequence[tuple[int, int]]) -> bool:
        """Return whether all of the steps (s, t) were measured."""
        return set(steps) <= {(s, t) for s, t in self.steps.tolist()}

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON values."""
        return {"steps": self.steps.tolist(), "values": self.values.tolist()}


def table_from_json(record: dict[str, Any]) -> TimestepTable | StepTable:
    """Return the table that ``to_json`` of either kind wrote."""
    if "steps" in record:
        return StepTable.of(record["steps"], record["values"])
    return TimestepTable.from_json(record)
