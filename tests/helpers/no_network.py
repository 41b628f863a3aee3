"""Code that must not reach for the network."""

import socket
from contextlib import contextmanager
from unittest import mock


class ReachedError(OSError):
    """What the network answers: nothing."""


@contextmanager
def no_network():
    """Cut the network off, and yield the list of what was reached for."""
    reached = []

    def refuse(*arguments, **options):
        reached.append(arguments)
        raise ReachedError(f"no network: {arguments!r}")

    with (
        mock.patch.multiple(socket.socket, connect=refuse, connect_ex=refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
    ):
        yield reached
