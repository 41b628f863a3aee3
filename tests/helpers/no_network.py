"""Code that must not reach for the network."""

import socket
from contextlib import contextmanager


class ReachedError(OSError):
    """What the network answers: nothing."""


@contextmanager
def no_network():
    """Cut the network off, and yield the list of what was reached for."""
    reached = []
    found = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(*arguments, **options):
        reached.append(arguments)
        raise ReachedError(f"no network: {arguments!r}")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
    try:
        yield reached
    finally:
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = found
