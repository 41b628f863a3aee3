"""Signals that wait until a step is whole."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Within this time a second signal is the first one again: torchrun passes on a Ctrl-C that the
# terminal has sent to its processes already.
_SECONDS = 1.0


class Interruption:
    """A signal that has come and waits.

    The handlers that were there before are called by :meth:`deliver`, or at once by a second
    signal: whoever asks twice does not want to wait.
    """

    def __init__(self) -> None:
        self._pending: int | None = None
        self._since = 0.0
        self._handlers: dict[int, Handler] = {n: signal.getsignal(n) for n in _SIGNALS}

    @property
    def pending(self) -> bool:
        """Whether a signal waits."""
        return self._pending is not None

    def deliver(self) -> None:
        """Do what the signal that waits would have done, which most often raises."""
        number, self._pending = self._pending, None
        if number is None:
            return
        handler = self._handlers[number]
        if callable(handler):
            handler(number, None)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def take(self) -> None:
        """Take signals in place of the handlers there are, but for those that are ignored."""
        for number, handler in self._handlers.items():
            # None is a handler that was not set by Python.
            if handler is not None and handler != signal.SIG_IGN:
                signal.signal(number, self._wait)

    def give_back(self) -> None:
        """Set the handlers that were there before."""
        for number, handler in self._handlers.items():
            if handler is not None:
                signal.signal(number, handler)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        if not self.pending:
            self._pending, self._since = number, time.monotonic()
        elif time.monotonic() > self._since + _SECONDS:
            self.deliver()


@contextmanager
def waiting_signals() -> Iterator[Interruption]:
    """Let SIGINT and SIGTERM wait inside of the block until they are delivered.

    Outside of the main thread, where Python handles no signals, nothing changes.

    Example:
        >>> with waiting_signals() as interruption:
        ...     signal.raise_signal(signal.SIGINT)
        ...     try:
        ...         if interruption.pending:  # whatever was begun is whole now
        ...             interruption.deliver()
        ...     except KeyboardInterrupt:
        ...         print("stopped")
        stopped
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    interruption.take()
    try:
        yield interruption
        interruption.deliver()
    finally:
        interruption.give_back()
