"""How many groups of features a program of each kernel takes, by the bytes of an element.

More groups for each thread share more of what does not depend on the features (keys, weights,
addresses), and need more registers. The figures are those with few instructions an element and no
register written to memory, of 256 to 512 groups and 2 or 4 warps (suite ``machine_code``).
"""

from __future__ import annotations

from typing import NamedTuple


class Tuning(NamedTuple):
    """The size of a program.

    Attributes:
        groups: Groups of features, of 8 for signs and 4 for normals.
        warps: Warps that share them.
    """

    groups: int
    warps: int


RADEMACHER = {2: Tuning(512, 4), 4: Tuning(256, 4), 8: Tuning(256, 4)}
NORMAL = {4: Tuning(512, 2)}
GAUSSIAN_STEP = {2: Tuning(512, 2), 4: Tuning(512, 4)}
PROBE_MOMENTS = {2: Tuning(256, 4), 4: Tuning(256, 4), 8: Tuning(128, 4)}
OCM_LOSS = {2: Tuning(512, 4), 4: Tuning(512, 4)}
