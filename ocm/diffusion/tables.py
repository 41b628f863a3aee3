"""Numbers by timestep: interpolated between a few, of each step of a process, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocm.diffusion.checks import is_number

Place = float | tuple[float, float]
"""A timestep t, or a step (s, t), s < t."""


class OnDevices:
    """Tensors with a copy on each device where they are looked up, made once.

    Example:
        >>> tables = OnDevices(torch.arange(3))
        >>> tables.at(torch.device("meta"))[0] is tables.at(torch.device("meta"))[0]
        True
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = {tensors[0].device: tensors}

    def at(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors on a device."""
        if device in self._copies:
            return self._copies[device]
        with torch.inference_mode(False):  # no gradient could pass what is made inside of it
            copies = tuple(tensor.to(device) for tensor in next(iter(self._copies.values())))
        if all(map(_is_plain, copies)):
            self._copies[device] = copies
        return copies


def _is_plain(tensor: Tensor) -> bool:
    """Return whether it means the same outside of a fake mode or a transform of torch.func."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers by timestep, linear between those that were measured, or by step (s, t).

    Attributes:
        rows: k numbers for each timestep t, or for each step (s, t).

    Raises:
        ValueError: If there are no rows, keys of both kinds, times below 0 or steps that do not go
            back in time, rows of different lengths, or values that are not finite numbers.

    Example:
        >>> Table({100: [1.0], 200: [3.0]}).at(50, 150)
        tensor([2.], dtype=torch.float64)
        >>> Table({(100, 200): [1.0], (100, 300): [3.0]}).at(100, 300)
        tensor([3.], dtype=torch.float64)
    """

    rows: Mapping[Place, Sequence[float]]

    def __post_init__(self) -> None:
        by_t = all(isinstance(place, (int, float)) for place in self.rows)
        by_step = all(isinstance(place, tuple) and len(place) == 2 for place in self.rows)
        widths = {len(row) for row in self.rows.values()}
        if not (by_t or by_step) or len(widths) != 1:
            raise ValueError(
                "rows must be of one length, by timesteps t or by steps (s, t), got "
                f"{len(self.rows)} rows of lengths {sorted(widths)} by {list(self.rows)[:3]}"
            )
        for place, row in self.rows.items():
            s, t = place if isinstance(place, tuple) else (0, place)
            if not all(map(is_number, (s, t, *row))):
                raise ValueError(f"rows must hold finite numbers, got {row} at {place}")
            if not 0 <= s < t and place != 0:
                raise ValueError(f"rows must be by t >= 0 or by (s, t), 0 <= s < t, got {place}")

    @property
    def by_step(self) -> bool:
        """Whether the rows are those of steps (s, t)."""
        return isinstance(next(iter(self.rows)), tuple)

    @cached_property
    def _columns(self) -> tuple[list[Any], Any]:
        places: list[Any] = sorted(self.rows)
        return places, np.array([self.rows[place] for place in places], dtype=np.float64)

    @property
    def values(self) -> Tensor:
        """All rows in order, float64 of shape (n, k)."""
        return torch.from_numpy(self._columns[1])

    def at(self, s: float | None, t: float) -> Tensor:
        """Return :meth:`numbers` as a tensor, float64."""
        return torch.tensor(self.numbers(s, t), dtype=torch.float64)

    def numbers(self, s: float | None, t: float) -> list[float]:
        """Return the k numbers of the step from t to s; None stands for s = t - 1.

        A table by timestep looks at t alone.

        Raises:
            ValueError: If t lies outside the timesteps, or the step is none of those, that were
                measured.
        """
        places, columns = self._columns
        if self.by_step:
            step = (t - 1 if s is None else s, t)
            if step not in self.rows:
                raise ValueError(
                    f"the step from t = {t} to s = {step[0]} must be one of the {len(places)} that "
                    "this was fitted on; fit it on the numbers of steps that you use"
                )
            return list(self.rows[step])
        if not places[0] <= t <= places[-1]:
            raise ValueError(
                f"t must lie in {places[0]} .. {places[-1]}, where this was fitted, got {t}; fit "
                "it on the timesteps that you use"
            )
        return [float(np.interp(t, places, column)) for column in columns.T]

    def covers(self, steps: Sequence[tuple[float, float]]) -> bool:
        """Return whether all of the steps (s, t), or the t of each, were measured themselves."""
        return all((step if self.by_step else step[1]) in self.rows for step in steps)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        places, columns = self._columns
        return {"steps" if self.by_step else "timesteps": places, "values": columns.tolist()}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Table:
        """Return the table that :meth:`to_json` wrote.

        Raises:
            ValueError: If places are repeated or without values, or as the class.
        """
        places = [
            tuple(place) if "steps" in record else place
            for place in record["steps" if "steps" in record else "timesteps"]
        ]
        if len(set(places)) != len(places):
            raise ValueError(f"places must be given once each, got {places[:4]} ...")
        if len(places) != len(record["values"]):
            raise ValueError(
                f"values must have a row for each of {len(places)} places, got "
                f"{len(record['values'])}"
            )
        return Table(dict(zip(places, record["values"], strict=True)))
