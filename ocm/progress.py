"""How far long work has come: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")

_BAR_WIDTH = 24
# Seconds between two pictures of a bar, and between two lines of a log.
_REDRAW, _RELOG = 0.1, 30.0
_lines: list[Any] = []  # the console whose last line is a bar


def tracked(
    items: Collection[Item],
    label: str,
    unit: str = "steps",
    *,
    shown: bool = True,
    done: int = 0,
    note: Callable[[], str] = str,
) -> Iterator[Item]:
    """Yield the items, and say on stderr how many are done and how long the others may take.

    On a terminal and in a notebook that is a bar. Elsewhere, as in the log of a cluster, it is a
    line every 30 seconds and one at the end. The time left is that of the mean item so far.

    Args:
        items: What is worked on.
        label: What the work is called.
        unit: What the items are called.
        shown: Whether to say anything.
        done: Items that were done before, by an earlier run.
        note: Returns what else to say, and is asked whenever something is said.

    Example:
        >>> list(tracked([3, 5], "halving", shown=False))
        [3, 5]
    """
    if not shown or not items:
        yield from items
        return
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.segment import Segment, Segments

    # A notebook reads what is written for a terminal, and would keep every other picture.
    console = Console(stderr=True, force_jupyter=False, force_terminal=Console().is_jupyter or None)
    pause = _REDRAW if console.is_terminal else _RELOG
    began = said = time.monotonic()
    total = done + len(items)

    def say(count: int) -> None:
        elapsed = time.monotonic() - began
        parts = [f"{count}/{total} {unit}", f"{timedelta(seconds=round(elapsed))}"]
        if done < count < total:
            left = elapsed / (count - done) * (total - count)
            parts.append(f"{timedelta(seconds=round(left))} left")
        text = ", ".join(filter(None, [*parts, note()]))
        if console.is_terminal:
            # Padded: what is not done is left out where there are no colours.
            bar = console.render(ProgressBar(total, count, width=_BAR_WIDTH))
            room = max(console.width - len(label) - _BAR_WIDTH - 3, 0)  # the last column wraps
            _lines[:] = [console]
            console.file.write(f"\r{label} ")
            console.print(Segments(Segment.adjust_line_length(list(bar), _BAR_WIDTH)), end="")
            console.out(f" {text:{room}.{room}}", end="", highlight=False)
        else:
            console.out(f"{label}: {text}", highlight=False)

    try:
        if console.is_terminal:
            say(done)
        for count, item in enumerate(items, done + 1):
            yield item
            if count == total or time.monotonic() - said >= pause:
                say(count)
                said = time.monotonic()
    finally:
        end_line()


def end_line() -> None:
    """End the line of a bar, so that what is said next, of an error say, has one of its own.

    Example:
        >>> end_line()    # there is none
    """
    while _lines:
        _lines.pop().out()
