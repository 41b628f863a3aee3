"""Progress bars, by tqdm, which is imported when one is made: ``import ocm`` does without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def progress_bar(items: Sequence[Any], label: str, *, unit: str = "it", show: bool = True) -> Any:
    """Return a tqdm bar over ``items``, or a silent one.

    Example:
        >>> list(progress_bar([1, 2], "counting", show=False))
        [1, 2]
    """
    from tqdm import tqdm

    return tqdm(items, desc=label, unit=unit, disable=not show)
