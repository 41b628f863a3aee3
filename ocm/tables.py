"""A few numbers for each timestep, measured at some and interpolated between them."""

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

    def at(self, t: int) -> Tensor:
        """Return the k values at t.

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

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON values."""
        return {"timesteps": self.timesteps.tolist(), "values": self.values.tolist()}

    @staticmethod
    def from_json(record: dict[str, Any]) -> TimestepTable:
        """Return the table that :meth:`to_json` wrote."""
        return TimestepTable.of(record["timesteps"], record["values"])
