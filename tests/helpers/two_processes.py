"""Two processes that find each other, as ``torchrun`` starts them."""

import socket
from contextlib import contextmanager

TIMEOUT = 240


def free_port():
    """Return the number of a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of(rank, port):
    """Return the variables that tell one of two processes its number and where they meet."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def two_processes(context, target, *arguments):
    """Two processes that call ``target(sender, rank, port, *arguments)``, each with its receiver.

    Args:
        context: Of multiprocessing.
        target: Found by its name in a module that can be imported.
        arguments: Further ones, the same for both.
    """
    port, pairs = free_port(), []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(sender, rank, port, *arguments))
        process.start()
        sender.close()
        pairs.append((process, receiver))
    try:
        yield pairs
    finally:
        for process, _ in pairs:
            process.join(10)
            if process.is_alive():
                process.kill()


def received(receiver, timeout=TIMEOUT):
    """Return what comes through a pipe, which must come in time."""
    assert receiver.poll(timeout)
    return receiver.recv()


def sent_by_both(context, target, *arguments):
    """Return what each of :func:`two_processes` sends."""
    with two_processes(context, target, *arguments) as pairs:
        return [received(receiver) for _, receiver in pairs]
