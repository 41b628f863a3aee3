"""Products of matrices by the tensor cores."""

from __future__ import annotations

from emulator.accesses import Execute
from emulator.rules import Rules

rules: Rules[Execute] = Rules()
